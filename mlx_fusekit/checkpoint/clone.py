"""Copying file bytes without reading them, where the file system can."""

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_COPY_CHUNK = 16 << 20
_FALLBACK = (
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EPERM,
    errno.EBADF,
)


def reflink(source: Path, target: Path) -> bool:
    """Make ``target`` share the blocks of ``source`` until one of them is written to.

    Args:
        source: a file; a link is followed, so that the file behind it is cloned.
        target: must not exist.

    Returns:
        False, with no target left, where the file system cannot (ext4, across devices).
    """
    source = source.resolve()
    cloned = _clonefile(source, target) if sys.platform == "darwin" else _ficlone(source, target)
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
        count = _copy_once(source, target, source_offset, target_offset, length)
        source_offset += count
        target_offset += count
        length -= count


def copy_file(source: Path, target: Path) -> None:
    """Copy one file to a new one, by reflink where possible; content only, no attributes."""
    if not reflink(source, target):
        shutil.copyfile(source, target)


def _copy_once(
    source: int, target: int, source_offset: int, target_offset: int, length: int
) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, length, source_offset, target_offset)
            if count:
                return count
        except OSError as error:
            if error.errno not in _FALLBACK:
                raise
    data = os.pread(source, min(length, _COPY_CHUNK), source_offset)
    if not data:
        raise OSError(errno.EIO, "the file became shorter while it was copied")
    return os.pwrite(target, data, target_offset)


def _ficlone(source: Path, target: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    with open(source, "rb") as original, open(target, "xb") as clone:
        try:
            fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
            return True
        except OSError as error:
            if error.errno not in _FALLBACK:
                raise
    target.unlink()
    return False


def _clonefile(source: Path, target: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "clonefile"):
        return False
    if libc.clonefile(os.fsencode(source), os.fsencode(target), 0) == 0:
        target.chmod(0o644)
        return True
    if ctypes.get_errno() not in _FALLBACK:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
    return False


def _require_own_inode(source: Path, target: Path) -> None:
    """A hard link or a link would make every later write go through to the base model."""
    original, clone = source.stat(), target.lstat()
    same = (original.st_dev, original.st_ino) == (clone.st_dev, clone.st_ino)
    if same or clone.st_nlink != 1:
        target.unlink()
        raise OSError(errno.EMLINK, "the clone shares its inode with the base", str(target))
