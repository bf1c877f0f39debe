"""Files from outside are regular files, of bounded size, and where they should be."""

import ast
import os
import socket
from pathlib import Path

import pytest

import mlx_fusekit
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.reading import not_regular, open_file, read_bytes, resolve_inside

ROOT = Path(mlx_fusekit.__file__).parent
#: Open what the system makes, or what was just made here.
OTHERS = (
    "reading.py",
    "writing/calls.py",
    "writing/files.py",
    "writing/held.py",
    "checkpoint/writer.py",  # the file that it writes
    "gguf/file/writer.py",
    "gguf/lora.py",
    "writing/work.py",  # the folder that it holds
    "launched.py",  # a pipe
    "cli/streams.py",
    "cli/failures.py",
    "machine.py",
    "processes.py",
    "texts/rendering.py",
    "bench/environment.py",
    "bench/isolated.py",
)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert read_bytes(path, 10) == b"0123456789"
    with open_file(path) as file:
        assert file.read(3) == b"012"
    assert not_regular(path) is None
    with pytest.raises(OSError, match="too large: 10 bytes"):
        read_bytes(path, 9)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(tmp_path / "socket"))  # a long name does not fit
    for path, what in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is a pipe"),
        (tmp_path / "socket", "is a socket"),
        (Path("/dev/zero"), "is a device"),
    ):
        assert not_regular(path) == what
        for read in (open_file, lambda path: read_bytes(path, 1000)):
            with pytest.raises(OSError, match=what) as refused:
                read(path)
            assert refused.value.strerror == f"{what}, where a file is expected"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc")
def test_what_the_system_makes_up_is_no_file() -> None:
    with pytest.raises(OSError, match="is no file of a disk"):
        read_bytes(Path("/proc/self/maps"), 1000)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "missing", "circle/x", "circle"])
def test_names_that_lead_nowhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match=r".") as refused:
        read_bytes(tmp_path / name, 1000)
    assert refused.value.strerror
    assert not_regular(tmp_path / name) is None


def test_links(tmp_path: Path) -> None:
    model, outside = tmp_path / "model", tmp_path / "secret"
    model.mkdir()
    outside.write_text("x")
    (model / "config.json").write_text("{}")
    links = {"inside": "config.json", "out": "../secret", "twice": "out", "circle": "circle"}
    for name, leads_to in links.items():
        (model / name).symlink_to(leads_to)
    assert resolve_inside(model, "inside") == (model / "config.json").resolve()
    for name in ("out", "twice", "../secret"):
        with pytest.raises(CheckpointError, match="leads out of the model's folder"):
            resolve_inside(model, name)
    (tmp_path / "link").symlink_to("model")  # a model may be named by a link
    assert resolve_inside(tmp_path / "link", "inside") == (model / "config.json").resolve()


def test_a_snapshot_of_the_hub_links_to_its_own_blobs_only(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b/blobs"
    other = tmp_path / "models--c--d" / "blobs"
    for folder in (snapshot, blobs, other):
        folder.mkdir(parents=True)
        (folder / "x").write_text("x")
    (snapshot / "ours").symlink_to("../../blobs/x")
    (snapshot / "theirs").symlink_to("../../../models--c--d/blobs/x")
    assert resolve_inside(snapshot, "ours") == (blobs / "x").resolve()
    with pytest.raises(CheckpointError, match="leads out"):
        resolve_inside(snapshot, "theirs")


def opens(node: ast.AST) -> bool:
    """Whether it is a call that opens a file."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Name):
        # A descriptor comes from a call that opened it.
        return called.id == "open" and not isinstance(node.args[0], ast.Call)
    names = ("read_text", "read_bytes")
    return isinstance(called, ast.Attribute) and (
        called.attr in names
        or (
            called.attr == "open" and isinstance(called.value, ast.Name) and called.value.id == "os"
        )
    )


def test_only_one_module_opens_what_is_from_outside() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if any(map(opens, ast.walk(ast.parse(path.read_text("utf-8")))))
    }
    assert found - set(OTHERS) == set()
    assert "reading.py" in found
