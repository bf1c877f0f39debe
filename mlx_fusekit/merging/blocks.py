"""Reading a module's weight block by block, as stored and as float32, whatever its format."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.formats.floats import Array, Float32, to_float32
from mlx_fusekit.formats.quantization import QuantizedRows, dequantize, dequantize_as_stored
from mlx_fusekit.formats.specs import LEAVES, QuantSpec
from mlx_fusekit.merging.arithmetic import BaseBlock, RowRange

#: Elements of a row block, 4 MiB of float32. NumPy lets go of the interpreter lock once a call, and
#: threads that get in each other's way there sleep and wake: with blocks of a core's cache size (a
#: quarter of this) one thread is faster by a fifth, but two are no faster than one.
BLOCK_ELEMENTS = 1 << 20

#: The leaves of a weight that have its rows.
ROW_LEAVES = ("weight", "scales", "biases")


class BlockReader(Protocol):
    """Gives a weight's blocks, from several threads."""

    @property
    def global_scales(self) -> Float32 | None:
        """nvfp4's, one for the matrix or one an expert."""

    def read(self, rows: RowRange) -> tuple[QuantizedRows | None, BaseBlock]:
        """A block as stored (when quantized), and its values, which others may be given too."""


@dataclass(frozen=True)
class WeightReader:
    """One module's weight, readable in blocks from several threads.

    Attributes:
        sources: the stored tensors by leaf name ("weight", "scales", "biases", "global_scale").
        spec: how it is quantized, None for a dense weight.
        shape: logical (experts, rows, columns).
        global_scales: nvfp4's, one for the matrix or one an expert.
    """

    sources: Mapping[str, TensorSource]
    spec: QuantSpec | None
    shape: tuple[int, int, int]
    global_scales: Float32 | None = None

    @classmethod
    def open(cls, sources: Mapping[str, TensorSource], spec: QuantSpec | None) -> "WeightReader":
        """Make the tensors readable; those that mlx-lm computes are computed here."""
        held = {leaf: source.held() for leaf, source in sources.items()}
        scales = None
        if "global_scale" in held:
            scales = held["global_scale"].read_rows(0, 1).reshape(-1).astype(np.float32)
        return cls(held, spec, logical_shape(sources["weight"], spec), scales)

    def read(self, rows: RowRange) -> tuple[QuantizedRows | None, BaseBlock]:
        """A block as stored (when quantized), and its values."""
        return self.understood(self.stored(rows), rows)

    def stored(self, rows: RowRange) -> dict[str, Array]:
        """The stored bits of a block, by leaf name, ``[rows, columns]`` each."""
        start = rows.expert * self.shape[1]
        leaves = [leaf for leaf in ROW_LEAVES if leaf in self.sources]
        span = (start + rows.first, start + rows.last)
        return {leaf: self.sources[leaf].read_rows(*span) for leaf in leaves}

    def understood(
        self, stored: Mapping[str, Array], rows: RowRange
    ) -> tuple[QuantizedRows | None, BaseBlock]:
        """What :meth:`read` gives, of bits that were read before."""
        if self.spec is None:
            return None, BaseBlock(to_float32(stored["weight"], self.sources["weight"].dtype)[None])
        quantized = QuantizedRows(
            stored["weight"].view(np.uint32),
            stored["scales"],
            stored["biases"] if self.spec.affine else None,
            self.sources["scales"].dtype,
            of_expert(self.global_scales, rows.expert),
        )
        as_run = partial(dequantize_as_stored, quantized, self.spec)
        return quantized, BaseBlock(dequantize(quantized, self.spec), as_run)


def row_blocks(shape: tuple[int, int, int]) -> Iterator[RowRange]:
    """Row ranges that together are a whole weight; none straddles two experts.

    Args:
        shape: logical (experts, rows, columns).
    """
    experts, rows, columns = shape
    size = min(rows, max(1, BLOCK_ELEMENTS // max(columns, 1)))
    for expert in range(experts):
        for first in range(0, rows, size):
            yield RowRange(expert, first, min(first + size, rows))


def weight_sources(base: BaseModel, module: str, spec: QuantSpec | None) -> dict[str, TensorSource]:
    """The stored tensors of a module's weight, by leaf name."""
    leaves = LEAVES if spec is not None else LEAVES[:1]
    names = {leaf: f"{module}.{leaf}" for leaf in leaves}
    return {leaf: base.tensors[name] for leaf, name in names.items() if name in base.tensors}


def logical_shape(weight: TensorSource, spec: QuantSpec | None) -> tuple[int, int, int]:
    """(experts, rows, columns) of a weight; one that is no stack of experts counts as one."""
    columns = weight.shape[-1] if spec is None else spec.columns(weight.shape[-1])
    return math.prod(weight.shape[:-2]), weight.shape[-2], columns


def of_expert(scales: Float32 | None, expert: int) -> float | None:
    """An expert's global scale; one scale may serve them all."""
    if scales is None:
        return None
    return float(scales[expert if scales.size > 1 else 0])
