"""Files that are written, cloned, copied and removed."""

import errno
import os
import stat
import sys
from pathlib import Path

from mlx_fusekit.reading import open_file
from mlx_fusekit.writing import calls

_COPY_CHUNK = 16 << 20


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, and bring it to the disk."""
    file = calls.create(path)
    try:
        calls.write(file, data, 0)
        calls.sync(file)
    finally:
        calls.close(file)


def write_into(path: Path, data: bytes) -> None:
    """Write an empty file that is there; whoever made it brings it to the disk."""
    file = os.open(path, os.O_RDWR)
    try:
        calls.write(file, data, 0)
    finally:
        calls.close(file)


def reflink(source: Path, target: Path) -> bool:
    """Make ``target`` share the blocks of ``source`` until one of them is written to.

    Args:
        source: a file; a link is followed, so that the file behind it is cloned.
        target: must not exist.

    Returns:
        False, with no target left, where the file system cannot (ext4, across devices).
    """
    source = source.resolve()
    cloned = (
        calls.clone_file(source, target) if sys.platform == "darwin" else _ficlone(source, target)
    )
    if cloned:
        _require_own_inode(source, target)
    return cloned


def copy_range(
    source: int, target: int, source_offset: int, target_offset: int, length: int
) -> None:
    """Copy bytes between open files, in the kernel where it can.

    Args:
        source, target: file descriptors.
    """
    while length:
        count = calls.copy_some(source, target, length, source_offset, target_offset)
        if not count:
            data = os.pread(source, min(length, _COPY_CHUNK), source_offset)
            if not data:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            calls.write(target, data, target_offset)
            count = len(data)
        source_offset += count
        target_offset += count
        length -= count


def copy_file(source: Path, target: Path) -> None:
    """Copy one file to a new one, by reflink where possible, and bring it to the disk.

    Content only, no attributes.
    """
    cloned = reflink(source, target)
    file = os.open(target, os.O_RDWR) if cloned else calls.create(target)
    try:
        if not cloned:
            with open_file(source) as original:
                size = os.fstat(original.fileno()).st_size
                copy_range(original.fileno(), file, 0, 0, size)
        calls.sync(file)
    finally:
        calls.close(file)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all in it; what is not there is no error."""
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            calls.unlink(path)
            return
        for entry in sorted(path.iterdir()):
            remove(entry)
        calls.remove_folder(path)
    except FileNotFoundError:
        return
    except calls.WriteError as error:
        if error.errno != errno.ENOENT:
            raise


def _ficlone(source: Path, target: Path) -> bool:
    file = calls.create(target)
    try:
        with open_file(source) as original:
            cloned = calls.clone_into(original.fileno(), file)
    finally:
        calls.close(file)
    if not cloned:
        calls.unlink(target)
    return cloned


def _require_own_inode(source: Path, target: Path) -> None:
    """A hard link or a link would make every later write go through to the base model."""
    original, clone = source.stat(), target.lstat()
    same = (original.st_dev, original.st_ino) == (clone.st_dev, clone.st_ino)
    if same or clone.st_nlink != 1:
        calls.unlink(target)
        raise OSError(errno.EMLINK, "the clone shares its inode with the base", str(target))
