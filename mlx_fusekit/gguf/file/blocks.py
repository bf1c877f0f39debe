"""The bytes of GGUF's block types, made from MLX-quantized rows and from float32 values.

A row of weights is a sequence of blocks of 32 values (NVFP4: 64), each with its own scale. The
types that hold MLX's formats, with the value of code ``c``:

======  ==================================================  =====================
type    bytes of a block                                    value
======  ==================================================  =====================
Q4_1    d, m float16; 32 codes of 4 bits                    ``d * c + m``
Q5_1    d, m float16; 32 high bits; 32 codes of 4 bits      ``d * c + m``
Q8_0    d float16; 32 codes int8                            ``d * c``
MXFP4   d e8m0; 32 codes e2m1                               ``d * e2m1(c)``
NVFP4   4 d e4m3; 4 times 16 codes e2m1                     ``d * e2m1(c)``
======  ==================================================  =====================

Byte j of n 4-bit codes holds code j in its low and code j + n/2 in its high half, where MLX packs
neighbours together. llama.cpp halves the scales of MXFP4 and NVFP4 and doubles the codebook, which
gives the same products; its codebook has no negative zero.
Source: ``ggml-common.h`` and the ``dequantize_row_*`` functions of ``ggml-quants.c``.
"""

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GgmlType

from mlx_fusekit.formats.floats import Array, Float32, from_float32, to_float32
from mlx_fusekit.formats.quantization import QuantizedRows, Words, pack, to_matrix, unpack
from mlx_fusekit.formats.specs import QuantSpec

Bytes = npt.NDArray[np.uint8]
Blocks = npt.NDArray[np.void]

#: Values of a block; NVFP4 keeps two of MLX's periods together.
BLOCK = 32
NVFP4_BLOCK = 64
_NVFP4_GROUP = 16

_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "V16")])
_Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("high", "<u4"), ("codes", "V16")])
_Q8_0 = np.dtype([("d", "<f2"), ("codes", "V32")])
_MXFP4 = np.dtype([("d", "u1"), ("codes", "V16")])
_NVFP4 = np.dtype([("d", "V4"), ("codes", "V32")])

#: Safetensors dtype of the types that have no blocks.
FLOAT_TYPES = {GgmlType.F32: "F32", GgmlType.F16: "F16", GgmlType.BF16: "BF16"}

_WIDER_TYPES = {5: GgmlType.Q5_1, 6: GgmlType.Q8_0, 8: GgmlType.Q8_0}
_CODEBOOK_TYPES = {"mxfp4": GgmlType.MXFP4, "nvfp4": GgmlType.NVFP4, "mxfp8": GgmlType.BF16}

_LARGEST_CODE = 127
#: Standard deviation of what rounding to a grid of step 1 leaves.
_ROUNDING = np.float32(12**-0.5)


def block_type(spec: QuantSpec) -> GgmlType:
    """The type that holds an MLX format's values exactly, or the closest one that there is."""
    if spec.affine:
        return GgmlType.Q4_1 if spec.bits <= 4 else _WIDER_TYPES[spec.bits]
    return _CODEBOOK_TYPES[spec.mode]


def encode_quantized(quantized: QuantizedRows, spec: QuantSpec) -> Bytes:
    """Quantized rows as blocks with the same codes; scales and biases are rounded to float16.

    Args:
        quantized: rows of a format whose :func:`block_type` is Q4_1, Q5_1, MXFP4 or NVFP4, of a
            multiple of 32 columns, of 64 for NVFP4.

    Returns:
        Bytes ``[rows, row bytes]``. Their values are exactly those of
        :func:`~mlx_fusekit.formats.quantization.dequantize` where float16 holds the scales and
        biases, except that MXFP4 and NVFP4 have no negative zero.
    """
    if spec.mode == "mxfp4":
        return _as_bytes(_mxfp4(quantized))
    if spec.mode == "nvfp4":
        return _as_bytes(_nvfp4(quantized))
    return _as_bytes((_q5_1 if spec.bits == 5 else _q4_1)(quantized, spec))


