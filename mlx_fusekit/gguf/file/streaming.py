"""One tensor on its way into a GGUF file: rows read, encoded, measured, written."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.floats import Array, Float32
from mlx_fusekit.formats.quantization import dequantize, to_matrix
from mlx_fusekit.gguf.file.blocks import (
    FLOAT_TYPES,
    Bytes,
    block_type,
    decode,
    encode_nearest_q8_0,
    encode_quantized,
    encode_values,
)
from mlx_fusekit.gguf.file.encoding import TensorEncoding
from mlx_fusekit.gguf.file.plan import GgufPlan, PlannedTensor
from mlx_fusekit.gguf.file.rows import TensorRows
from mlx_fusekit.machine import Task
from mlx_fusekit.writing import calls

#: Bits of the exponent; all of them are set in NaN and infinity only.
_EXPONENTS: dict[str, np.unsignedinteger[Any]] = {
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F32": np.uint32(0x7F800000),
}


@dataclass(frozen=True, slots=True)
class _Deviation:
    """How far the written values of some rows are from the true ones."""

    squared_error: float
    squares: float
    largest: float


class TensorJob:
    """Writes one tensor, block by block, and keeps account of its error.

    Args:
        planned: what to write.
        file: descriptor of the file.
        start: offset of the file's first tensor.
    """

    def __init__(self, planned: PlannedTensor, file: int, start: int) -> None:
        self._tensor = planned.tensor
        self._encoding = planned.encoding
        self._file = file
        self._start = start + planned.offset
        self._deviations: dict[int, _Deviation] = {}

    def tasks(self, plan: GgufPlan) -> Iterator[Task]:
        """What is to be done; opens the tensor's rows when the first is asked for."""
        rows = plan.opener.whole(self._tensor)
        if not self._tensor.has_stored_rows:
            yield partial(self._write_whole, rows)
            return
        for first, last in rows.spans(rows.columns):
            yield partial(self._write_rows, rows, first, last)

    def result(self) -> TensorEncoding:
        """The encoding with its error; sums are taken in the order of rows."""
        if self._encoding.exact:
            return replace(self._encoding, rel_rmse=0.0, max_abs_error=0.0)
        parts = [self._deviations[first] for first in sorted(self._deviations)]
        squared_error = math.fsum(part.squared_error for part in parts)
        squares = math.fsum(part.squares for part in parts)
        largest = max((part.largest for part in parts), default=0.0)
        relative = (squared_error / squares) ** 0.5 if squares else 0.0
        return replace(self._encoding, exact=largest == 0, rel_rmse=relative, max_abs_error=largest)

    def _write_whole(self, rows: TensorRows) -> int:
        values = self._tensor.of_rows(rows.values(0, rows.count).reshape(rows.shape))
        return self._write(0, self._encoded(0, values.reshape(-1, values.shape[-1])))

    def _write_rows(self, rows: TensorRows, first: int, last: int) -> int:
        offset = first * (self._encoding.nbytes // rows.count)
        return self._write(offset, self._row_bytes(rows, first, last))

    def _row_bytes(self, rows: TensorRows, first: int, last: int) -> Bytes:
        """Rows in the form in which they are written."""
        ggml_type, spec = self._encoding.ggml_type, rows.spec
        if spec is None:
            if FLOAT_TYPES.get(ggml_type) == rows.sources["weight"].dtype:
                return self._copied(rows.stored("weight", first, last), FLOAT_TYPES[ggml_type])
        elif ggml_type == block_type(spec) and ggml_type not in FLOAT_TYPES:
            return self._repacked(rows, first, last)
        return self._encoded(first, rows.values(first, last))

    def _copied(self, stored: Array, dtype: str) -> Bytes:
        mask = _EXPONENTS[dtype]
        if ((stored.view(mask.dtype) & mask) == mask).any():
            raise self._not_finite()
        data: Bytes = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        return data

    def _repacked(self, rows: TensorRows, first: int, last: int) -> Bytes:
        spec, quantized = rows.spec, rows.quantized(first, last)
        assert spec is not None, "only quantized tensors come here"
        requantized = self._encoding.ggml_type == GgmlType.Q8_0
        if self._encoding.exact and not requantized:
            return encode_quantized(quantized, spec)
        block = dequantize(quantized, spec)
        encode = partial(encode_nearest_q8_0, block) if requantized else encode_quantized
        data = encode(quantized, spec)
        if not self._encoding.exact:
            self._measure(first, to_matrix(block), data)
        return data

    def _encoded(self, first: int, values: Float32) -> Bytes:
        if not np.isfinite(values).all():
            raise self._not_finite()
        data = encode_values(values, self._encoding.ggml_type)
        if not self._encoding.exact:
            self._measure(first, values, data)
        return data

    def _measure(self, first: int, values: Float32, data: Bytes) -> None:
        error = decode(data, self._encoding.ggml_type)
        if not np.isfinite(error).all():
            raise CheckpointError(
                f"{self._tensor.source}: a weight of {np.abs(values).max():g} is too large for "
                f"{self._encoding.ggml_type.name}; use --outtype bf16 or f32"
            )
        error -= values
        self._deviations[first] = _Deviation(
            _sum_of_squares(error),
            _sum_of_squares(values),
            float(np.abs(error).max(initial=0)),
        )

    def _write(self, offset: int, rows: Bytes) -> int:
        calls.write(self._file, rows.reshape(-1).data, self._start + offset)
        return rows.nbytes

    def _not_finite(self) -> CheckpointError:
        return CheckpointError(
            f"{self._tensor.source}: has a value that is NaN or infinite; download the model "
            "again, or fuse it again"
        )


def _sum_of_squares(matrix: Float32) -> float:
    return float(np.einsum("rc,rc->", matrix, matrix, dtype=np.float64))
