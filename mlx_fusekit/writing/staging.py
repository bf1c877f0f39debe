"""A target, folder or file, that exists complete or not at all.

Everything is written under a hidden name beside the target, and takes its place at the end. What
has the hidden name is held under an advisory lock by the process that fills it. Where the lock is
free, a killed run left it; the next run for the same target removes it, and brings back what was
being replaced.
"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

from mlx_fusekit.errors import OutputError
from mlx_fusekit.signals import held_back
from mlx_fusekit.writing import calls, held
from mlx_fusekit.writing.calls import WriteError
from mlx_fusekit.writing.files import write_into
from mlx_fusekit.writing.targets import FileTarget, FolderTarget

Target: TypeAlias = FileTarget | FolderTarget

#: What the disk can do to us, in the user's words.
_REASONS = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "the quota on its disk is used up",
    errno.EFBIG: "it is larger than a file may be there",
    errno.EROFS: "its disk is read-only",
    errno.EIO: "its disk failed",
}
#: Further ones, told as the system does; any other error of a call is a bug of ours.
_OTHERS = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.ESTALE, errno.ENAMETOOLONG)
#: What a rename says of a name that something has.
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


@contextlib.contextmanager
def staged(target: Target) -> Iterator[Path]:
    """A folder or an empty file to fill; takes the target's place when the block ends well.

    Else it is removed, and the target is as it was before.

    Raises:
        OutputError: when the target must not be written to, at the beginning or at the end, or the
            disk or its rights do not let it.
    """
    path = target.path.absolute()
    held.put_in_order(path)
    target.check()
    with told(target.path), _parents(path.parent):
        with held.hold(path, folder=isinstance(target, FolderTarget)) as (staging, descriptor):
            with _own(target.path, staging, descriptor):
                yield staging
                calls.sync(descriptor)
            target.check()
            with held_back():
                replaced = _put_in_place(staging, target)
        _settle(path, replaced)
        if replaced is not None:
            held.discard(path, replaced)


def write_file(target: FileTarget, data: bytes) -> None:
    """Write a file that exists complete or not at all.

    Raises:
        OutputError: as for :func:`staged`.
    """
    with staged(target) as path:
        write_into(path, data)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A private folder that is removed at the end; so is what killed runs of this user left.

    Raises:
        OutputError: when the disk or its rights do not let it be made or filled.
    """
    try:
        with held.temporary_folder() as path:
            yield path
    except WriteError as error:
        raise OutputError(
            f"{tempfile.gettempdir()}: cannot be written to ({error.strerror}); make room there, "
            "or set TMPDIR to another folder"
        ) from error


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Say in the user's words what the disk did not allow.

    Raises:
        OutputError: in place of errors of a call that are not our fault.
    """
    try:
        yield
    except WriteError as error:
        number = error.errno or 0
        if number not in (*_REASONS, *_OTHERS):
            raise
        why = _REASONS.get(number, os.strerror(number))
        (after, *_) = getattr(error, "__notes__", ["nothing was left behind"])
        raise OutputError(f"{path}: could not be written: {why}; {after}") from error


@contextlib.contextmanager
def _own(path: Path, staging: Path, descriptor: int) -> Iterator[None]:
    """See that what is filled is still there at the end of the block, and where it is not, say so.

    Raises:
        OutputError: when something took it away.
    """
    gone = OutputError(
        f"{path}: something removed {staging.name}, where it was being written; leave hidden files "
        "alone until the run has ended, and run it again"
    )
    try:
        yield
    except Exception as error:
        if held.is_open_as(staging, descriptor):
            raise
        raise gone from error
    if not held.is_open_as(staging, descriptor):
        raise gone


@contextlib.contextmanager
def common_folder(folder: Path) -> Iterator[None]:
    """A folder for several targets, made where it is missing; it goes again if it stays empty.

    Raises:
        OutputError: when it cannot be made.
    """
    with told(folder), _parents(folder.absolute()) as made:
        yield
        _remove_empty(made)


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[list[Path]]:
    """Make a folder and its missing parents; when the block fails, those are removed again.

    Yields:
        What was made, the folder first.

    Raises:
        OutputError: when they cannot be made.
    """
    missing: list[Path] = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    try:
        for path in reversed(missing):
            try:
                calls.make_folder(path)
            except WriteError as error:
                if error.errno != errno.EEXIST or not path.is_dir():
                    raise OutputError(f"{path}: cannot be made ({error.strerror})") from error
        yield missing
    except BaseException:
        _remove_empty(missing)
        raise


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders up to the first that holds something."""
    with held_back(), contextlib.suppress(OSError):
        for path in folders:
            calls.remove_folder(path)


def _put_in_place(staging: Path, target: Target) -> Path | None:
    """Give what was filled the target's name.

    Returns:
        Where the folder is now that it replaced, None for nothing.

    Raises:
        OutputError: when something appeared there that must not be replaced.
    """
    path = target.path.absolute()
    try:
        if isinstance(target, FileTarget) and not target.overwrite:
            calls.rename_new(staging, path)
        else:
            # A folder replaces none but an empty one in this way.
            calls.rename(staging, path)
    except WriteError as error:
        if error.errno not in _TAKEN:
            raise
        if isinstance(target, FileTarget) or not target.overwrite:
            raise OutputError(
                f"{target.path}: appeared while it was being made, and is left as it is; "
                "choose another place, or add --overwrite"
            ) from error
        return _replace(staging, target)
    return None


def _replace(staging: Path, target: FolderTarget) -> Path:
    """Put a folder in the place of another; where that one is now."""
    path = target.path.absolute()
    if not calls.exchange(staging, path):
        return _replace_in_two(staging, path)
    # It may have become something else since it was checked.
    why = "is a link" if staging.is_symlink() else target.refusal(staging)
    if why is not None:
        calls.exchange(staging, path)
        raise OutputError(f"{target.path}: {why}, so it is left as it is")
    return staging


def _replace_in_two(staging: Path, path: Path) -> Path:
    """The same in two steps, each of which the next run can undo."""
    old = held.old_name(path, staging)
    calls.rename(path, old)
    try:
        calls.rename(staging, path)
    except BaseException as error:
        try:
            calls.rename(old, path)
        except WriteError:
            error.add_note(f"what was there before is now {old}; rename it back")
        raise
    return old


def _settle(path: Path, replaced: Path | None) -> None:
    """Bring the new name to the disk."""
    try:
        calls.sync_folder(path.parent)
    except WriteError as error:
        kept = f"; what it replaced is kept as {replaced.name} until then" if replaced else ""
        error.add_note(f"it is in its place, but the disk may lose it; run it again{kept}")
        raise