def encode_nearest_q8_0(block: Float32, quantized: QuantizedRows, spec: QuantSpec) -> Bytes:
    """Affine rows of more than 5 bits as Q8_0, which has no bias.

    Where the bias is close to a multiple of the scale, and the block's values lie within 8 bits of
    it, ``value = scale * (code + bias / scale)`` with hardly an error. Else the step is the
    smallest that spans the block. A block takes the one whose error is expected to be smaller; to
    try four steps more for each block made the error only 7 % smaller.

    Args:
        block: the values of ``quantized``.
    """
    scales, biases = (
        np.repeat(to_float32(grid, quantized.scale_dtype), spec.group_size // BLOCK, axis=1)
        for grid in (quantized.scales, quantized.biases)
        if grid is not None
    )
    low, high = block.min(axis=0), block.max(axis=0)
    spanning = _float16_above(np.maximum(high, -low) / np.float32(_LARGEST_CODE))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rounded = scales.astype(np.float16).astype(np.float32)
        ends = np.stack([low / rounded, high / rounded])
        fits = (ends.min(axis=0) > -_LARGEST_CODE - 1.5) & (ends.max(axis=0) < _LARGEST_CODE + 0.5)
        error = np.abs(biases - np.rint(biases / scales) * rounded)
        error += np.abs(scales - rounded) * np.float32((1 << spec.bits) - 1)
        fits &= error <= spanning * _ROUNDING
        steps = np.where(fits, rounded, spanning).astype("<f2")
    return _as_bytes(_q8_0(block, steps))


def encode_values(values: Float32, ggml_type: GgmlType) -> Bytes:
    """Float32 values ``[rows, columns]`` as bytes of F32, F16, BF16 or Q8_0.

    What a type cannot hold becomes infinite.
    """
    if ggml_type in FLOAT_TYPES:
        return _as_bytes(from_float32(values, FLOAT_TYPES[ggml_type]))
    with np.errstate(over="ignore", invalid="ignore"):
        return _as_bytes(gguf.quants.quantize(values, ggml_type))


def decode(data: Bytes, ggml_type: GgmlType) -> Float32:
    """The float32 values that llama.cpp reads from bytes ``[rows, row bytes]``."""
    with np.errstate(over="ignore", invalid="ignore"):
        values: Float32 = gguf.quants.dequantize(data, ggml_type)
    return values


def _q4_1(quantized: QuantizedRows, spec: QuantSpec) -> Blocks:
    codes = quantized.codes
    if spec.bits != 4:
        codes = pack(unpack(codes, spec.bits), 4)
    blocks = _halves_joined(codes, BLOCK)
    return _with_grids(np.empty(blocks.shape[:2], _Q4_1), blocks, quantized, spec)


def _q5_1(quantized: QuantizedRows, spec: QuantSpec) -> Blocks:
    codes = unpack(quantized.codes, spec.bits)
    high = pack(codes >> np.uint32(4), 1)
    codes &= np.uint32(15)
    blocks = _halves_joined(pack(codes, 4), BLOCK)
    out = _with_grids(np.empty(blocks.shape[:2], _Q5_1), blocks, quantized, spec)
    out["high"] = high
    return out


def _mxfp4(quantized: QuantizedRows) -> Blocks:
    blocks = _halves_joined(quantized.codes, BLOCK)
    out = np.empty(blocks.shape[:2], _MXFP4)
    out["d"] = quantized.scales
    out["codes"] = _opaque(blocks)
    return out


def _nvfp4(quantized: QuantizedRows) -> Blocks:
    rows = len(quantized.codes)
    groups = NVFP4_BLOCK // _NVFP4_GROUP
    blocks = _halves_joined(quantized.codes, _NVFP4_GROUP).reshape(rows, -1, NVFP4_BLOCK // 2)
    out = np.empty(blocks.shape[:2], _NVFP4)
    out["d"] = _opaque(np.ascontiguousarray(quantized.scales).reshape(rows, -1, groups))
    out["codes"] = _opaque(blocks)
    return out


def _with_grids(out: Blocks, codes: Bytes, quantized: QuantizedRows, spec: QuantSpec) -> Blocks:
    """Fill in codes, scales and biases of Q4_1 or Q5_1 blocks."""
    assert quantized.biases is not None, "affine weights have biases"
    for field, grid in (("d", quantized.scales), ("m", quantized.biases)):
        halves = from_float32(to_float32(grid, quantized.scale_dtype), "F16")
        out[field] = np.repeat(halves, spec.group_size // BLOCK, axis=1)
    out["codes"] = _opaque(codes)
    return out


def _q8_0(block: Float32, steps: Array) -> Blocks:
    """Nearest Q8_0 codes of a block ``[32, rows, blocks]`` for steps ``[rows, blocks]``."""
    with np.errstate(divide="ignore"):
        inverse = np.where(steps == 0, np.float32(0), np.float32(1) / steps.astype(np.float32))
    codes = block * inverse
    np.rint(codes, out=codes)
    np.clip(codes, -_LARGEST_CODE - 1, _LARGEST_CODE, out=codes)
    out = np.empty(steps.shape, _Q8_0)
    out["d"] = steps
    out["codes"] = _opaque(to_matrix(codes.astype(np.int8)).reshape(*steps.shape, BLOCK))
    return out


def _float16_above(values: Float32) -> Float32:
    """The smallest float16 that is not below each value; one that were would clip the block."""
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float16)
        above = np.nextafter(nearest, np.float16(np.inf))
    return np.where(nearest < values, above, nearest).astype(np.float32)


def _halves_joined(codes: Words, count: int) -> Bytes:
    """4-bit codes as GGUF orders them, ``[rows, runs, count / 2]``, each run of ``count`` apart.

    Args:
        codes: packed as MLX does: byte i has codes 2i and 2i + 1.
    """
    word = np.dtype(f"<u{count // 4}")
    runs = np.ascontiguousarray(codes).view(word).reshape(len(codes), -1, 2)
    first, second = runs[:, :, 0], runs[:, :, 1]
    low = word.type(0x0F0F0F0F0F0F0F0F & np.iinfo(word).max)
    even = (first & low) | ((second & low) << word.type(4))
    odd = ((first >> word.type(4)) & low) | (second & ~low)
    pairs = odd.view(np.uint8).astype("<u2")
    pairs <<= np.uint16(8)
    pairs |= even.view(np.uint8)
    joined: Bytes = pairs.view(np.uint8).reshape(*even.shape, count // 2)
    return joined


def _opaque(blocks: Array) -> Blocks:
    """Single bytes, those of the last axis as one element, which NumPy copies at once."""
    joined: Blocks = blocks.view(f"V{blocks.shape[-1]}")[..., 0]
    return joined


def _as_bytes(blocks: Array) -> Bytes:
    """Blocks or floats ``[rows, n]`` as bytes ``[rows, row bytes]``."""
    flat: Bytes = np.ascontiguousarray(blocks).view(np.uint8).reshape(len(blocks), -1)
    return flat
