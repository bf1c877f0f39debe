"""A target, folder or file, that exists complete or not at all.

Everything is written under a hidden name beside the target, which is renamed at the end. What has
the hidden name is held under an advisory lock by the process that fills it; where the lock is free,
a killed run left it, and the next run for the same target removes it.
"""

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlx_fusekit.checkpoint.mlx_lm import is_pattern
from mlx_fusekit.checkpoint.writer import sync
from mlx_fusekit.errors import OutputError
from mlx_fusekit.signals import held_back

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
_PARTIAL = ".partial-"


def check_target(target: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> None:
    """Refuse a target that must not be written to, before any work.

    Args:
        target: the folder to be made.
        overwrite: whether an existing model folder may be replaced.
        sources: folders that are read: the base and the adapters.

    Raises:
        OutputError: with the cure.
    """
    check_place(target, "--save-path")
    if target.is_symlink():
        raise OutputError(f"{target}: is a link; give the folder itself as --save-path")
    real = target.resolve()
    for source in (path.resolve() for path in sources):
        if real == source or source.is_relative_to(real) or real.is_relative_to(source):
            raise OutputError(
                f"{target}: is or holds what is read ({source}); choose another --save-path"
            )
    if in_hub_cache(real):
        raise OutputError(f"{target}: lies in the Hugging Face cache; choose another --save-path")
    if is_pattern(target):
        raise OutputError(
            f"{target}: mlx-lm takes the brackets for a pattern and would find no weights there; "
            "choose another --save-path"
        )
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


def check_place(target: Path, flag: str) -> None:
    """Refuse what cannot be renamed at the end: a mount point, or what the shell stands in.

    Raises:
        OutputError: naming the flag.
    """
    here = Path.cwd()
    if target.is_dir() and os.path.ismount(target):
        what = "is a mount point, which cannot be replaced"
    elif not target.name or target.name == ".." or target.resolve() in (here, *here.parents):
        what = "is the current folder, or holds it"
    else:
        return
    raise OutputError(f"{target}: {what}; name a new folder as {flag}")


def in_hub_cache(path: Path) -> bool:
    """Whether a resolved path lies in huggingface_hub's cache, which is not ours to write to."""
    return any(part.startswith(("models--", "datasets--")) for part in path.parts)


def can_make(folder: Path) -> bool:
    """Whether a folder and its missing parents can be made."""
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; renamed to ``target`` when the block ends well, removed when it does not.

    An existing target is replaced; call :func:`check_target` first.

    Raises:
        OutputError: when the disk or its rights do not let the folder be written.
    """

    def put_in_place(staging: Path) -> None:
        if target.exists():
            target.rename(_hidden(target, _REPLACED))
        staging.rename(target)

    with _staged(target, _STAGING, _make_folder, put_in_place) as staging:
        yield staging
    # Only once the new folder is in place: until then the old one is the user's only copy.
    for folder in _all_hidden(target, _REPLACED):
        _remove(folder)


@contextlib.contextmanager
def staged_file(target: Path, check: Callable[[], object]) -> Iterator[Path]:
    """An empty file to fill; renamed to ``target`` when the block ends well, else removed.

    Args:
        target: the file; an existing one is replaced.
        check: refuses a target that must not be written to; asked at the beginning and at the end.

    Raises:
        OutputError: when the disk or its rights do not let the file be written.
    """

    def put_in_place(partial: Path) -> None:
        check()
        partial.replace(target)

    check()
    with _staged(target, _PARTIAL, _make_file, put_in_place) as partial:
        yield partial


@contextlib.contextmanager
def _staged(
    target: Path,
    mark: str,
    make: Callable[[Path], int],
    put_in_place: Callable[[Path], object],
) -> Iterator[Path]:
    """What folders and files have in common.

    Args:
        target: what is to be there at the end.
        mark: tells in a hidden name what has it.
        make: makes the folder or file under its hidden name, and opens it.
        put_in_place: gives it the name of the target.
    """
    parent = target.absolute().parent
    made = _make_parents(parent)
    _remove_abandoned(target, mark)
    staging = _hidden(target, mark)
    try:
        descriptor = make(staging)
    except OSError as error:
        # While it is filled, its name is some 20 characters longer.
        place = target if error.errno == errno.ENAMETOOLONG else parent
        raise OutputError(f"{place}: cannot be written to ({error.strerror})") from error
    with _undone_on_failure(target, made, lambda: _remove(staging)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield staging
            sync(descriptor)
            put_in_place(staging)
            _sync_folder(parent)
        finally:
            os.close(descriptor)


def _make_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _make_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _hidden(target: Path, mark: str) -> Path:
    return target.absolute().parent / f".{target.name}{mark}{secrets.token_hex(4)}"


def _all_hidden(target: Path, mark: str) -> Iterator[Path]:
    return target.absolute().parent.glob(f".{glob.escape(target.name)}{mark}*")


def _remove_abandoned(target: Path, mark: str) -> None:
    for path in _all_hidden(target, mark):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # another run is filling it right now
        finally:
            os.close(descriptor)
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _undone_on_failure(
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
        with held_back():
            remove()
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise OutputError(
                f"{target}: could not be written ({error.strerror}); nothing was left behind"
            ) from error
        raise


def _make_parents(folder: Path) -> list[Path]:
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


def _sync_folder(folder: Path) -> None:
    """Wait until the disk has the names that a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
