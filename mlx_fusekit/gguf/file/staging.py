"""A target file that exists complete or not at all.

Like :mod:`mlx_fusekit.checkpoint.staging`, for one file: it is written under a hidden name beside
the target, locked by the process that writes it, and renamed at the end. One whose lock is free was
left by a killed run, and the next run for the same target removes it.
"""

import contextlib
import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from mlx_fusekit.checkpoint.staging import can_make, make_parents, sync_folder, undone_on_failure
from mlx_fusekit.checkpoint.writer import sync
from mlx_fusekit.errors import OutputError
from mlx_fusekit.gguf.file.header import MAGIC

_PARTIAL = ".partial-"


def check_gguf_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that must not be written to, before any work.

    Args:
        target: the file to be made.
        overwrite: whether an existing GGUF file may be replaced.

    Raises:
        OutputError: with the cure.
    """
    if target.is_symlink():
        raise OutputError(f"{target}: is a link; give the file itself as --gguf-path")
    real = target.resolve()
    if any(part.startswith(("models--", "datasets--")) for part in real.parts):
        raise OutputError(f"{target}: lies in the Hugging Face cache; choose another --gguf-path")
    if real.is_dir():
        raise OutputError(f"{target}: is a folder; give a file name in it as --gguf-path")
    if not real.parent.is_dir() and not can_make(real.parent):
        raise OutputError(f"{target.parent}: cannot be made; choose another --gguf-path")
    if not real.exists():
        return
    if not overwrite:
        raise OutputError(f"{target}: exists already; add --overwrite to replace it")
    with open(real, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise OutputError(
                f"{target}: is no GGUF file, so --overwrite does not replace it; "
                "choose another --gguf-path"
            )


@contextlib.contextmanager
def staged_file(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty file to fill; renamed to ``target`` when the block ends well, else removed.

    Raises:
        OutputError: when the target must not be written to, or disk or rights do not let it.
    """
    check_gguf_target(target, overwrite=overwrite)
    parent = target.absolute().parent
    made = make_parents(parent)
    _remove_abandoned(target)
    partial = parent / f".{target.name}{_PARTIAL}{secrets.token_hex(4)}"
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise OutputError(f"{parent}: cannot be written to ({error.strerror})") from error
    with undone_on_failure(target, made, lambda: partial.unlink(missing_ok=True)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield partial
            sync(descriptor)
            check_gguf_target(target, overwrite=overwrite)
            partial.replace(target)
            sync_folder(parent)
        finally:
            os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    for partial in target.absolute().parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*"):
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # another run is writing it right now
        finally:
            os.close(descriptor)
        partial.unlink(missing_ok=True)
