"""An adapter's updates brought to a lower rank, or from full size to one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from mlx_fusekit.adapters.combined import CombinedUpdate
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.updates import Adapter, Update
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.factoring import Factors, RowBlocks, factor, factor_product
from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.progress import Progress


@dataclass(frozen=True)
class Kept:
    """What a module's lower rank keeps.

    Attributes:
        share: of the energy.
        energy: the sum of squares of its whole update.
    """

    share: float
    energy: float


def truncated(
    adapter: Adapter,
    *,
    rank: int | None,
    energy: float | None,
    progress: Progress | None = None,
) -> tuple[Adapter, dict[str, Kept]]:
    """The best adapter of a rank, or of the smallest ranks that keep a share of the energy.

    Args:
        adapter: with the scale multiplied in, of LoRA or of combined updates.
        rank: of each module, at most.
        energy: share of the squares of each update to keep.
        progress: told of modules done and in all.

    Returns:
        The adapter, and what each module keeps.

    Raises:
        AdapterError: for DoRA, which is no sum.
    """
    found: dict[str, Update] = {}
    kept: dict[str, Kept] = {}
    for place, (module, update) in enumerate(adapter.weights.items()):
        if isinstance(update, LowRankUpdate) and update.magnitude is not None:
            raise AdapterError(
                f"{module}: is DoRA, which scales the base's rows and has no rank to be cut; drop "
                "--rank"
            )
        if isinstance(update, LowRankUpdate | CombinedUpdate):
            parts = [*_factored(update, rank, energy)]
            found[module], kept[module] = stacked(parts)
        else:
            found[module] = update
        if progress is not None:
            progress(place + 1, len(adapter.weights))
    return replace(adapter, weights=MappingProxyType(found)), kept


def overall(kept: Mapping[str, Kept]) -> float | None:
    """Of all modules together."""
    total = sum(one.energy for one in kept.values())
    if not kept:
        return None
    return sum(one.share * one.energy for one in kept.values()) / total if total else 1.0


def stacked(parts: list[Factors]) -> tuple[LowRankUpdate, Kept]:
    """Factors of each expert as one update, and what all of them keep."""
    rank = max(1, *(part.rank for part in parts))
    up = np.zeros((len(parts), parts[0].up.shape[0], rank), np.float32)
    down = np.zeros((len(parts), rank, parts[0].down.shape[1]), np.float32)
    for place, part in enumerate(parts):
        up[place, :, : part.rank], down[place, : part.rank] = part.up, part.down
    total = sum(part.energy for part in parts)
    kept = sum(part.kept * part.energy for part in parts) / total if total else 1.0
    return LowRankUpdate(up, down), Kept(kept, total)


def _factored(
    update: LowRankUpdate | CombinedUpdate, rank: int | None, energy: float | None
) -> Iterator[Factors]:
    if isinstance(update, LowRankUpdate):
        for up, down in zip(update.up, update.down, strict=True):
            yield factor_product(up, down, rank=rank, energy=energy)
        return
    experts, rows, columns = update.shape
    for expert in range(experts):

        def blocks(expert: int = expert) -> Iterator[Float32]:
            for first, last in update.blocks(expert):
                yield update.delta(expert, first, last)

        yield factor(RowBlocks(rows, columns, blocks), rank=rank, energy=energy)
