"""MLX's quantized formats: what they are, and their exact float32 arithmetic.

A *block* holds some rows of a weight matrix as planes: an array ``[planes, rows, periods]`` whose
element ``[k, r, p]`` is column ``p * planes + k`` of row ``r``. Quantized formats have 32 planes,
since 32 codes fill a whole number of words at every width: the codes of a plane lie at the same
place of their words, and every step of the arithmetic (unpacking, group minimum, rounding,
packing) is an operation on long contiguous vectors, without a transposition. A dense weight is a
block of one plane, as it is stored.

Packing (all widths): codes follow each other as a little-endian stream of bits, least significant
bit first, so that 32 codes fill exactly ``bits`` 32-bit words.
Source: MLX's documentation of ``mlx.core.quantize`` and measured round trips (tests).
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats import codebooks
from mlx_fusekit.formats.floats import Array, Float32, from_float32, to_float32
from mlx_fusekit.formats.specs import SCALE_LEAVES, QuantSpec

Words = npt.NDArray[np.uint32]
Number = TypeVar("Number", bound=np.generic)

#: Planes of a block of a quantized format.
PLANES = 32

#: Below this a group's range counts as zero; the value MLX itself uses.
_SMALLEST_SCALE = np.float32(1e-7)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Some rows of a quantized weight, as stored.

    Attributes:
        codes: packed codes, uint32 ``[rows, words]``.
        scales: stored scales ``[rows, groups]``: floats as bits of ``scale_dtype``, or uint8
            (e8m0 for mxfp4 and mxfp8, e4m3 for nvfp4).
        biases: stored biases ``[rows, groups]``, of affine mode only.
        scale_dtype: safetensors dtype of scales and biases.
        global_scale: nvfp4's optional float32 scale of the whole matrix.
    """

    codes: Words
    scales: Array
    biases: Array | None
    scale_dtype: str
    global_scale: float | None = None

    def part(self, first: int, last: int) -> Self:
        """Rows ``first`` to ``last`` (exclusive)."""
        biases = None if self.biases is None else self.biases[first:last]
        return replace(
            self, codes=self.codes[first:last], scales=self.scales[first:last], biases=biases
        )

    def keeping(self, base: "QuantizedRows", keep: npt.NDArray[np.bool_]) -> Self:
        """These rows, but those of ``base`` where ``keep``, boolean ``[rows]``, is true."""
        chosen, biases = keep[:, None], None
        if self.biases is not None and base.biases is not None:
            biases = np.where(chosen, base.biases, self.biases)
        return replace(
            self,
            codes=np.where(chosen, base.codes, self.codes),
            scales=np.where(chosen, base.scales, self.scales),
            biases=biases,
        )


def stacked(parts: Sequence[QuantizedRows]) -> QuantizedRows:
    """Rows below each other, of one format."""
    if len(parts) == 1:
        return parts[0]
    biases = [part.biases for part in parts if part.biases is not None]
    return replace(
        parts[0],
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        biases=np.concatenate(biases) if biases else None,
    )


@dataclass(frozen=True, slots=True)
class TargetFormat:
    """The format merged rows are brought into.

    Attributes:
        scale_dtype: of affine scales and biases; "U8" for codebook modes.
        global_scale: nvfp4's, of this expert.
    """

    spec: QuantSpec
    scale_dtype: str
    global_scale: float | None = None


def parts_of(stored: Collection[str], quantized: Iterable[str]) -> set[str]:
    """Names of stored tensors that lie beside the weights of quantized modules."""
    names = (f"{module}.{leaf}" for module in quantized for leaf in SCALE_LEAVES)
    return {name for name in names if name in stored}


