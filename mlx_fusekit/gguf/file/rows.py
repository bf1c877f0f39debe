"""Rows of a tensor of a GGUF file, read from the stored tensors it is made from."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.checkpoint.sanitized import ArrayTensor
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.floats import FLOAT_DTYPES, Array, Float32, to_float32
from mlx_fusekit.formats.quantization import PLANES, QuantizedRows, dequantize, to_matrix
from mlx_fusekit.formats.specs import LEAVES, QuantSpec
from mlx_fusekit.gguf.models.tensors import GgufTensor
from mlx_fusekit.merging.blocks import BLOCK_ELEMENTS, of_expert


@dataclass(frozen=True)
class TensorRows:
    """The rows that one tensor of the file takes, in its order; readable from several threads.

    Attributes:
        sources: the stored tensors by leaf name ("weight", "scales", ...); a tensor that is no
            weight of a module counts as "weight" too.
        spec: how it is quantized, None for floats.
        source_shape: logical, of the whole stored tensor.
        picked: which of the stored rows, and in which order; None for all as they are.
        global_scales: nvfp4's, one for the matrix or one an expert.
    """

    sources: Mapping[str, TensorSource]
    spec: QuantSpec | None
    source_shape: tuple[int, ...]
    picked: npt.NDArray[np.int64] | None = None
    global_scales: Float32 | None = None

    @property
    def columns(self) -> int:
        """Logical columns of a row."""
        return self.source_shape[-1] if self.source_shape else 1

    @property
    def count(self) -> int:
        """Number of rows; all axes but the last count as rows."""
        return math.prod(self.source_shape[:-1]) if self.picked is None else len(self.picked)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the rows together."""
        return self.source_shape if self.picked is None else (self.count, self.columns)

    def spans(self, per_row: int) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) row of blocks in which ``per_row`` elements a row fit."""
        size = max(1, BLOCK_ELEMENTS // max(per_row, 1))
        for first in range(0, self.count, size):
            yield first, min(first + size, self.count)

    def held(self) -> "TensorRows":
        """The same rows with everything at hand."""
        return replace(self, sources={leaf: s.held() for leaf, s in self.sources.items()})

    def stored(self, leaf: str, first: int, last: int) -> Array:
        """Rows of one stored tensor, as its bits."""
        source = self.sources[leaf]
        if self.picked is None:
            return source.read_rows(first, last)
        return _read_picked(source, self.picked[first:last])

    def quantized(self, first: int, last: int) -> QuantizedRows:
        """Quantized rows as stored, without nvfp4's global scales, which may differ by row."""
        return QuantizedRows(
            self.stored("weight", first, last).view(np.uint32),
            self.stored("scales", first, last),
            self.stored("biases", first, last) if "biases" in self.sources else None,
            self.sources["scales"].dtype,
        )

    def values(self, first: int, last: int) -> Float32:
        """Exact float32 values ``[rows, columns]``."""
        if self.spec is None:
            return to_float32(self.stored("weight", first, last), self.sources["weight"].dtype)
        quantized = self.quantized(first, last)
        if self.global_scales is None:
            return to_matrix(dequantize(quantized, self.spec))
        values = np.empty((last - first, self.columns), np.float32)
        experts = self._experts(first, last)
        for expert in np.unique(experts):
            chosen = experts == expert
            of_one = replace(
                quantized,
                codes=quantized.codes[chosen],
                scales=quantized.scales[chosen],
                global_scale=of_expert(self.global_scales, int(expert)),
            )
            values[chosen] = to_matrix(dequantize(of_one, self.spec))
        return values

    def _experts(self, first: int, last: int) -> npt.NDArray[np.int64]:
        stored_rows = np.arange(first, last) if self.picked is None else self.picked[first:last]
        return stored_rows // self.source_shape[-2]


