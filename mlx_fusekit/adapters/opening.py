"""From an adapter's folder to what reads its format."""

import math
from pathlib import Path

from mlx_fusekit.adapters.mlx_lm import MlxLmAdapter
from mlx_fusekit.adapters.updates import AdapterFolder
from mlx_fusekit.errors import ConfigurationError


def open_adapter(folder: Path, *, scale: float | None = None) -> AdapterFolder:
    """Open an adapter's folder and check what can be checked without its base.

    Args:
        folder: the adapter's.
        scale: of its update, taken instead of the recorded one.

    Raises:
        ConfigurationError: for a scale that is no finite number.
        AdapterError: naming the file or tensor that is wrong, and the cure.
    """
    if scale is not None and not math.isfinite(scale):
        raise ConfigurationError(f"--scale {scale:g}: must be a finite number")
    return MlxLmAdapter.open(folder, scale=scale)
