"""Where a GGUF file may be written; it exists complete or not at all."""

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from mlx_fusekit.checkpoint.staging import can_make, in_hub_cache, staged_file
from mlx_fusekit.errors import OutputError
from mlx_fusekit.gguf.file.header import MAGIC


def staged_gguf(target: Path, *, overwrite: bool) -> AbstractContextManager[Path]:
    """An empty file to fill; renamed to ``target`` when the block ends well, else removed.

    Raises:
        OutputError: when the target must not be written to, or disk or rights do not let it.
    """
    return staged_file(target, partial(check_gguf_target, target, overwrite=overwrite))


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
    if in_hub_cache(real):
        raise OutputError(f"{target}: lies in the Hugging Face cache; choose another --gguf-path")
    if real.is_dir():
        raise OutputError(f"{target}: is a folder; give a file name in it as --gguf-path")
    if not real.parent.is_dir() and not can_make(real.parent):
        raise OutputError(f"{target.parent}: cannot be made; choose another --gguf-path")
    if not real.exists():
        # Another name may be that of a file that the model gets.
        if target.suffix != ".gguf":
            raise OutputError(f"{target}: a GGUF file's name ends in .gguf; change --gguf-path")
        return
    if not overwrite:
        raise OutputError(f"{target}: exists already; add --overwrite to replace it")
    with open(real, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise OutputError(
                f"{target}: is no GGUF file, so --overwrite does not replace it; "
                "choose another --gguf-path"
            )
