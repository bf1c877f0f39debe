"""Whole weights of quantized modules as LoRA of full rank, which mlx-lm can run."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.updates import Adapter, FullUpdate
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.converting.files import values_of
from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import to_matrix
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.blocks import WeightReader, weight_sources


@dataclass(frozen=True)
class LowRankForm:
    """An adapter whose weights are all of two matrices.

    Attributes:
        updates: by module path.
        parameters: what is no matrix and was saved as a whole, by tensor name.
        notes: what the user should know, one line each.
    """

    updates: Mapping[str, LowRankUpdate]
    parameters: Mapping[str, FullUpdate]
    notes: tuple[str, ...]


def as_low_rank(adapter: Adapter, base: BaseModel, scale: float) -> LowRankForm:
    """An adapter with its whole matrices as LoRA of full rank.

    Args:
        adapter: its updates without the scale.
        base: what it was bound to.
        scale: that the matrices will be multiplied with.
    """
    matrices = {
        name.removesuffix(".weight"): update
        for name, update in adapter.parameters.items()
        if name.endswith(".weight") and len(update.tensor.shape) == 2
    }
    others = {
        n: u for n, u in adapter.parameters.items() if n.removesuffix(".weight") not in matrices
    }
    updates: dict[str, LowRankUpdate] = {}
    whole = []
    for module, update in {**adapter.weights, **matrices}.items():
        if isinstance(update, FullUpdate):
            updates[module] = _difference(module, update, base, scale)
            whole.append(module)
        else:
            assert isinstance(update, LowRankUpdate), "combined updates were factored before"
            updates[module] = update
    if not whole:
        return LowRankForm(updates, others, ())
    note = (
        f"{', '.join(whole)}: saved as a whole, which a LoRA of mlx-lm does not hold; "
        f"written as LoRA of rank {max(updates[module].rank for module in whole)}, which is the "
        "same update, and mlx-lm has one rank for all modules; --rank writes a smaller adapter "
        "that is nearly the same"
    )
    return LowRankForm(updates, others, (note,))


def base_matrix(base: BaseModel, module: str, expert: int, columns: int) -> Float32:
    """One matrix of a base, float32 ``[rows, columns]``, exact."""
    spec = base.quantization(module, columns)
    reader = WeightReader.open(weight_sources(base, module, spec), spec)
    block = reader.read(RowRange(expert, 0, reader.shape[1]))[1]
    return to_matrix(block.values)


def _difference(module: str, update: FullUpdate, base: BaseModel, scale: float) -> LowRankUpdate:
    """A new value less the base's, as the product of one matrix and the identity."""
    new = values_of(update.tensor)
    stacked = new.reshape(-1, *new.shape[-2:])
    experts, rows, columns = stacked.shape
    deltas = np.stack(
        [
            (stacked[expert] - base_matrix(base, module, expert, columns)) / np.float32(scale or 1)
            for expert in range(experts)
        ]
    )
    size = min(rows, columns)
    same = np.broadcast_to(np.eye(size, dtype=np.float32), (experts, size, size))
    return LowRankUpdate(deltas, same) if columns <= rows else LowRankUpdate(same, deltas)
