"""From an adapter's folder to what reads its format."""

from pathlib import Path

from mlx_fusekit.adapters.mlx_lm import MlxLmAdapter
from mlx_fusekit.adapters.updates import AdapterFolder


def open_adapter(folder: Path, *, scale: float | None = None) -> AdapterFolder:
    """Open an adapter's folder and check what can be checked without its base.

    Args:
        folder: the adapter's.
        scale: of its update, taken instead of the recorded one.

    Raises:
        AdapterError: naming the file or tensor that is wrong, and the cure.
    """
    return MlxLmAdapter.open(folder, scale=scale)