class RowOpener:
    """Opens the rows of the file's tensors.

    What mlx-lm computes for them is computed when it is opened, and held as long as the rows are.

    Args:
        base: the model that is exported.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    def spec(self, tensor: GgufTensor) -> QuantSpec | None:
        """How the source of a tensor is quantized, or None."""
        module, _, leaf = tensor.source.rpartition(".")
        return self._base.quantization(module) if leaf == "weight" else None

    def scales(self, tensor: GgufTensor) -> TensorRows:
        """Rows of which scales and biases are at hand; codes may have to be computed.

        Raises:
            CheckpointError: when the source is missing, has too few rows, or is of a kind that
                cannot be exported.
        """
        if tensor.values is not None:
            return _generated(tensor)
        names = self._names(tensor)
        weight = self._base.tensors[names["weight"]]
        held = {leaf: self._base.tensors[n].held() for leaf, n in names.items() if leaf != "weight"}
        return self._rows(tensor, {**held, "weight": weight})

    def whole(self, tensor: GgufTensor) -> TensorRows:
        """Rows of which everything is at hand."""
        if tensor.values is not None:
            return _generated(tensor)
        names = self._names(tensor)
        held = {leaf: self._base.tensors[name].held() for leaf, name in names.items()}
        return self._rows(tensor, held)

    def _names(self, tensor: GgufTensor) -> dict[str, str]:
        """Names of the stored tensors a tensor is made from, by leaf."""
        if tensor.values is not None:
            return {}
        if tensor.source not in self._base.tensors:
            raise CheckpointError(
                f"{self._base.folder}: has no tensor {tensor.source}, which {tensor.name} is made "
                "from; its weights do not belong to its config.json"
            )
        if self.spec(tensor) is None:
            return {"weight": tensor.source}
        module = tensor.source.removesuffix(".weight")
        names = {leaf: f"{module}.{leaf}" for leaf in LEAVES}
        return {leaf: name for leaf, name in names.items() if name in self._base.tensors}

    def _rows(self, tensor: GgufTensor, sources: Mapping[str, TensorSource]) -> TensorRows:
        spec, weight = self.spec(tensor), sources["weight"]
        shape = weight.shape
        if spec is not None:
            shape = (*shape[:-1], spec.columns(shape[-1]))
            if shape[-1] % PLANES:
                raise CheckpointError(
                    f"{self._base.folder}: {tensor.source} has {shape[-1]} columns; quantized "
                    f"weights are exported in multiples of {PLANES} columns"
                )
        elif weight.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self._base.folder}: {tensor.source} is stored as {weight.dtype}; only "
                f"{', '.join(FLOAT_DTYPES)} and MLX's quantized weights can be exported"
            )
        if tensor.rows is not None and not _inside(tensor.rows, math.prod(shape[:-1])):
            raise CheckpointError(
                f"{self._base.folder}: {tensor.source} has {math.prod(shape[:-1])} rows, too few "
                f"for {tensor.name}; its weights do not belong to its config.json"
            )
        global_scales = None
        if "global_scale" in sources:
            stored = sources["global_scale"]
            rows = math.prod(stored.shape[:-1])
            global_scales = stored.read_rows(0, rows).reshape(-1).astype(np.float32)
        return TensorRows(sources, spec, shape, tensor.rows, global_scales)


def _inside(picked: npt.NDArray[np.int64], count: int) -> bool:
    return bool(((picked >= 0) & (picked < count)).all())


def _generated(tensor: GgufTensor) -> TensorRows:
    """Rows of a tensor that is not stored."""
    assert tensor.values is not None, "only such tensors come here"
    source = ArrayTensor(tensor.name, "F32", tensor.shape, tensor.values)
    return TensorRows({"weight": source}, None, tensor.shape)


def _read_picked(source: TensorSource, picked: npt.NDArray[np.int64]) -> Array:
    """Rows of a tensor in any order; those that follow each other in the file are read at once."""
    order = np.argsort(picked, kind="stable")
    ascending = picked[order]
    ends = np.flatnonzero(np.diff(ascending) > 1) + 1
    out: Array | None = None
    for run in np.split(np.arange(len(picked)), ends):
        first, last = int(ascending[run[0]]), int(ascending[run[-1]]) + 1
        rows = source.read_rows(first, last)
        if out is None:
            out = np.empty((len(picked), rows.shape[1]), rows.dtype)
        out[order[run]] = rows[ascending[run] - first]
    assert out is not None, "a block has at least one row"
    return out
