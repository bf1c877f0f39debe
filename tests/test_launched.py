"""Being one of several ranks under ``mlx.launch``: what the environment says; going in step."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.launching import launch

from mlx_fusekit import launched
from mlx_fusekit.errors import ConfigurationError

_START = """
import os, signal, sys, time
import mlx.core as mx
from mlx_fusekit import launched, signals
from mlx_fusekit.errors import FusekitError
signals.install()
rank, size = launched.ranks()
def say(text):
    sys.stdout.write(text + "\\n")
    sys.stdout.flush()
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in launched._VARIABLES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(_START + text)
    return str(path)


def test_alone_there_is_one_rank_and_no_group() -> None:
    assert launched.ranks() == (0, 1)
    assert launched.first()
    assert launched.backend() is None
    assert launched.group.__wrapped__() is None
    with launched.bounded_end(), launched.together():
        pass
    with pytest.raises(ZeroDivisionError), launched.together():
        _ = 1 / 0


def test_each_backend_is_told_by_its_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["10.0.0.1:1"], ["10.0.0.2:1"], ["10.0.0.3:1"]]))
    for name, size in (("ring", str(hosts)), ("jaccl", str(hosts)), ("nccl", "3"), ("mpi", "3")):
        rank_variable, size_variable = launched._VARIABLES[name]
        with monkeypatch.context() as patch:
            patch.setenv(rank_variable, "2")
            patch.setenv(size_variable, size)
            assert launched.backend() == name
            assert launched.ranks() == (2, 3)
            assert not launched.first()


def test_a_ring_of_one_is_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hosts.json").write_text("\n")  # as mlx.launch writes it
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    assert launched.ranks() == (0, 1)


@pytest.mark.parametrize(
    ("rank", "size", "named"), [("x", "2", "MLX_RANK=x"), ("2", "2", "MLX_RANK=2"), ("0", "?", "?")]
)
def test_an_environment_that_makes_no_sense_is_named(
    monkeypatch: pytest.MonkeyPatch, rank: str, size: str, named: str
) -> None:
    monkeypatch.setenv("MLX_RANK", rank)
    monkeypatch.setenv("MLX_WORLD_SIZE", size)
    with pytest.raises(ConfigurationError) as raised:
        launched.ranks()
    assert named in str(raised.value)
    assert "mlx.launch" in str(raised.value)


def test_the_ranks_connect_once(tmp_path: Path) -> None:
    code = """
group = launched.group()
assert launched.group() is group and group.size() == mx.distributed.init().size() == size == 2
with launched.together():
    total = mx.distributed.all_sum(mx.array(rank + 1), stream=mx.cpu).item()
if launched.first():
    say(f"{launched.backend()} {total}")
"""
    done = launch(script(tmp_path, code), cwd=tmp_path)
    assert done.stdout == "ring 3\n", done.stderr


def test_where_one_rank_fails_all_do(tmp_path: Path) -> None:
    code = """
try:
    with launched.together():
        if rank == 1:
            raise FusekitError("no such model here")
    say("went on")
except FusekitError as error:
    say(f"{rank} {type(error).__name__} {error}")
"""
    done = launch(script(tmp_path, code), cwd=tmp_path, ranks=3)
    assert sorted(done.stdout.splitlines()) == [
        "0 FailedElsewhereError rank 1 of 3 failed, and says why",
        "1 FusekitError no such model here",
        "2 FailedElsewhereError rank 1 of 3 failed, and says why",
    ], done.stderr


def test_a_rank_that_is_killed_is_missed(tmp_path: Path) -> None:
    code = """
with launched.together():
    pass
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    with launched.in_contact():
        mx.eval(mx.distributed.all_sum(mx.array(1), stream=mx.cpu))
except FusekitError as error:
    say(str(error))
    sys.exit(1)
except KeyboardInterrupt as error:
    say("lost another rank, and the launcher was quicker")
    sys.exit(1)
"""
    done = launch(script(tmp_path, code), cwd=tmp_path)
    assert "lost another rank" in done.stdout, done.stderr
    assert "Node with rank 1 exited with code -9" in done.stderr


@pytest.mark.parametrize("waiting", ["launched.group()", "stuck()"])
def test_a_rank_that_waits_ends_with_the_others(tmp_path: Path, waiting: str) -> None:
    """MLX hears of no signal while it waits; the launcher sends one when a rank has failed."""
    code = f"""
launched.GRACE_SECONDS = 1.0
def stuck():
    '''A collective that the other never joins, while its connection stays open.'''
    launched.group()
    with launched.bounded_end():
        mx.eval(mx.distributed.all_sum(mx.array(1), stream=mx.cpu))
if rank == 0:
    {waiting}
    say("went on")
if "stuck" in {waiting!r}:
    launched.group()
    if os.fork():  # the child keeps the connection
        time.sleep(2)  # by then the other waits
        os._exit(5)
    os.setsid()
    for number in (0, 1, 2):
        os.close(number)
    time.sleep(8)
    os._exit(0)
time.sleep(1)
sys.exit(5)
"""
    started = time.monotonic()
    done = launch(script(tmp_path, code), cwd=tmp_path, timeout=60)
    assert time.monotonic() - started < 40
    assert "went on" not in done.stdout
    assert "Node with rank 1 exited with code 5" in done.stderr
    assert "rank 0" in done.stderr
    if waiting == "stuck()":
        assert "error: rank 0 of 2 was asked to end while it waited" in done.stderr


def test_no_rank_imports_mlx_to_know_itself() -> None:
    code = (
        "import sys; from mlx_fusekit import launched; launched.ranks(); launched.group(); "
        "assert 'mlx.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
