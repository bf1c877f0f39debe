"""The values a quantized format can hold, laid out for solvers that go column by column.

Arrays here have columns first: weights ``[columns, rows]`` and grids ``[groups, rows]``, so that
one column of all rows, or one group's scales, lie together in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats import codebooks
from mlx_fusekit.formats.floats import Array, Float32, from_float32, to_float32
from mlx_fusekit.formats.quantization import (
    QuantizedRows,
    TargetFormat,
    codebook_scales,
    dequantize,
    pack,
    quantize_nearest,
    to_block,
    to_matrix,
)
from mlx_fusekit.formats.specs import QuantSpec

#: How much of a group's range a fitted grid may span: clipping a few outliers can pay.
_SPANS = (1.0, 0.9, 0.8)
#: Rounds of assigning codes and fitting scale and bias to them, for each span.
_FITS = 3
#: Factors on the scale that holds a group's largest magnitude, of codebooks with fine scales.
_NVFP4_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 1.1, 1.2)


class Grid(Protocol):
    """Grids of all groups and rows of a matrix."""

    @property
    def groups(self) -> int:
        """Groups of a row."""

    def nearest(self, values: Float32, group: int) -> Float32:
        """The grid's nearest value to each of a column's, ``[rows]``; the column's group is given.

        The result is a new array.
        """

    def quantized(self, values: Float32) -> QuantizedRows:
        """Values on the grid ``[columns, rows]`` in their stored form."""

    def mixed(self, other: "Grid", take_other: npt.NDArray[np.bool_]) -> "Grid":
        """This grid, with the other's where chosen: ``[groups, rows]``, or ``[rows]`` for all."""


@dataclass(frozen=True)
class AffineGrid:
    """``scale * code + bias``.

    Attributes:
        scales: float32 ``[groups, rows]``, exactly as stored.
        biases: float32 ``[groups, rows]``, exactly as stored.
        inverse: 1 / scales, 0 where the scale is 0.
        bits: of a code.
        dtype: in which scales and biases are stored.
    """

    scales: Float32
    biases: Float32
    inverse: Float32
    bits: int
    dtype: str

    @property
    def groups(self) -> int:
        return len(self.scales)

    @classmethod
    def stored(cls, scales: Float32, biases: Float32, bits: int, dtype: str) -> "AffineGrid":
        """The grid nearest to these scales and biases that the stored type can hold."""
        scales, biases = (
            to_float32(from_float32(np.ascontiguousarray(values), dtype), dtype)
            for values in (scales, biases)
        )
        return cls(scales, biases, _inverse(scales), bits, dtype)

    def nearest(self, values: Float32, group: int) -> Float32:
        codes = self._codes(values, group)
        codes *= self.scales[group]
        codes += self.biases[group]
        return codes

    def codes(self, values: Float32) -> Float32:
        """Nearest codes of ``[groups, members, rows]``, as whole float32 numbers."""
        return self._codes(values, np.s_[:, None])

    def _codes(self, values: Float32, chosen: Any) -> Float32:
        codes: Float32 = values - self.biases[chosen]
        codes *= self.inverse[chosen]
        np.rint(codes, out=codes)
        np.maximum(codes, np.float32(0), out=codes)
        np.minimum(codes, np.float32((1 << self.bits) - 1), out=codes)
        return codes

    def quantized(self, values: Float32) -> QuantizedRows:
        codes = self.codes(_grouped(values, len(self.scales))).reshape(values.shape)
        return QuantizedRows(
            pack(to_block(np.ascontiguousarray(codes.T)), self.bits),
            from_float32(np.ascontiguousarray(self.scales.T), self.dtype),
            from_float32(np.ascontiguousarray(self.biases.T), self.dtype),
            self.dtype,
        )

    def mixed(self, other: Grid, take_other: npt.NDArray[np.bool_]) -> "AffineGrid":
        assert isinstance(other, AffineGrid)
        scales = np.where(take_other, other.scales, self.scales)
        biases = np.where(take_other, other.biases, self.biases)
        return AffineGrid(scales, biases, _inverse(scales), self.bits, self.dtype)


