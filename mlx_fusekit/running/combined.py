"""Layers that add an update of full size to a base's module, which is computed as it is needed."""

from collections import OrderedDict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_fusekit.adapters.combined import CombinedUpdate
from mlx_fusekit.machine import memory_bytes

#: Share of the machine's memory that updates of full size may take; beyond, they are computed
#: again whenever their layer runs.
_HELD_SHARE = 0.2


class HeldDeltas:
    """Updates of full size that were computed, the last used ones, as far as memory is for them.

    Args:
        dtype: of the arrays.
        nbytes: how large all of them may be together.
    """

    def __init__(self, dtype: mx.Dtype, nbytes: int | None = None) -> None:
        self._dtype = dtype
        self._room = int(_HELD_SHARE * memory_bytes()) if nbytes is None else nbytes
        self._held: OrderedDict[CombinedUpdate, mx.array] = OrderedDict()

    def of(self, update: CombinedUpdate) -> mx.array:
        """``[rows, columns]``, of experts ``[experts, rows, columns]``."""
        if update in self._held:
            self._held.move_to_end(update)
            return self._held[update]
        array = self._computed(update)
        if array.nbytes <= self._room:
            self._held[update] = array
            while sum(held.nbytes for held in self._held.values()) > self._room:
                self._held.popitem(last=False)
        return array

    def holds(self, update: CombinedUpdate) -> bool:
        """Whether an update stays in memory."""
        return update in self._held

    def _computed(self, update: CombinedUpdate) -> mx.array:
        experts, rows, columns = update.shape
        values = np.empty((experts, rows, columns), np.float32)
        for expert in range(experts):
            for first, last in update.blocks(expert):
                values[expert, first:last] = update.delta(expert, first, last)
        array = mx.array(values if experts > 1 else values[0]).astype(self._dtype)
        mx.eval(array)
        return array


class _CombinedLayer(nn.Module):  # type: ignore[misc]
    """A base's module beside an update of full size."""

    def __init__(self, bare: nn.Module, update: CombinedUpdate, deltas: HeldDeltas) -> None:
        super().__init__()
        self.bare = bare
        self._update, self._deltas = update, deltas

    def _delta(self) -> mx.array:
        return self._deltas.of(self._update)

    def _sum(self, of_base: mx.array, added: mx.array) -> mx.array:
        result = of_base + added.astype(of_base.dtype)
        if not self._deltas.holds(self._update):
            mx.eval(result)  # so that the next layer's update finds this one's memory free
        return result


class CombinedLinear(_CombinedLayer):
    """Of a linear."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._sum(self.bare(x), x @ self._delta().T)


class CombinedEmbedding(_CombinedLayer):
    """Of an embedding, which may be the head too."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._sum(self.bare(x), self._delta()[x])

    def as_linear(self, x: mx.array) -> mx.array:
        """The module as a head."""
        return self._sum(self.bare.as_linear(x), x @ self._delta().T)


class CombinedSwitchLinear(_CombinedLayer):
    """Of stacked experts."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        added = mx.gather_mm(
            x,
            self._delta().swapaxes(-1, -2),
            rhs_indices=indices,
            sorted_indices=sorted_indices,
        )
        return self._sum(self.bare(x, indices, sorted_indices=sorted_indices), added)


def combined_layer(bare: nn.Module, update: CombinedUpdate, deltas: HeldDeltas) -> Any:
    """The layer around a module; None of a kind that has none."""
    if isinstance(bare, SwitchLinear | QuantizedSwitchLinear):
        return CombinedSwitchLinear(bare, update, deltas)
    if isinstance(bare, nn.Embedding | nn.QuantizedEmbedding):
        return CombinedEmbedding(bare, update, deltas)
    if isinstance(bare, nn.Linear | nn.QuantizedLinear):
        return CombinedLinear(bare, update, deltas)
    return None
