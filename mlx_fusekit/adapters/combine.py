"""Several adapters at once: the weighted sum of their updates."""

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np

from mlx_fusekit.adapters.updates import Adapter, LowRankUpdate, Update
from mlx_fusekit.errors import AdapterError


def combine(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The adapter whose update of each module is the weighted sum of the given ones'.

    LoRA updates add up exactly, as one of the ranks' sum. DoRA and full fine-tunes replace what
    they change, so they can only be merged alone.

    Args:
        adapters: each with its weight; one with weight 1 is returned as it is.

    Raises:
        AdapterError: when an adapter cannot be added up or scaled.
    """
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        return adapters[0][0]
    updates: dict[str, Update] = {}
    for adapter, weight in adapters:
        if adapter.kind != "lora":
            raise AdapterError(
                f"--adapter-path: a {adapter.kind} adapter cannot be weighted or added to others; "
                "fuse it alone, then fuse the next into the result"
            )
        for module, update in adapter.weights.items():
            if adapter.parameters or not isinstance(update, LowRankUpdate):
                whole = next(iter(adapter.parameters), module)
                raise AdapterError(
                    f"--adapter-path: an adapter with {whole} saved as a whole cannot be weighted "
                    "or added to others; fuse it alone, then fuse the next into the result"
                )
            updates[module] = _add(updates.get(module), update, weight)
    warnings = tuple(dict.fromkeys(w for adapter, _ in adapters for w in adapter.warnings))
    return Adapter("lora", MappingProxyType(updates), MappingProxyType({}), warnings)


def _add(sum_so_far: Update | None, update: LowRankUpdate, weight: float) -> LowRankUpdate:
    up = update.up * np.float32(weight)
    if sum_so_far is None:
        return LowRankUpdate(up, update.down)
    assert isinstance(sum_so_far, LowRankUpdate)
    return LowRankUpdate(
        np.concatenate([sum_so_far.up, up], axis=2),
        np.concatenate([sum_so_far.down, update.down], axis=1),
    )
