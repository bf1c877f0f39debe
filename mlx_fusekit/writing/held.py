"""Files and folders under hidden names, each held under a lock by the process that fills it."""

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mlx_fusekit.signals import held_back
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.files import remove

#: Of what is being filled, or is rubbish: where nobody holds it, it may go.
_NEW = "fusekit-new-"
#: Of a folder that is being replaced; behind it the inode of the one that comes in its place.
_OLD = "fusekit-old-"
_TEMPORARY = re.compile(r"\.mlx-fusekit-tmp-[0-9a-f]{16}")
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


@contextlib.contextmanager
def hold(target: Path, *, folder: bool) -> Iterator[tuple[Path, int]]:
    """Make an empty folder or file beside a target; what the block leaves of it is removed.

    Args:
        target: absolute.

    Yields:
        Its hidden path, and a descriptor of it.
    """
    with held_back():
        path, descriptor = _make(lambda: _new_name(target), folder=folder)
    try:
        yield path, descriptor
    except BaseException as error:
        # What lies there by now may be what the target was.
        with held_back():
            if is_open_as(path, descriptor):
                try:
                    remove(path)
                except OSError:
                    error.add_note(f"what was written is left in {path}; remove it")
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A private folder that is removed at the end; so is what killed runs of this user left."""
    place = Path(tempfile.gettempdir())
    _remove_free(path for path in _listed(place) if _TEMPORARY.fullmatch(path.name))
    path, descriptor = _make(
        lambda: place / f".mlx-fusekit-tmp-{secrets.token_hex(8)}", folder=True, mode=0o700
    )
    try:
        yield path
    finally:
        with held_back():
            with contextlib.suppress(OSError):
                remove(path)
            os.close(descriptor)


def put_in_order(target: Path) -> None:
    """Remove what killed runs left of a target, and bring back what was being replaced.

    Args:
        target: absolute.
    """
    if not _remove_free(_hidden(target, rf"{_NEW}[0-9a-f]{{8}}")):
        return  # a run that lives may be about to put its folder in place
    for old in _hidden(target, rf"{_OLD}[0-9a-f]+"):
        # The disk may not allow it; the old folder is then left for the user.
        with contextlib.suppress(calls.WriteError):
            if not os.path.lexists(target):
                calls.rename(old, target)
            elif old.name == old_name(target, target).name:
                discard(target, old)


def discard(target: Path, replaced: Path) -> None:
    """Remove what a target has replaced; when that fails, the next run does."""
    with contextlib.suppress(OSError):
        if _OLD in replaced.name:
            # So that a part of it is never taken for the whole.
            rubbish = _new_name(target)
            calls.rename(replaced, rubbish)
            replaced = rubbish
        remove(replaced)


def old_name(target: Path, new: Path) -> Path:
    """Where a folder goes while another takes its place, known by its inode."""
    return target.parent / f".{target.name}.{_OLD}{new.stat().st_ino:x}"


def is_open_as(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to what was opened."""
    try:
        found, opened = path.lstat(), os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


def _make(name: Callable[[], Path], *, folder: bool, mode: int = 0o777) -> tuple[Path, int]:
    while True:
        path = name()
        if folder:
            calls.make_folder(path, mode)
            descriptor = os.open(path, _LOOK | os.O_DIRECTORY)
        else:
            descriptor = calls.create(path)
        try:
            calls.lock(descriptor, wait=True)
        except BaseException:
            os.close(descriptor)
            remove(path)
            raise
        # Between the two lines another run may have taken it for a killed one's.
        if is_open_as(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def _remove_free(paths: Iterable[Path]) -> bool:
    """Remove what nobody holds; whether all of it went."""
    all_gone = True
    for path in paths:
        try:
            descriptor = os.open(path, _LOOK)
        except OSError:
            all_gone = False
            continue
        try:
            own = os.fstat(descriptor).st_uid == os.geteuid()
            if own and calls.lock(descriptor, wait=False):
                remove(path)
            else:
                all_gone = False
        except calls.WriteError:
            all_gone = False
        finally:
            os.close(descriptor)
    return all_gone


def _hidden(target: Path, pattern: str) -> list[Path]:
    """What has a hidden name of a target."""
    name = re.compile(rf"\.{re.escape(target.name)}\.{pattern}")
    return [path for path in _listed(target.parent) if name.fullmatch(path.name)]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _new_name(target: Path) -> Path:
    return target.parent / f".{target.name}.{_NEW}{secrets.token_hex(4)}"
