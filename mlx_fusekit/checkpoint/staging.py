"""A target folder that exists complete or not at all.

Everything is written into a hidden folder beside the target, which is renamed at the end. The
hidden folder is held under an advisory lock by the process that fills it; one whose lock is free
was left by a killed run, and the next run for the same target removes it.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlx_fusekit.checkpoint.writer import sync
from mlx_fusekit.errors import OutputError

#: What a disk or its rights can do to us; any other OSError is a bug of ours.
_DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)

_STAGING = ".fusekit-new-"
_REPLACED = ".fusekit-old-"


def check_target(target: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> None:
    """Refuse a target that must not be written to, before any work.

    Args:
        target: the folder to be made.
        overwrite: whether an existing model folder may be replaced.
        sources: folders that are read: the base and the adapters.

    Raises:
        OutputError: with the cure.
    """
    if target.is_symlink():
        raise OutputError(f"{target}: is a link; give the folder itself as --save-path")
    real = target.resolve()
    for source in (path.resolve() for path in sources):
        if real == source or source.is_relative_to(real) or real.is_relative_to(source):
            raise OutputError(
                f"{target}: is or holds what is read ({source}); choose another --save-path"
            )
    if any(part.startswith(("models--", "datasets--")) for part in real.parts):
        raise OutputError(f"{target}: lies in the Hugging Face cache; choose another --save-path")
    if not target.parent.resolve().is_dir() and not can_make(target.parent):
        raise OutputError(f"{target.parent}: cannot be made; choose another --save-path")
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target}: is a file; choose another --save-path")
    if any(target.iterdir()):
        if not overwrite:
            raise OutputError(f"{target}: exists already; add --overwrite to replace it")
        if not (target / "config.json").exists():
            raise OutputError(
                f"{target}: is not empty and no model folder, so --overwrite does not replace it; "
                "choose another --save-path"
            )


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; renamed to ``target`` when the block ends well, removed when it does not.

    An existing target is replaced; call :func:`check_target` first.

    Raises:
        OutputError: when the disk or its rights do not let the folder be written.
    """
    parent = target.absolute().parent
    made = make_parents(parent)
    _remove_abandoned(target)
    staging = parent / f".{target.name}{_STAGING}{secrets.token_hex(4)}"
    try:
        staging.mkdir()
    except OSError as error:
        raise OutputError(f"{parent}: cannot be written to ({error.strerror})") from error
    descriptor = os.open(staging, os.O_RDONLY)
    with undone_on_failure(target, made, lambda: shutil.rmtree(staging, ignore_errors=True)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield staging
            sync(descriptor)
            _put_in_place(staging, target)
        finally:
            os.close(descriptor)
    _remove_replaced(target)


@contextlib.contextmanager
def undone_on_failure(
    target: Path, made: Sequence[Path], remove: Callable[[], object]
) -> Iterator[None]:
    """Leave nothing behind when the block fails or is interrupted.

    Args:
        target: what was to be made, for the message.
        made: folders that were made for it, innermost first; those still empty are removed.
        remove: takes away what was written so far.

    Raises:
        OutputError: where disk or rights were the cause.
    """
    try:
        yield
    except BaseException as error:
        remove()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise OutputError(
                f"{target}: could not be written ({error.strerror}); nothing was left behind"
            ) from error
        raise


def _put_in_place(staging: Path, target: Path) -> None:
    if target.exists():
        target.rename(target.parent / f".{target.name}{_REPLACED}{secrets.token_hex(4)}")
    staging.rename(target)
    sync_folder(target.absolute().parent)


def _remove_abandoned(target: Path) -> None:
    for folder in target.absolute().parent.glob(f".{_escaped(target.name)}{_STAGING}*"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # another run is filling it right now
        finally:
            os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_replaced(target: Path) -> None:
    # Only once the new folder is in place: until then the old one is the user's only copy.
    for folder in target.absolute().parent.glob(f".{_escaped(target.name)}{_REPLACED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _escaped(name: str) -> str:
    import glob

    return glob.escape(name)


def make_parents(folder: Path) -> list[Path]:
    """Make a folder and its missing parents; those that were made, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path}: cannot be made ({error.strerror})") from error
    return missing


def can_make(folder: Path) -> bool:
    """Whether a folder and its missing parents can be made."""
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names that a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