@dataclass(frozen=True)
class CodebookGrid:
    """``scale * table[code]``, of mxfp4, mxfp8 and nvfp4.

    Attributes:
        scale_codes: uint8 ``[groups, rows]``.
        scales: their float32 values, nvfp4's global scale multiplied in.
        inverse: 1 / scales, 0 where the scale is 0.
        spec: which codebook.
        global_scale: nvfp4's.
    """

    scale_codes: codebooks.Codes
    scales: Float32
    inverse: Float32
    spec: QuantSpec
    global_scale: float | None

    @property
    def groups(self) -> int:
        return len(self.scales)

    @classmethod
    def stored(
        cls, scale_codes: Array, spec: QuantSpec, global_scale: float | None
    ) -> "CodebookGrid":
        """The grid of stored scales ``[groups, rows]``."""
        codes: codebooks.Codes = np.ascontiguousarray(scale_codes).view(np.uint8)
        scales = codebook_scales(codes, spec, global_scale)
        return cls(codes, scales, _inverse(scales), spec, global_scale)

    def _codes(self, values: Float32, inverse: Float32) -> codebooks.Codes:
        # Of a group of zeros the scale is so small that others overflow: to the largest code.
        with np.errstate(over="ignore"):
            scaled = values * inverse
        encode = codebooks.encode_e2m1 if self.spec.bits == 4 else codebooks.encode_e4m3
        return encode(scaled)

    @property
    def _table(self) -> Float32:
        return codebooks.E2M1 if self.spec.bits == 4 else codebooks.E4M3

    def nearest(self, values: Float32, group: int) -> Float32:
        return self._rounded(values, group)

    def rounded(self, values: Float32) -> Float32:
        """The grid's nearest values to ``[groups, members, rows]``."""
        return self._rounded(values, np.s_[:, None])

    def _rounded(self, values: Float32, chosen: Any) -> Float32:
        rounded: Float32 = self._table[self._codes(values, self.inverse[chosen])]
        rounded *= self.scales[chosen]
        return rounded

    def quantized(self, values: Float32) -> QuantizedRows:
        grouped = _grouped(values, len(self.scales))
        codes = self._codes(grouped, self.inverse[:, None]).reshape(values.shape)
        return QuantizedRows(
            pack(to_block(np.ascontiguousarray(codes.T)), self.spec.bits),
            np.ascontiguousarray(self.scale_codes.T),
            None,
            "U8",
            self.global_scale,
        )

    def mixed(self, other: Grid, take_other: npt.NDArray[np.bool_]) -> "CodebookGrid":
        assert isinstance(other, CodebookGrid)
        codes: Array = np.where(take_other, other.scale_codes, self.scale_codes)
        return CodebookGrid.stored(codes, self.spec, self.global_scale)


def grid_of(quantized: QuantizedRows, spec: QuantSpec) -> Grid:
    """The grid of rows that are already quantized."""
    if not spec.affine:
        return CodebookGrid.stored(quantized.scales.T, spec, quantized.global_scale)
    assert quantized.biases is not None, "affine weights have biases"
    dtype = quantized.scale_dtype
    scales, biases = (
        np.ascontiguousarray(to_float32(stored, dtype).T)
        for stored in (quantized.scales, quantized.biases)
    )
    return AffineGrid(scales, biases, _inverse(scales), spec.bits, dtype)


def values_of(quantized: QuantizedRows, spec: QuantSpec) -> Float32:
    """Values of quantized rows, ``[columns, rows]``."""
    return np.ascontiguousarray(to_matrix(dequantize(quantized, spec)).T)


def nearest_of(weights: Float32, target: TargetFormat) -> QuantizedRows:
    """Weights ``[columns, rows]`` rounded to nearest on a min-max grid."""
    block = to_block(np.ascontiguousarray(weights.T))
    return quantize_nearest(block, target.spec, target.scale_dtype, target.global_scale)


