"""Ctrl-C, SIGTERM and SIGHUP, at whatever moment: one line, an exit code, and nothing left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.command import exit_code
from support.tiny import make_adapter, make_model

from mlx_fusekit import samples, signals
from mlx_fusekit.fusing import prepared as fusing
from mlx_fusekit.gguf import exporting
from mlx_fusekit.writing import calls, held

LEFT = "nothing half-made was left behind"
CODES = {
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated"),
    signal.SIGHUP: (129, "the terminal was closed"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    make_adapter(folder / "adapters", make_model(folder / "mlx_model"))
    return folder


def heard() -> None:
    """Let no signal be ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    handlers = {number: signal.getsignal(number) for number in CODES}
    hook = sys.unraisablehook
    # A run of the tests in the background, or under nohup, ignores some of them.
    heard()
    yield
    sys.unraisablehook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


def send(number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "module"),
    [
        (signal.SIGINT, "click"),
        (signal.SIGTERM, "mlx_fusekit.cli.failures"),
        (signal.SIGINT, "numpy"),
        (signal.SIGHUP, "mlx_fusekit.fusing.execute"),
    ],
)
def test_in_the_first_moments(number: signal.Signals, module: str, folder: Path) -> None:
    """A signal comes while a module is imported, be it the first of all, and twice."""
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        f"            for _ in range(2): os.kill(os.getpid(), {int(number)})\n"
        "from mlx_fusekit.__main__ import main\n"
        "sys.meta_path.insert(0, Finder())\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "fuse", "--save-path", "never"],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        # A job in the background ignores the signal, and so do its children.
        preexec_fn=heard,
    )
    code, words = CODES[number]
    assert (done.returncode, done.stderr) == (
        code,
        f"error: {words}; {LEFT}\n",
    )
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "mlx_model"]


@pytest.mark.parametrize("number", CODES)
def test_repeated_while_staging_is_removed(
    number: signal.Signals, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    remove, removed = held.remove, []

    def slow_remove(path: Path) -> None:
        send(number, 3)
        removed.append(path)
        send(signal.SIGTERM)
        remove(path)
        send(number)

    def execute(*_: object, **__: object) -> bool:
        send(number)
        raise AssertionError("the signal raises")

    monkeypatch.setattr(fusing, "execute", execute)
    monkeypatch.setattr(held, "remove", slow_remove)
    monkeypatch.chdir(folder)
    code, words = CODES[number]
    assert exit_code(monkeypatch, "fuse", "--save-path", "a/b/c", "--requantize", "nearest") == code
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == f"error: {words}; {LEFT}"
    assert len(lines) == 2, "a warning of the plan, and the error"
    assert removed
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "mlx_model"]


def test_while_another_failure_cleans_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The first signal comes while the staging of a run that failed is removed."""
    remove = held.remove

    def slow_remove(path: Path) -> None:
        send(signal.SIGINT)
        remove(path)

    def execute(*_: object, **__: object) -> bool:
        raise calls.WriteError(28, "No space left on device")

    monkeypatch.setattr(fusing, "execute", execute)
    monkeypatch.setattr(held, "remove", slow_remove)
    monkeypatch.chdir(folder)
    assert exit_code(monkeypatch, "fuse", "--save-path", "a/b", "--requantize", "nearest") == 130
    assert capfd.readouterr().err.splitlines()[-1] == f"error: interrupted; {LEFT}"
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "mlx_model"]


def test_one_that_became_another_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Modules in C that are imported make an ImportError of it."""

    def execute(*_: object, **__: object) -> bool:
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy._core failed to import") from None
        return True

    monkeypatch.setattr(fusing, "execute", execute)
    monkeypatch.chdir(folder)
    assert exit_code(monkeypatch, "fuse", "--save-path", "a", "--requantize", "nearest") == 130
    assert capfd.readouterr().err.splitlines()[-1] == f"error: interrupted; {LEFT}"


def test_while_the_fused_model_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """What is done stays, and is said."""

    def write(*_: object, **__: object) -> None:
        send(signal.SIGTERM)

    monkeypatch.setattr(exporting, "write_gguf", write)
    monkeypatch.chdir(tmp_path)
    paths = ("--model", str(samples.model_path()), "--adapter-path", str(samples.adapter_path()))
    code = exit_code(monkeypatch, "fuse", *paths, "--requantize", "nearest", "--export-gguf")
    assert code == 143
    line = "error: terminated; the fused model is in fused_model, without a GGUF file"
    assert capfd.readouterr().err.splitlines()[-1] == line
    assert (tmp_path / "fused_model" / "model.safetensors").exists()


def test_one_that_python_drops_comes_again() -> None:
    class Sender:
        def __del__(self) -> None:
            send(signal.SIGTERM)
            time.sleep(0)

    signals.install()
    sender = Sender()
    with pytest.raises(signals.Ended) as ended:
        del sender
        for _ in range(200):
            time.sleep(0.01)
    assert ended.value.status == 143


def test_what_is_ignored_stays_so() -> None:
    """SIGINT of a job in the background, SIGHUP under nohup."""
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)
        signals.install()
        send(number)
        assert signal.getsignal(number) is signal.SIG_IGN


def test_after_one_that_was_caught_another_counts() -> None:
    """As of a benchmark, which shows what it has after the first."""
    signals.install()
    for _ in range(2):
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt:
            send(signal.SIGINT, 2)
        else:
            raise AssertionError("the signal raises")


def test_held_back_it_comes_after_the_block() -> None:
    signals.install()
    done = []
    with pytest.raises(signals.Ended), signals.held_back():
        send(signal.SIGHUP, 2)
        done.append("cleaned")
    assert done
    assert signals.received() is not None


def test_a_bench_that_is_terminated_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from mlx_fusekit.bench import harness

    timed, count = harness.time_generation, []

    def time_generation(*arguments: Any, **options: Any) -> Any:
        count.append(1)
        if len(count) == 5:
            send(signal.SIGTERM)
        return timed(*arguments, **options)

    monkeypatch.setattr(harness, "time_generation", time_generation)
    monkeypatch.chdir(folder)
    few = ("-p", "4", "-g", "2", "-n", "4", "--load-trials", "0")
    code = exit_code(
        monkeypatch, "bench", "--model", "mlx_model", "--adapter-path", "adapters", *few
    )
    shown = capfd.readouterr()
    assert code == 143
    assert "INCOMPLETE" in shown.out
    assert "interrupted; what was measured" in shown.err
