"""Every call that changes the disk, a function each; no other module of this package makes one.

So tests can count the calls of a whole command, and let any of them fail or the process die at it.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
#: linux/fs.h and macOS's sys/stdio.h: the target must not exist; both change places.
_NEW, _EXCHANGE = (4, 2) if sys.platform == "darwin" else (1, 2)
_AT_FDCWD = -100
#: What a system or file system says that does not have a call, or not for these files.
UNSUPPORTED = frozenset(
    (
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.EXDEV,
        errno.EINVAL,
        errno.ENOSYS,
        errno.ENOTTY,
        errno.EPERM,
        errno.EBADF,
    )
)


class WriteError(OSError):
    """The disk, its rights or its state did not allow a call that changes it."""


def _once(call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Make a call; here tests put their faults."""
    return call(*arguments, **named)


def _done(call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Make a call, again where a signal interrupted it.

    Raises:
        WriteError: as the system tells it.
    """
    while True:
        try:
            return _once(call, *arguments, **named)
        except InterruptedError:
            continue
        except OSError as error:
            raise WriteError(error.errno, error.strerror, error.filename) from error


def create(path: Path) -> int:
    """Make an empty file and open it; its descriptor. Whatever has the name already is an error."""
    return _done(os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder; its parent must be there."""
    _done(os.mkdir, path, mode)


def make_link(path: Path, leads_to: Path) -> None:
    """Make a symbolic link."""
    _done(os.symlink, leads_to, path)


def write(file: int, data: Any, offset: int) -> None:
    """Write all of some bytes, however many the system takes at a time."""
    rest = memoryview(data).cast("B")
    while rest:
        count = _done(os.pwrite, file, rest, offset)
        rest, offset = rest[count:], offset + count


def copy_some(source: int, target: int, length: int, source_offset: int, target_offset: int) -> int:
    """Copy bytes between open files in the kernel; how many it took, 0 where it cannot."""
    if not hasattr(os, "copy_file_range"):
        return 0
    with _unless_unsupported():
        return _done(os.copy_file_range, source, target, length, source_offset, target_offset)
    return 0


def clone_into(source: int, target: int) -> bool:
    """Let an empty file share the blocks of another; False where the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    with _unless_unsupported():
        _done(fcntl.ioctl, target, _FICLONE, source)
        return True
    return False


def clone_file(source: Path, target: Path) -> bool:
    """Make a file that shares the blocks of another, as macOS does it; False where it cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "clonefile"):
        return False
    with _unless_unsupported():
        _done(_checked, libc.clonefile, os.fsencode(source), os.fsencode(target), 0)
        _done(os.chmod, target, 0o644)
        return True
    return False


def resize(file: int, size: int) -> None:
    """Give a file its size in bytes."""
    _done(os.ftruncate, file, size)


def sync(descriptor: int) -> None:
    """Bring a file or folder to the disk itself, past the drive's cache where the OS allows."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        # A network volume has only fsync.
        with contextlib.suppress(WriteError):
            _done(fcntl.fcntl, descriptor, full)
            return
    try:
        _done(os.fsync, descriptor)
    except WriteError as error:
        # Some network volumes have it for no folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def sync_folder(folder: Path) -> None:
    """Bring the names that a folder holds to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def close(file: int) -> None:
    """Close a file; a network volume may tell only now that it has no room."""
    # Closed it is in any case, so a second time would close another file.
    try:
        _once(os.close, file)
    except InterruptedError:
        pass
    except OSError as error:
        raise WriteError(error.errno, error.strerror) from error


def rename(source: Path, target: Path) -> None:
    """Rename a file, replacing another; or a folder, replacing none but an empty one."""
    _done(os.rename, source, target)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file to a name that nothing has.

    Raises:
        WriteError: with ``EEXIST`` where something has it.
    """
    with _unless_unsupported():
        _done(_rename_flagged, source, target, _NEW)
        return
    with _unless_unsupported():
        _done(os.link, source, target)
        _done(os.unlink, source)
        return
    # A file system without hard links, on a system without the flag: what remains is to look first.
    if os.path.lexists(target):
        raise WriteError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    _done(os.rename, source, target)


def exchange(first: Path, second: Path) -> bool:
    """Let two files or folders change places at once; False where the file system cannot."""
    with _unless_unsupported():
        _done(_rename_flagged, first, second, _EXCHANGE)
        return True
    return False


def unlink(path: Path) -> None:
    """Remove a file or link."""
    _done(os.unlink, path)


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    _done(os.rmdir, path)


def lock(descriptor: int, *, wait: bool) -> bool | None:
    """Take the advisory lock of an open file or folder.

    Args:
        wait: for who has it.

    Returns:
        Whether it was taken; None where the file system has no locks.
    """
    try:
        _done(fcntl.flock, descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except WriteError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in UNSUPPORTED or error.errno == errno.ENOLCK:
            return None
        raise


@contextlib.contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Go on behind the block where the system does not have the call."""
    try:
        yield
    except WriteError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _rename_flagged(source: Path, target: Path, flag: int) -> None:
    """``renamex_np`` of macOS, ``renameat2`` of Linux."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(source), os.fsencode(target)
    if hasattr(libc, "renamex_np"):
        _checked(libc.renamex_np, *names, ctypes.c_uint(flag))
    elif hasattr(libc, "renameat2"):
        _checked(libc.renameat2, _AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(flag))
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))


def _checked(function: Callable[..., int], *arguments: Any) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
