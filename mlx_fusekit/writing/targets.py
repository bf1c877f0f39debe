"""Where an output may be written: what is refused before any work, and once more at its end."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_fusekit.errors import OutputError


@dataclass(frozen=True)
class FileTarget:
    """A file to be made.

    Attributes:
        path: of it.
        flag: the option that named it.
        overwrite: whether an existing file may be replaced.
        refusal: says of an existing file why it may not be, None where it may.
        suffix: that a new file's name must have; another may be that of a file a model has.
        sources: folders that are read.
    """

    path: Path
    flag: str
    overwrite: bool = False
    refusal: Callable[[Path], str | None] = lambda _: None
    suffix: str = ""
    sources: tuple[Path, ...] = ()

    def check(self) -> None:
        """Refuse what must not be written to.

        Raises:
            OutputError: with the cure.
        """
        path, flag = self.path, self.flag
        mode = _check_place(path, "file", flag)
        for source in self.sources:
            if path.resolve().is_relative_to(source.resolve()):
                raise OutputError(f"{path}: lies in what is read ({source}); choose another {flag}")
        if mode is None:
            if not path.name.endswith(self.suffix):
                raise OutputError(f"{path}: its name must end in {self.suffix}; change {flag}")
            return
        if stat.S_ISDIR(mode):
            raise OutputError(f"{path}: is a folder; give a file name in it as {flag}")
        if not stat.S_ISREG(mode):
            raise OutputError(f"{path}: is a device or pipe, no file; choose another {flag}")
        _check_replaced(self)


@dataclass(frozen=True)
class FolderTarget:
    """A folder to be made; one that is there and empty counts as not there.

    Attributes:
        path: of it.
        flag: the option that named it.
        refusal: says of a folder with something in it why it may not be replaced, None where it
            may.
        overwrite: whether such a folder may be replaced.
        sources: folders that are read.
    """

    path: Path
    flag: str
    refusal: Callable[[Path], str | None]
    overwrite: bool = False
    sources: tuple[Path, ...] = ()

    def check(self) -> None:
        """Refuse what must not be written to.

        Raises:
            OutputError: with the cure.
        """
        path, flag = self.path, self.flag
        mode = _check_place(path, "folder", flag)
        real = path.resolve()
        if mode is not None and real.is_mount():
            raise OutputError(
                f"{path}: is a mount point, which cannot be replaced; name a folder in it as {flag}"
            )
        if _current_folder().is_relative_to(real):
            raise OutputError(
                f"{path}: is the current folder, or holds it; name a folder in it as {flag}"
            )
        for source in (source.resolve() for source in self.sources):
            if source.is_relative_to(real) or real.is_relative_to(source):
                raise OutputError(
                    f"{path}: is or holds what is read ({source}); choose another {flag}"
                )
        if mode is None:
            return
        if not stat.S_ISDIR(mode):
            raise OutputError(f"{path}: is a file; choose another {flag}")
        if _has_content(path, flag):
            _check_replaced(self)


def in_hub_cache(path: Path) -> bool:
    """Whether a resolved path lies in huggingface_hub's cache, which is not ours to write to."""
    return any(part.startswith(("models--", "datasets--")) for part in path.parts)


def _check_place(path: Path, what: str, flag: str) -> int | None:
    """What files and folders have in common; the mode of what is there, None for nothing."""
    try:
        if path.is_symlink():
            raise OutputError(f"{path}: is a link; give the {what} itself as {flag}")
        real = path.resolve()
        possible = _can_make(real.parent)
        mode = real.stat().st_mode if real.exists() else None
    except OutputError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        why = getattr(error, "strerror", None) or "links that lead in a circle"
        raise OutputError(f"{path}: cannot be used ({why}); choose another {flag}") from error
    if in_hub_cache(real):
        raise OutputError(f"{path}: lies in the Hugging Face cache; choose another {flag}")
    if mode is None and not possible:
        raise OutputError(f"{path.parent}: cannot be made; choose another {flag}")
    if not possible:
        raise OutputError(f"{path.parent}: cannot be written to; choose another {flag}")
    return mode


def _check_replaced(target: FileTarget | FolderTarget) -> None:
    if not target.overwrite:
        raise OutputError(f"{target.path}: exists already; add --overwrite to replace it")
    if (why := target.refusal(target.path)) is not None:
        raise OutputError(
            f"{target.path}: {why}, so --overwrite does not replace it; "
            f"choose another {target.flag}"
        )


def _has_content(folder: Path, flag: str) -> bool:
    try:
        return any(folder.iterdir())
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be looked into ({error.strerror}); choose another {flag}"
        ) from error


def _can_make(folder: Path) -> bool:
    """Whether a folder and its missing parents can be made, and written to."""
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def _current_folder() -> Path:
    try:
        return Path.cwd().resolve()
    except OSError:  # it was removed
        return Path("/nowhere")
