"""Several adapters at once, as one."""

from collections import defaultdict
from collections.abc import Sequence
from types import MappingProxyType

import numpy as np

from mlx_fusekit.adapters.combination import SUM, Combination
from mlx_fusekit.adapters.combined import CombinedUpdate
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.updates import Adapter, Update
from mlx_fusekit.errors import AdapterError


def combine(adapters: Sequence[tuple[Adapter, float]], how: Combination = SUM) -> Adapter:
    """The adapter whose update of each module is made of the given ones'.

    As a weighted sum, LoRA updates add up exactly, as one of the ranks' sum. DoRA and full
    fine-tunes replace what they change, so they can only be merged alone.

    Args:
        adapters: each with its weight; one with weight 1 is returned as it is.
        how: the method.

    Raises:
        AdapterError: when an adapter cannot be combined or scaled.
        ConfigurationError: for a method that takes several adapters, of one.
    """
    how.check_count(len(adapters))
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        return adapters[0][0]
    found: dict[str, list[tuple[int, LowRankUpdate]]] = defaultdict(list)
    for place, (adapter, _) in enumerate(adapters):
        for module, update in _low_rank(adapter).items():
            found[module].append((place, update))
    weights = [weight for _, weight in adapters]
    updates = {module: _combined(module, parts, weights, how) for module, parts in found.items()}
    warnings = tuple(dict.fromkeys(w for adapter, _ in adapters for w in adapter.warnings))
    return Adapter("lora", MappingProxyType(updates), MappingProxyType({}), warnings)


def _low_rank(adapter: Adapter) -> dict[str, LowRankUpdate]:
    """An adapter's updates, where all of them are LoRA."""
    cannot = "cannot be weighted or combined; fuse it alone, then fuse the next into the result"
    if adapter.kind != "lora":
        raise AdapterError(f"--adapter-path: a {adapter.kind} adapter {cannot}")
    low_rank = {m: u for m, u in adapter.weights.items() if isinstance(u, LowRankUpdate)}
    whole = next(iter([*adapter.parameters, *(adapter.weights.keys() - low_rank)]), None)
    if whole is not None:
        raise AdapterError(f"--adapter-path: an adapter with {whole} saved as a whole {cannot}")
    return low_rank


def _combined(
    module: str,
    parts: Sequence[tuple[int, LowRankUpdate]],
    weights: Sequence[float],
    how: Combination,
) -> Update:
    updates = tuple(update for _, update in parts)
    own = tuple(weights[place] for place, _ in parts)
    if not how.is_sum:
        return CombinedUpdate(updates, own, tuple(place for place, _ in parts), how, module)
    ups = [update.up * np.float32(weight) for update, weight in zip(updates, own, strict=True)]
    downs = [update.down for update in updates]
    return LowRankUpdate(np.concatenate(ups, axis=2), np.concatenate(downs, axis=1))
