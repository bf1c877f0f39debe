"""Which GGUF type a tensor gets, and what that costs."""

from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.gguf.file.blocks import FLOAT_TYPES, block_type
from mlx_fusekit.gguf.file.scales import ScaleFacts


@dataclass(frozen=True, slots=True)
class TensorEncoding:
    """How one tensor is written.

    Attributes:
        name: in the GGUF file.
        ggml_type: of its bytes.
        shape: logical, slowest dimension first.
        exact: whether every value is the float32 value that MLX dequantizes, up to the sign of a
            zero. Before writing, False where only the values themselves can tell.
        rel_rmse: root mean square error relative to that of the values; None before writing.
        max_abs_error: None before writing.
    """

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    exact: bool
    rel_rmse: float | None = None
    max_abs_error: float | None = None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape in bytes, slowest dimension first."""
        block, size = gguf.GGML_QUANT_SIZES[self.ggml_type]
        return (*self.shape[:-1], self.shape[-1] // block * size)

    @property
    def nbytes(self) -> int:
        """Size of its bytes in the file."""
        return int(np.prod(self.byte_shape, dtype=np.int64))


def choose_type(
    spec: QuantSpec, facts: ScaleFacts, columns: int, outtype: str
) -> tuple[GgmlType, bool]:
    """The type of a quantized weight, and whether it is known to hold the values exactly.

    Args:
        facts: of its scales and biases.
        columns: length of a row of the tensor.
        outtype: one of :data:`~mlx_fusekit.gguf.outtypes.OUTTYPES`.
    """
    if outtype == "auto":
        chosen = _closest_type(spec, facts, columns)
    elif outtype == "lossless":
        chosen = _exact_type(spec, facts, columns)
    else:
        chosen = choose_converted(columns, outtype)
    return chosen, _holds_exactly(chosen, spec, facts)


def choose_converted(columns: int, outtype: str) -> GgmlType:
    """The type that an outtype other than ``auto`` and ``lossless`` stands for.

    As in llama.cpp, rows that are no multiple of a block long become F16.
    """
    ggml_type = GgmlType[outtype.upper()]
    return ggml_type if _whole_blocks(ggml_type, columns) else GgmlType.F16


def _closest_type(spec: QuantSpec, facts: ScaleFacts, columns: int) -> GgmlType:
    own = block_type(spec)
    if _whole_blocks(own, columns):
        if facts.exact or own == GgmlType.BF16:
            return own
        if own in (GgmlType.Q4_1, GgmlType.Q5_1) and facts.suits_rounding:
            return own
        if own == GgmlType.Q8_0 and facts.suits_float16:
            return own
    return GgmlType.F16 if facts.suits_float16 else GgmlType.F32


def _exact_type(spec: QuantSpec, facts: ScaleFacts, columns: int) -> GgmlType:
    own = block_type(spec)
    if facts.exact and _whole_blocks(own, columns):
        return own
    return GgmlType.F16 if _holds_exactly(GgmlType.F16, spec, facts) else GgmlType.F32


def _holds_exactly(ggml_type: GgmlType, spec: QuantSpec, facts: ScaleFacts) -> bool:
    if ggml_type == GgmlType.F32:
        return True
    if not facts.exact:
        return False
    # The product of a nvfp4 scale and code has 6 bits and a small exponent.
    return ggml_type == block_type(spec) or (spec.mode == "nvfp4" and ggml_type in FLOAT_TYPES)


def _whole_blocks(ggml_type: GgmlType, columns: int) -> bool:
    return columns % int(gguf.GGML_QUANT_SIZES[ggml_type][0]) == 0
