"""Bits of the stored floating-point types to and from float32.

NumPy has no bfloat16, so 16-bit floats travel as their raw bits (``uint16``) until they are
needed as numbers. Dtype names are those of the safetensors format.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]

#: Safetensors dtype -> NumPy dtype that holds its bits.
STORAGE: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}

#: The types a weight can be merged in and written as.
FLOAT_DTYPES = ("F16", "BF16", "F32")

#: How people and mlx-lm name the floating-point types.
DTYPE_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def to_float32(stored: Array, dtype: str) -> Float32:
    """Exact float32 values of an array of stored floats.

    Args:
        stored: bits as read from a file, in the storage dtype of ``dtype``; any shape.
        dtype: "F16", "BF16" or "F32".
    """
    if dtype == "BF16":
        wide = stored.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return stored.astype(np.float32)


def from_float32(values: Float32, dtype: str) -> Array:
    """Round float32 values to the nearest stored float, ties to even; overflow gives infinity."""
    if dtype == "BF16":
        return _round_to_bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype(STORAGE[dtype])


def _round_to_bfloat16(values: Float32) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Adding half a unit in the last place, plus the bit that decides a tie, and truncating rounds
    # to nearest even. It would turn a NaN with a small payload into infinity, so NaN goes apart.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = 0x7FC0
    return result
