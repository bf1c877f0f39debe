"""A target exists complete or not at all; nothing is written over what must stay."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_model
from support.tiny import make_adapter, make_model

from mlx_fusekit import fuse, prepare_fuse
from mlx_fusekit.checkpoint.target import model_target
from mlx_fusekit.errors import OutputError
from mlx_fusekit.writing.staging import staged
from mlx_fusekit.writing.targets import FileTarget, FolderTarget


def folder_target(path: Path, **how: Any) -> FolderTarget:
    """A folder that replaces only folders with a marker in them."""

    def refusal(folder: Path) -> str | None:
        return None if (folder / "marker").exists() else "has no marker"

    return FolderTarget(path, "--flag", refusal, **how)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def test_an_existing_target_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    fuse(base, adapter, tmp_path / "fused")
    before = {p.name: p.read_bytes() for p in (tmp_path / "fused").iterdir()}
    with pytest.raises(OutputError, match="add --overwrite"):
        fuse(base, adapter, tmp_path / "fused")
    assert {p.name: p.read_bytes() for p in (tmp_path / "fused").iterdir()} == before


def test_overwrite_replaces_the_whole_folder(tmp_path: Path, base: Path, adapter: Path) -> None:
    fuse(base, adapter, tmp_path / "fused")
    (tmp_path / "fused" / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    fuse(base, adapter, tmp_path / "fused", overwrite=True)
    assert not (tmp_path / "fused" / "model-00009-of-00009.safetensors").exists()
    load_model(tmp_path / "fused")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "fused"]


def test_overwrite_does_not_replace_what_is_no_model(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no model folder"):
        fuse(base, adapter, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_an_empty_target_is_filled(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "fused").mkdir()
    fuse(base, adapter, tmp_path / "fused")
    load_model(tmp_path / "fused")


@pytest.mark.parametrize("where", ["base", "base/inside", "adapter", "."])
def test_what_is_read_is_never_written(
    tmp_path: Path, base: Path, adapter: Path, where: str
) -> None:
    with pytest.raises(OutputError, match="choose another --save-path"):
        fuse(base, adapter, tmp_path / where, overwrite=True)
    load_model(base)


def test_a_link_is_not_written_through(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OutputError, match="is a link"):
        fuse(base, adapter, tmp_path / "link", overwrite=True)
    assert not any((tmp_path / "real").iterdir())


def test_a_file_is_not_replaced(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        fuse(base, adapter, tmp_path / "file", overwrite=True)


def test_the_hub_cache_is_never_written(tmp_path: Path, base: Path, adapter: Path) -> None:
    with pytest.raises(OutputError, match="Hugging Face cache"):
        fuse(base, adapter, tmp_path / "models--a--b" / "snapshots" / "x")
    assert not (tmp_path / "models--a--b").exists()


def test_the_base_stays_as_it_was(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in base.iterdir()}
    fuse(base, adapter, tmp_path / "fused")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in base.iterdir()} == before
    inodes = {p.stat().st_ino for p in base.iterdir()}
    assert not inodes & {p.stat().st_ino for p in (tmp_path / "fused").iterdir()}


def test_an_error_leaves_no_trace(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        staged(model_target(tmp_path / "a" / "b" / "target")) as staging,
    ):
        (staging / "file").write_text("x")
        raise RuntimeError
    assert not any(tmp_path.iterdir())


def test_an_error_keeps_the_old_target(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("x")
    target = model_target(tmp_path / "target", overwrite=True)
    with pytest.raises(RuntimeError), staged(target):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "config.json").exists()


def test_of_two_runs_on_one_target_the_second_to_end_is_refused(tmp_path: Path) -> None:
    target = model_target(tmp_path / "target")
    with pytest.raises(OutputError, match="exists already"), staged(target) as running:
        with staged(target) as second:
            (second / "file").write_text("2")
        assert running.exists()
        (running / "file").write_text("1")
    assert (tmp_path / "target" / "file").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_glob_character_in_the_name_is_no_pattern(tmp_path: Path) -> None:
    other = tmp_path / ".ab.fusekit-new-00000000"
    other.mkdir()
    with staged(folder_target(tmp_path / "[a]b")) as staging:
        (staging / "file").write_text("x")
    assert other.exists()


_KILLED = """
import sys, time
from pathlib import Path
from mlx_fusekit.writing.staging import staged
from mlx_fusekit.writing.targets import FileTarget, FolderTarget
with staged(FileTarget(Path(sys.argv[1]), "--flag", overwrite=True)) as path:
    path.write_bytes(b"half a file")
    print("written", flush=True)
    time.sleep(60)
