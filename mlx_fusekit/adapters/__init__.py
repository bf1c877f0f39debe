"""Reading adapters into one form, whatever format they came in."""

from mlx_fusekit.adapters.mlx_lm import AdapterFolder
from mlx_fusekit.adapters.updates import Adapter, FullUpdate, LowRankUpdate, Update

__all__ = ["Adapter", "AdapterFolder", "FullUpdate", "LowRankUpdate", "Update"]
