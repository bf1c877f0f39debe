"""Where a model folder may be written."""

from pathlib import Path

from mlx_fusekit.checkpoint.mlx_lm import is_pattern
from mlx_fusekit.errors import OutputError
from mlx_fusekit.writing.targets import FolderTarget


def model_target(
    path: Path, *, overwrite: bool = False, sources: tuple[Path, ...] = ()
) -> FolderTarget:
    """A model folder to be made, which replaces nothing but another.

    Args:
        path: of the folder.
        overwrite: whether an existing model folder may be replaced.
        sources: folders that are read: the base and the adapters.

    Raises:
        OutputError: for a path that mlx-lm does not find again.
    """
    if is_pattern(path):
        raise OutputError(
            f"{path}: mlx-lm takes the brackets for a pattern and would find no weights there; "
            "choose another --save-path"
        )
    return FolderTarget(path, "--save-path", _refusal, overwrite, sources)


def _refusal(folder: Path) -> str | None:
    found = (folder / "config.json").exists()
    return None if found else "is not empty and no model folder"