"""


def write_staged(target: Path) -> None:
    with staged(FileTarget(target, "--flag", overwrite=True)) as path:
        path.write_bytes(b"a whole file")


def test_a_file_that_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    command = [sys.executable, "-c", _KILLED, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".m.gguf.fusekit-new-")
        write_staged(tmp_path / "n.gguf")
        write_staged(target)
        assert left.exists()  # its process lives
        run.send_signal(signal.SIGKILL)
        run.wait()
    write_staged(target)
    assert target.read_bytes() == b"a whole file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "n.gguf"]


# Large enough that a kill can fall into the middle of the writing.
_SLOW = """
import sys, time
from mlx_fusekit.fusing import fuse as fusing
from mlx_fusekit.checkpoint import writer
write = writer.FileWriter.write_rows
def slow(self, name, first_row, rows):
    time.sleep(0.004)
    write(self, name, first_row, rows)
writer.FileWriter.write_rows = slow
from mlx_fusekit.cli import main
sys.argv = ["mlx-fusekit", "fuse", *sys.argv[1:]]
main()
"""


def start(base: Path, adapter: Path, target: Path, *more: str) -> subprocess.Popen[bytes]:
    paths = ["--model", str(base), "--adapter-path", str(adapter), "--save-path", str(target)]
    return subprocess.Popen(
        [sys.executable, "-c", _SLOW, *paths, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A job in the background of a script ignores the signal, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_kill_at_any_moment_leaves_the_target_absent_or_complete(
    tmp_path: Path, base: Path, adapter: Path, overwrite: bool
) -> None:
    target = tmp_path / "fused"
    fuse(base, adapter, tmp_path / "expected")
    complete = {p.name: p.read_bytes() for p in (tmp_path / "expected").iterdir()}
    if overwrite:
        fuse(base, adapter, target)
    seen_staging = False
    for step in range(8):
        process = start(base, adapter, target, *(["--overwrite"] if overwrite else []))
        deadline = time.monotonic() + 30
        # The first kills fall before and at the start of the writing, the later ones into it.
        while not _staging(tmp_path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.02 * step)
        process.kill()
        process.wait()
        seen_staging |= _staging(tmp_path)
        if target.exists():
            assert {p.name: p.read_bytes() for p in target.iterdir()} == complete
    assert seen_staging, "no kill fell into the writing"
    process = start(base, adapter, target, "--overwrite")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert {p.name: p.read_bytes() for p in target.iterdir()} == complete
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "expected", "fused"]


def _staging(folder: Path) -> bool:
    return any(folder.glob(".fused.fusekit-new-*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_no_trace(
    tmp_path: Path, base: Path, adapter: Path, number: int, code: int
) -> None:
    process = start(base, adapter, tmp_path / "fused")
    while not _staging(tmp_path) and process.poll() is None:
        time.sleep(0.002)
    time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, base: Path, adapter: Path) -> None:
    """A limit on the size of files stands in for a disk that fills up during the writing."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from mlx_fusekit.cli import main\n"
        "main()"
    )
    paths = ["--model", base, "--adapter-path", adapter, "--save-path", tmp_path / "fused"]
    result = subprocess.run(
        [sys.executable, "-c", code, "fuse", *paths], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "fused: could not be written: it is larger than a file may be there" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_dry_run_and_preparing_write_nothing(tmp_path: Path, base: Path, adapter: Path) -> None:
    report = prepare_fuse(base, adapter, tmp_path / "a" / "b" / "fused").report()
    assert report.dry_run
    assert report.output_bytes == report.base_bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
