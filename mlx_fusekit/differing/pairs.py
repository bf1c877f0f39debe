"""Two models, module by module, and the difference of their weights by blocks of rows.

What one model stores less finely than the other differs by its rounding. A row of floats that is
the other model's row, rounded to its type, counts as the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.factoring import RowBlocks
from mlx_fusekit.formats.floats import FLOAT_DTYPES, Array, Float32, from_float32, to_float32
from mlx_fusekit.formats.quantization import to_matrix
from mlx_fusekit.formats.specs import SCALE_LEAVES
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.blocks import WeightReader, row_blocks, weight_sources


@dataclass(frozen=True)
class WeightPair:
    """A module's weight in two models.

    Attributes:
        module: its path.
        first: of the one.
        second: of the other, of the same shape.
    """

    module: str
    first: WeightReader
    second: WeightReader

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(experts, rows, columns)``."""
        return self.first.shape

    def difference(self, expert: int) -> RowBlocks:
        """Second less first, of one matrix."""
        _, rows, columns = self.shape
        return RowBlocks(rows, columns, lambda: self._blocks(expert))

    def energy(self) -> float:
        """The sum of the first one's squares."""
        total = 0.0
        for rows in row_blocks(self.shape):
            total += float(np.square(self.first.read(rows)[1].values, dtype=np.float64).sum())
        return total

    def _blocks(self, expert: int) -> Iterator[Float32]:
        for rows in row_blocks(self.shape):
            if rows.expert == expert:
                yield self._change(rows)

    def _change(self, rows: RowRange) -> Float32:
        if self._stored_alike(rows):
            return np.zeros((rows.last - rows.first, self.shape[2]), np.float32)
        before, after = (to_matrix(r.read(rows)[1].values) for r in (self.first, self.second))
        change: Float32 = after - before
        for reader, own, other in ((self.second, after, before), (self.first, before, after)):
            dtype = reader.sources["weight"].dtype
            if reader.spec is None and dtype != "F32":
                same = from_float32(other, dtype) == from_float32(own, dtype)
                change[same.all(axis=1)] = 0
        return change

    def _stored_alike(self, rows: RowRange) -> bool:
        """Whether both have the same bytes."""
        one, other = self.first.sources, self.second.sources
        if self.first.spec != self.second.spec or one.keys() != other.keys():
            return False
        start = rows.expert * self.shape[1]
        span = start + rows.first, start + rows.last
        return all(
            one[leaf].dtype == other[leaf].dtype
            and np.array_equal(_rows(one[leaf], leaf, span), _rows(other[leaf], leaf, span))
            for leaf in one
        )


@dataclass(frozen=True)
class ModelPair:
    """Two models of one shape."""

    first: BaseModel
    second: BaseModel

    def check(self, names: tuple[str, str]) -> None:
        """Refuse models that are not of one shape.

        Args:
            names: of the two, for the message.

        Raises:
            CheckpointError: naming a tensor that only one has, or that is of another shape.
        """
        mine, theirs = (_logical(model) for model in (self.first, self.second))
        for one, other, name, where in (
            (mine, theirs, names[0], names[1]),
            (theirs, mine, names[1], names[0]),
        ):
            if missing := next((tensor for tensor in one if tensor not in other), None):
                raise CheckpointError(
                    f"{where}: has no {missing}, which {name} has; give two models of one shape, "
                    "such as a base and what was fine-tuned from it"
                )
        for tensor, shape in mine.items():
            if shape != theirs[tensor]:
                raise CheckpointError(
                    f"{names[1]}: {tensor} is {list(theirs[tensor])}, and {list(shape)} in "
                    f"{names[0]}; give two models of one shape"
                )

    def weights(self) -> Iterator[WeightPair]:
        """All that are matrices, in the order of the first one's files."""
        for name in _logical(self.first):
            module = name.removesuffix(".weight")
            if name != module and len(self.first.tensors[name].shape) > 1:
                yield WeightPair(module, _reader(self.first, module), _reader(self.second, module))

    def changed_parameters(self) -> Iterator[str]:
        """Names of all others that differ by more than the rounding to one model's type."""
        for name in _logical(self.first):
            one, other = self.first.tensors[name], self.second.tensors[name]
            if name.endswith(".weight") and len(one.shape) > 1:
                continue
            if not _alike(one, other):
                yield name


def _logical(model: BaseModel) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors as they are unquantized."""
    found = {}
    for name, tensor in model.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in SCALE_LEAVES and f"{module}.scales" in model.tensors:
            continue
        if leaf == "weight" and len(tensor.shape) > 1:
            spec = model.quantization(module)
            columns = tensor.shape[-1] if spec is None else spec.columns(tensor.shape[-1])
            found[name] = (*tensor.shape[:-1], columns)
        else:
            found[name] = tensor.shape
    return found


def _reader(model: BaseModel, module: str) -> WeightReader:
    spec = model.quantization(module)
    return WeightReader.open(weight_sources(model, module, spec), spec)


def _rows(source: TensorSource, leaf: str, span: tuple[int, int]) -> Array:
    return source.read_rows(0, 1) if leaf == "global_scale" else source.read_rows(*span)


def _alike(one: TensorSource, other: TensorSource) -> bool:
    rows = int(np.prod(one.shape[:-1])) if one.shape else 1
    a, b = (tensor.held().read_rows(0, rows) for tensor in (one, other))
    if one.dtype == other.dtype:
        return np.array_equal(a, b)
    if one.dtype not in FLOAT_DTYPES or other.dtype not in FLOAT_DTYPES:
        return False
    before, after = to_float32(a, one.dtype), to_float32(b, other.dtype)
    return any(
        np.array_equal(from_float32(before, dtype), from_float32(after, dtype))
        for dtype in (one.dtype, other.dtype)
    )
