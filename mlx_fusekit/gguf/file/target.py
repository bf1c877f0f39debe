"""Where a GGUF file may be written."""

from pathlib import Path

from mlx_fusekit.gguf.file.header import MAGIC
from mlx_fusekit.reading import open_file
from mlx_fusekit.writing.targets import FileTarget


def gguf_target(
    path: Path, *, overwrite: bool = False, sources: tuple[Path, ...] = ()
) -> FileTarget:
    """A GGUF file to be made, which replaces nothing but another.

    Args:
        path: of the file.
        overwrite: whether an existing GGUF file may be replaced.
        sources: folders that are read.
    """
    return FileTarget(path, "--gguf-path", overwrite, _refusal, ".gguf", sources)


def _refusal(path: Path) -> str | None:
    with open_file(path) as file:
        return None if file.read(len(MAGIC)) == MAGIC else "is no GGUF file"