def to_block(matrix: npt.NDArray[Number], planes: int = PLANES) -> npt.NDArray[Number]:
    """A matrix ``[rows, columns]`` as a block ``[planes, rows, columns / planes]``."""
    rows, columns = matrix.shape
    return np.ascontiguousarray(matrix.reshape(rows, columns // planes, planes).transpose(2, 0, 1))


def to_matrix(block: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """The inverse of :func:`to_block`."""
    planes, rows, periods = block.shape
    return np.ascontiguousarray(block.transpose(1, 2, 0)).reshape(rows, planes * periods)


def unpack(codes: Words, bits: int) -> npt.NDArray[np.uint32]:
    """Codes of packed rows.

    Args:
        codes: ``[rows, words]``; the row's columns must be a multiple of 32.
        bits: width of a code, 1 to 8.

    Returns:
        A block.
    """
    out = _empty_block(codes, bits, np.uint32)
    for place, plane in _unpacked(codes, bits):
        _cycles(out, bits)[:, place] = plane
    return out


def pack(codes: npt.NDArray[Number], bits: int) -> Words:
    """The inverse of :func:`unpack`.

    Args:
        codes: a block of whole numbers, of any type.

    Returns:
        Packed rows ``[rows, words]``.
    """
    _, rows, periods = codes.shape
    cycles = math.gcd(32, bits)
    words = np.zeros((cycles, bits // cycles, rows, periods), np.uint32)
    plane = np.empty((cycles, rows, periods), np.uint32)
    for place in range(32 // cycles):
        # float32 to int32 is one vector instruction; to uint32 it is not.
        np.copyto(plane.view(np.int32), _cycles(codes, bits)[:, place], casting="unsafe")
        word, shift = divmod(place * bits, 32)
        if shift + bits > 32:
            words[:, word + 1] |= plane >> np.uint32(32 - shift)
        if shift:
            plane <<= np.uint32(shift)
        words[:, word] |= plane
    streams = words.reshape(bits, rows, periods).transpose(1, 2, 0)
    return np.ascontiguousarray(streams).reshape(rows, periods * bits)


def _unpacked(codes: Words, bits: int) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """Codes of packed rows, place by place in a cycle of words (see :func:`_cycles`).

    Yields:
        The place, and the codes there ``[cycles, rows, periods]``, to be used before the next.
    """
    rows, words = codes.shape
    cycles, periods = math.gcd(32, bits), words // bits
    streams = np.ascontiguousarray(codes.reshape(rows, periods, bits).transpose(2, 0, 1))
    by_cycle = streams.reshape(cycles, bits // cycles, rows, periods)
    plane = np.empty((cycles, rows, periods), np.uint32)
    mask = np.uint32((1 << bits) - 1)
    for place in range(32 // cycles):
        word, shift = divmod(place * bits, 32)
        np.right_shift(by_cycle[:, word], np.uint32(shift), out=plane)
        if shift + bits > 32:
            plane |= by_cycle[:, word + 1] << np.uint32(32 - shift)
        if shift + bits != 32:
            plane &= mask
        yield place, plane


def _cycles(block: npt.NDArray[Number], bits: int) -> npt.NDArray[Number]:
    """A block as ``[cycles, places, rows, periods]``.

    A cycle is the fewest codes that fill whole words: 8 at 4 bits, 32 at 3 bits.
    """
    cycles = math.gcd(32, bits)
    return block.reshape(cycles, PLANES // cycles, *block.shape[1:])


def _empty_block(codes: Words, bits: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    rows, words = codes.shape
    return np.empty((PLANES, rows, words // bits), dtype)


def dequantize(quantized: QuantizedRows, spec: QuantSpec) -> Float32:
    """Exact float32 values, ``float32(scale) * code + float32(bias)``, as a block.

    For 16-bit scales the product is exact, so there is one rounding, that of the sum. These are
    the weights an adapter was trained on, up to the rounding of the kernel that ran it;
    ``mx.dequantize`` of 16-bit scales rounds product and sum to 16 bits.
    """
    if not spec.affine:
        return _dequantize_codebook(quantized, spec)
    assert quantized.biases is not None, "affine weights have biases"
    block: Float32 = _empty_block(quantized.codes, spec.bits, np.float32)
    for place, plane in _unpacked(quantized.codes, spec.bits):
        # int32 to float32 is one vector instruction; uint32 is not.
        _cycles(block, spec.bits)[:, place] = plane.view(np.int32)
    grouped = _grouped(block, spec)
    grouped *= _over_groups(to_float32(quantized.scales, quantized.scale_dtype), spec)
    grouped += _over_groups(to_float32(quantized.biases, quantized.scale_dtype), spec)
    return block


def dequantize_as_stored(quantized: QuantizedRows, spec: QuantSpec) -> Float32:
    """The values that ``mx.dequantize`` gives in the scales' own type, as a float32 block.

    It rounds the product and then the sum to that type. DoRA's row norms were taken of these.
    """
    if not spec.affine or quantized.scale_dtype == "F32":
        return dequantize(quantized, spec)
    dtype = quantized.scale_dtype
    zero = from_float32(np.zeros(quantized.scales.shape, np.float32), dtype)
    products = dequantize(replace(quantized, biases=zero), spec)
    block = to_float32(from_float32(products, dtype), dtype)
    assert quantized.biases is not None, "affine weights have biases"
    grouped = _grouped(block, spec)
    grouped += _over_groups(to_float32(quantized.biases, dtype), spec)
    return to_float32(from_float32(block, dtype), dtype)


def quantize_nearest(
    block: Float32, spec: QuantSpec, scale_dtype: str, global_scale: float | None = None
) -> QuantizedRows:
    """Round each value to the nearest point of a grid laid between its group's minimum and maximum.

    The grid is MLX's (``mx.quantize``: the extreme of larger magnitude is a grid point, and zero
    too where the group's range holds it). Scale and bias are rounded to their stored type *before*
    the codes are chosen, so that codes are nearest on the grid that will be read back; MLX
    chooses them on the unrounded grid.

    Args:
        block: float32; overwritten.
        spec: the format to round to.
        scale_dtype: type of scales and biases of affine mode.
        global_scale: of nvfp4.
    """
    if not spec.affine:
        return _quantize_codebook(block, spec, global_scale)
    # Of values that the scales' type cannot hold, infinite scales are what tells the caller.
    with np.errstate(all="ignore"):
        return _quantize_affine(block, spec, scale_dtype)


def _quantize_affine(block: Float32, spec: QuantSpec, scale_dtype: str) -> QuantizedRows:
    scales, biases = _min_max_grid(block, spec)
    stored_scales, stored_biases = (from_float32(grid, scale_dtype) for grid in (scales, biases))
    scales = to_float32(stored_scales, scale_dtype)
    # A group of all zeros has the smallest scale, which float16 may round to zero.
    inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    grouped = _grouped(block, spec)
    grouped -= _over_groups(to_float32(stored_biases, scale_dtype), spec)
    grouped *= _over_groups(inverse, spec)
    np.rint(block, out=block)
    np.clip(block, np.float32(0), np.float32((1 << spec.bits) - 1), out=block)
    return QuantizedRows(pack(block, spec.bits), stored_scales, stored_biases, scale_dtype)


def _min_max_grid(block: Float32, spec: QuantSpec) -> tuple[Float32, Float32]:
    """MLX's affine grid of each group: scales and biases, float32 ``[rows, groups]``."""
    low, high = _over_members(np.minimum, block, spec), _over_members(np.maximum, block, spec)
    low_is_larger = np.abs(low) > np.abs(high)
    steps = np.float32((1 << spec.bits) - 1)
    scale = np.maximum((high - low) / steps, _SMALLEST_SCALE)
    scale = np.where(low_is_larger, scale, -scale)
    edge = np.where(low_is_larger, low, high)
    edge_code = np.rint(edge / scale)
    has_edge = edge_code != 0
    scale = np.where(has_edge, edge / np.where(has_edge, edge_code, 1), scale)
    return scale, np.where(has_edge, edge, np.float32(0))


def _dequantize_codebook(quantized: QuantizedRows, spec: QuantSpec) -> Float32:
    values = codebooks.E2M1 if spec.bits == 4 else codebooks.E4M3
    block: Float32 = _empty_block(quantized.codes, spec.bits, np.float32)
    for place, plane in _unpacked(quantized.codes, spec.bits):
        _cycles(block, spec.bits)[:, place] = values[plane]
    grouped = _grouped(block, spec)
    grouped *= _over_groups(codebook_scales(quantized.scales, spec, quantized.global_scale), spec)
    return block


def codebook_scales(scales: Array, spec: QuantSpec, global_scale: float | None) -> Float32:
    """Float32 scales of a codebook mode; nvfp4's global scale is the matrix's largest magnitude."""
    codes = scales.view(np.uint8)
    if spec.mode != "nvfp4":
        return codebooks.E8M0[codes]
    values: Float32 = codebooks.E4M3[codes]
    if global_scale is not None:
        values = values * (np.float32(global_scale) / (codebooks.E4M3_MAX * codebooks.E2M1_MAX))
    return values


def _quantize_codebook(
    block: Float32, spec: QuantSpec, global_scale: float | None
) -> QuantizedRows:
    """Nearest codes and scales of a codebook mode.

    nvfp4 scales are the nearest E4M3 of (largest magnitude / 6). Scales of the mx modes are powers
    of two: the smallest that clips nothing, or the one below it where its finer steps win more
    than its clipping loses. ``mx.quantize`` always takes the first, so a group whose maximum a
    small update pushes past the end of its codebook would lose a whole bit.
    """
    largest = _over_members(np.maximum, np.abs(block), spec)
    if spec.mode == "nvfp4":
        per_unit = np.float32(1)
        if global_scale:
            per_unit = codebooks.E4M3_MAX * codebooks.E2M1_MAX / np.float32(global_scale)
        scales = codebooks.encode_e4m3(largest / codebooks.E2M1_MAX * per_unit)
    else:
        maximum = codebooks.E2M1_MAX if spec.bits == 4 else codebooks.E4M3_MAX
        wide = codebooks.encode_e8m0_ceiling(largest / maximum)
        narrow = np.maximum(wide, 1) - np.uint8(1)
        errors = [_squared_error(block, scales, spec) for scales in (wide, narrow)]
        scales = np.where(errors[1] < errors[0], narrow, wide)
    packed = pack(_encode(block, scales, spec, global_scale), spec.bits)
    return QuantizedRows(packed, np.ascontiguousarray(scales), None, "U8", global_scale)


def _encode(
    block: Float32, scales: Array, spec: QuantSpec, global_scale: float | None
) -> npt.NDArray[np.uint8]:
    """Nearest codes of a block's values for scales ``[rows, groups]``."""
    values = codebook_scales(scales, spec, global_scale)
    with np.errstate(divide="ignore"):
        inverse = np.where(values == 0, np.float32(0), np.float32(1) / values)
    encode = codebooks.encode_e2m1 if spec.bits == 4 else codebooks.encode_e4m3
    return encode((_grouped(block, spec) * _over_groups(inverse, spec)).reshape(block.shape))


def _squared_error(block: Float32, scales: Array, spec: QuantSpec) -> Float32:
    """Squared error of each group, ``[rows, groups]``, when rounded with these E8M0 scales."""
    table = codebooks.E2M1 if spec.bits == 4 else codebooks.E4M3
    rounded: Float32 = table[_encode(block, scales, spec, None)]
    grouped = _grouped(rounded, spec)
    grouped *= _over_groups(codebook_scales(scales, spec, None), spec)
    rounded -= block
    return _over_members(np.add, np.square(rounded, out=rounded), spec)


def _grouped(block: Float32, spec: QuantSpec) -> Float32:
    """A block as ``[groups of a period, members, rows, periods]``; groups above 32 span periods."""
    _, rows, periods = block.shape
    members = min(spec.group_size, PLANES)
    return block.reshape(PLANES // members, members, rows, periods)


def _over_groups(per_group: Float32, spec: QuantSpec) -> Float32:
    """Values of groups ``[rows, groups]``, as what broadcasts over a grouped block."""
    if spec.group_size >= PLANES:
        return np.repeat(per_group, spec.group_size // PLANES, axis=1)[None, None]
    rows, groups = per_group.shape
    in_period = PLANES // spec.group_size
    split = per_group.reshape(rows, groups // in_period, in_period).transpose(2, 0, 1)
    return np.ascontiguousarray(split)[:, None]


def _over_members(operation: np.ufunc, block: Float32, spec: QuantSpec) -> Float32:
    """Minimum, maximum or sum of each group, ``[rows, groups]``."""
    reduced: Float32 = operation.reduce(_grouped(block, spec), axis=1)
    in_period, rows, periods = reduced.shape
    if in_period > 1:
        return np.ascontiguousarray(reduced.transpose(1, 2, 0)).reshape(rows, -1)
    reduced = reduced[0]
    while reduced.shape[1] * spec.group_size > PLANES * periods:
        reduced = operation(reduced[:, 0::2], reduced[:, 1::2])
    return reduced
