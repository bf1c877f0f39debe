"""The one way in which files from outside are opened: regular ones only, and of bounded size.

A pipe, a socket or a device in a file's place would be waited for, or read, without end; a link out
of a model's folder would bring a file of the user's into what is made, and published.
"""

import errno
import io
import os
import stat
from pathlib import Path

from mlx_fusekit.errors import CheckpointError

#: What may lie in a file's place, in words.
_NO_FILES = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


def open_descriptor(path: Path) -> int:
    """Open a regular file to be read, and wait for nothing.

    Raises:
        OSError: whose ``strerror`` also says what there is in the place of a file.
    """
    try:
        # First, since opening alone can do something to a device.
        _refuse_no_file(path, path.stat())
        # What has come into its place since does not keep us waiting either.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from error
    try:
        _refuse_no_file(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_file(path: Path) -> io.FileIO:
    """The same as an object without a buffer.

    Raises:
        OSError: as :func:`open_descriptor`.
    """
    return open(open_descriptor(path), "rb", buffering=0)


def read_bytes(path: Path, largest: int) -> bytes:
    """All of a file.

    Args:
        path: of the file.
        largest: how many bytes it may have.

    Raises:
        OSError: as :func:`open_descriptor`; also when it is larger, or grows while it is read, as
            what the system makes up does.
    """
    with open(open_descriptor(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise OSError(errno.EFBIG, f"too large: {size} bytes", str(path))
        content = file.read(size + 1)
    if len(content) > size:
        raise OSError(errno.EINVAL, "is no file of a disk, or is being written", str(path))
    return content


def not_regular(path: Path) -> str | None:
    """What lies in a file's place; None for a file, or what cannot be looked at."""
    try:
        return _NO_FILES.get(stat.S_IFMT(path.stat().st_mode))
    except (OSError, ValueError):
        return None


def exists(path: Path) -> bool:
    """Whether something is there, where its links lead; a name that no file can have is nothing.

    As pathlib says it from Python 3.14 on; before, it raises for some names, and for links to them.
    """
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Whether a file is there; as :func:`exists`."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether a folder is there; as :func:`exists`."""
    return os.path.isdir(path)  # noqa: PTH112


def resolve_inside(folder: Path, name: str) -> Path:
    """The real path of a file of a folder; a link may only lead to the folder or its Hub blobs.

    A snapshot in huggingface_hub's cache is a folder of links to ``../../blobs``. Any other link
    out of the folder could make us copy, and a later upload publish, a file that is not the
    model's.

    Raises:
        CheckpointError: when the link leads elsewhere, or cannot be followed.
    """
    path = folder / name
    try:
        real, within = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: Python before 3.13, of a circle
        why = getattr(error, "strerror", None) or "it leads in a circle"
        raise CheckpointError(
            f"{path}: a link that cannot be followed ({why}); put the file itself there"
        ) from error
    allowed = [within]
    if within.parent.name == "snapshots":
        allowed.append(within.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path}: a link that leads out of the model's folder; put the file itself there"
        )
    return real


def _refuse_no_file(path: Path, found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        what = _NO_FILES.get(kind, "is no file")
        raise OSError(errno.EINVAL, f"{what}, where a file is expected", str(path))
