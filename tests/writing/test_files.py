"""Shared blocks: where the file system has them, the result is the same, bytes and safety alike.

Run on APFS, Btrfs or XFS, or as root on Linux with btrfs-progs, these tests clone for real.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import make_adapter, make_model

from mlx_fusekit import prepare_fuse
from mlx_fusekit.writing import calls, files
from mlx_fusekit.writing.files import copy_range, reflink


@pytest.fixture(scope="module")
def cloning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a file system that can share blocks."""
    folder = tmp_path_factory.mktemp("cloning")
    (folder / "a").write_bytes(b"x" * 5000)
    if reflink(folder / "a", folder / "b"):
        yield folder
        return
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    try:
        with open(image, "wb") as file:
            file.truncate(300 << 20)
        subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, mounted], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs APFS, Btrfs or XFS, or root, mkfs.btrfs and a loop device")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_a_clone_is_a_file_of_its_own(cloning: Path) -> None:
    (cloning / "one").write_bytes(b"a" * 10000)
    (cloning / "link").symlink_to(cloning / "one")
    assert reflink(cloning / "link", cloning / "two")
    assert not (cloning / "two").is_symlink()
    with open(cloning / "two", "r+b") as file:
        file.write(b"b")
    assert (cloning / "one").read_bytes() == b"a" * 10000
    assert (cloning / "two").read_bytes() == b"b" + b"a" * 9999


def test_a_clone_does_not_replace_a_file(cloning: Path) -> None:
    (cloning / "source").write_bytes(b"a")
    (cloning / "taken").write_bytes(b"b")
    with pytest.raises(calls.WriteError, match="File exists"):
        reflink(cloning / "source", cloning / "taken")
    assert (cloning / "taken").read_bytes() == b"b"


def test_cloned_and_rewritten_results_are_the_same(cloning: Path) -> None:
    base = make_model(cloning / "base")
    before = (base / "model.safetensors").read_bytes()
    adapter = make_adapter(cloning / "adapter", base, keys=["self_attn.q_proj"])
    cloned = prepare_fuse(base, adapter, cloning / "cloned").run()
    rewritten = prepare_fuse(base, adapter, cloning / "rewritten").run(clone=False)
    assert (cloned.cloned, rewritten.cloned) == (True, False)
    for path in (cloning / "cloned").iterdir():
        assert path.read_bytes() == (cloning / "rewritten" / path.name).read_bytes()
    assert (base / "model.safetensors").read_bytes() == before
    assert (cloning / "cloned" / "model.safetensors").read_bytes() != before
    inodes = [(cloning / name / "model.safetensors").stat().st_ino for name in ("base", "cloned")]
    assert inodes[0] != inodes[1]


def test_a_layout_that_changes_is_not_cloned(cloning: Path) -> None:
    base = make_model(cloning / "wide-base")
    adapter = make_adapter(cloning / "wide-adapter", base)
    assert not prepare_fuse(base, adapter, cloning / "wide", bits=8).run().cloned


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a second file system")
def test_another_device_is_copied(cloning: Path, tmp_path: Path) -> None:
    if tmp_path.stat().st_dev == cloning.stat().st_dev:
        pytest.skip("both folders are on one device")
    base = make_model(cloning / "other-base")
    adapter = make_adapter(cloning / "other-adapter", base)
    far = prepare_fuse(base, adapter, tmp_path / "far").run()
    near = prepare_fuse(base, adapter, cloning / "near").run()
    assert (far.cloned, near.cloned) == (False, True)
    for path in (tmp_path / "far").iterdir():
        assert path.read_bytes() == (cloning / "near" / path.name).read_bytes()


@pytest.mark.parametrize("kernel", [True, False])
def test_ranges_are_copied_with_and_without_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.delattr(calls.os, "copy_file_range", raising=False)
        monkeypatch.setattr(files, "_COPY_CHUNK", 7)
    (tmp_path / "source").write_bytes(bytes(range(100)))
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "wb") as target:
        copy_range(source.fileno(), target.fileno(), 10, 3, 40)
    assert (tmp_path / "target").read_bytes() == bytes(3) + bytes(range(10, 50))


def test_a_source_that_ends_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    with (
        open(tmp_path / "source", "rb") as source,
        open(tmp_path / "target", "wb") as target,
        pytest.raises(OSError, match="shorter"),
    ):
        copy_range(source.fileno(), target.fileno(), 0, 0, 10)


def test_no_clone_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    if reflink(tmp_path / "source", tmp_path / "target"):
        pytest.skip("this file system clones")
    assert not (tmp_path / "target").exists()