def fitted_grid(weights: Float32, importance: Float32, target: TargetFormat) -> Grid:
    """Grids that hold weights with the least weighted squared error, when rounded to nearest.

    Args:
        weights: ``[columns, rows]``.
        importance: of each column's squared error, non-negative ``[columns]``.
        target: the format.

    Returns:
        For affine formats, the best of alternately assigning codes and fitting scale and bias to
        them by weighted least squares, from several spans. For codebooks, the best of the scales
        around the one that holds the largest magnitude.
    """
    groups = len(weights) // target.spec.group_size
    grouped = _grouped(weights, groups)
    per_column = importance.reshape(groups, -1, 1).astype(np.float32)
    # A group of dead columns has no preference; any grid near its weights will do.
    per_column = np.where(per_column.sum(1, keepdims=True) > 0, per_column, np.float32(1))
    start = grid_of(nearest_of(weights, target), target.spec)
    if isinstance(start, AffineGrid):
        return _fitted_affine(grouped, per_column, start)
    assert isinstance(start, CodebookGrid)
    return _fitted_codebook(grouped, per_column, start)


def _fitted_affine(weights: Float32, importance: Float32, start: AffineGrid) -> AffineGrid:
    half = np.float32(((1 << start.bits) - 1) / 2)
    scales: Float32
    biases: Float32
    total = importance.sum(1)
    mean = (importance * weights).sum(1) / total
    best = start
    least: Float32 = np.full(start.scales.shape, np.inf, np.float32)
    for span in _SPANS:
        scales = start.scales * np.float32(span)
        biases = start.biases + half * (start.scales - scales)
        for _ in range(_FITS + 1):
            grid = AffineGrid.stored(scales, biases, start.bits, start.dtype)
            codes = grid.codes(weights)
            error = codes * grid.scales[:, None]
            error += grid.biases[:, None]
            error -= weights
            squared = (importance * np.square(error, out=error)).sum(1)
            best, least = best.mixed(grid, squared < least), np.fmin(squared, least)
            scales, biases = _line_through(codes, weights, importance, total, mean, grid)
    return best


def _line_through(
    codes: Float32,
    weights: Float32,
    importance: Float32,
    total: Float32,
    mean: Float32,
    grid: AffineGrid,
) -> tuple[Float32, Float32]:
    """Scale and bias of the weighted least-squares line from codes to weights."""
    weighted = importance * codes
    mean_code = weighted.sum(1) / total
    variance = (weighted * codes).sum(1) / total - mean_code * mean_code
    covariance = (weighted * weights).sum(1) / total - mean_code * mean
    # Where all codes are equal there is no line; float32 leaves crumbs of the variance.
    varied = variance > np.float32(1e-4)
    scales = np.where(varied, covariance / np.where(varied, variance, 1), grid.scales)
    return scales, mean - scales * mean_code


def _fitted_codebook(weights: Float32, importance: Float32, start: CodebookGrid) -> CodebookGrid:
    best = start
    least: Float32 = np.full(start.scales.shape, np.inf, np.float32)
    for codes in _scale_candidates(start):
        grid = CodebookGrid.stored(codes, start.spec, start.global_scale)
        error = grid.rounded(weights)
        error -= weights
        squared = (importance * np.square(error, out=error)).sum(1)
        best, least = best.mixed(grid, squared < least), np.fmin(squared, least)
    return best


def _scale_candidates(start: CodebookGrid) -> Iterator[npt.NDArray[np.uint8]]:
    if start.spec.mode != "nvfp4":
        # Powers of two: the next ones are twice and half of it.
        for step in (0, -1, 1):
            yield np.clip(start.scale_codes.astype(np.int16) + step, 0, 254).astype(np.uint8)
        return
    for factor in _NVFP4_FACTORS:
        yield codebooks.encode_e4m3(codebooks.E4M3[start.scale_codes] * np.float32(factor))


def _inverse(scales: Float32) -> Float32:
    with np.errstate(divide="ignore", over="ignore"):
        inverse: Float32 = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    # The reciprocal of the smallest float32 numbers overflows; such a group is all zeros.
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _grouped(values: Float32, groups: int) -> Float32:
    return values.reshape(groups, -1, values.shape[-1])
