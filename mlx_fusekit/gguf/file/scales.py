"""What the scales and biases of a quantized tensor say about its values, before any is read."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GgmlType

from mlx_fusekit.formats import codebooks
from mlx_fusekit.formats.floats import Array, Float32, from_float32, to_float32
from mlx_fusekit.formats.quantization import codebook_scales
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.gguf.file.blocks import block_type
from mlx_fusekit.gguf.file.rows import TensorRows

#: Relative error up to which float16 may round scales and biases. Rounding itself costs about
#: 2e-4; what is above this overflows or underflows.
_LARGEST_ERROR = 1e-3
_FLOAT16_MAX = 65504.0
#: Steps of the smallest float16 leave this error, and relative to smaller values a large one.
_SMALLEST_RMS = 2.0**-24 / 12**0.5 / _LARGEST_ERROR
_FLOAT32_MAX = float(np.finfo(np.float32).max)
#: BF16 holds every product of an E4M3 and a scale from this E8M0 code on.
_SMALLEST_BF16_CODE = 3
#: Mean square of all codes of a codebook, by the bits of a code.
_MEAN_SQUARES = {
    4: float(np.square(codebooks.E2M1).mean()),
    8: float(np.nanmean(np.square(codebooks.E4M3))),
}


@dataclass(frozen=True, slots=True)
class ScaleFacts:
    """What scales and biases say about values, whatever the codes are.

    Attributes:
        exact: whether the format's block type holds the values exactly.
        largest: no value is larger in magnitude; NaN where one may be.
        count: number of values.
        squares: sum of squares to be expected of the values when all codes are equally frequent.
        squared_error: sum of squares to be expected of what rounding scales and biases to float16
            changes.
    """

    exact: bool = True
    largest: float = 0.0
    count: int = 0
    squares: float = 0.0
    squared_error: float = 0.0

    def __add__(self, other: Self) -> "ScaleFacts":
        return ScaleFacts(
            self.exact and other.exact,
            float(np.maximum(self.largest, other.largest)),  # hands NaN on
            self.count + other.count,
            self.squares + other.squares,
            self.squared_error + other.squared_error,
        )

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or overflows float32."""
        return self.largest <= _FLOAT32_MAX

    @property
    def suits_float16(self) -> bool:
        """Whether float16 holds the values with no more than its usual relative error."""
        rms = (self.squares / max(self.count, 1)) ** 0.5
        return self.largest <= _FLOAT16_MAX and rms >= _SMALLEST_RMS

    @property
    def suits_rounding(self) -> bool:
        """Whether rounding scales and biases to float16 leaves a small relative error."""
        return self.squared_error <= _LARGEST_ERROR**2 * self.squares


def scan_scales(rows: TensorRows) -> ScaleFacts:
    """Read all scales and biases of a quantized tensor.

    A scale that float16 cannot hold does not matter to a group whose codes are all zero, as MLX
    makes of rows of zeros, with a scale of 1e-7; such groups are looked at.
    """
    assert rows.spec is not None, "floats have no scales"
    facts = ScaleFacts()
    for first, last in rows.spans(rows.spec.words(rows.columns)):
        if rows.spec.affine:
            facts += _affine_facts(rows, rows.spec, first, last, look=facts.exact)
        else:
            facts += _codebook_facts(rows, rows.spec, first, last)
    return facts


@dataclass(frozen=True, slots=True)
class _Groups:
    """Scales and biases of the groups of some rows, and rounded to float16, ``[rows, groups]``."""

    scales: Float32
    biases: Float32
    rounded_scales: Float32
    rounded_biases: Float32

    @classmethod
    def read(cls, rows: TensorRows, first: int, last: int) -> Self:
        dtype = rows.sources["scales"].dtype
        parts = [to_float32(rows.stored(leaf, first, last), dtype) for leaf in ("scales", "biases")]
        rounded = [to_float32(from_float32(part, "F16"), "F16") for part in parts]
        return cls(*parts, *rounded)


def _affine_facts(
    rows: TensorRows, spec: QuantSpec, first: int, last: int, *, look: bool
) -> ScaleFacts:
    """Facts of some rows.

    Args:
        look: whether to look at the codes of groups whose scale is not kept.
    """
    groups = _Groups.read(rows, first, last)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        lossy = ~_kept_exactly(groups, spec)
        exact = not lossy.any()
        changes = groups.rounded_scales - groups.scales, groups.rounded_biases - groups.biases
        return ScaleFacts(
            exact or (look and _only_unused_scales(rows, spec, first, lossy, groups)),
            _largest_value(groups, spec),
            groups.scales.size * spec.group_size,
            _expected_squares(groups.scales, groups.biases, spec),
            0.0 if exact else _expected_squares(*changes, spec),
        )


def _kept_exactly(groups: _Groups, spec: QuantSpec) -> npt.NDArray[np.bool_]:
    """Which groups the block type holds whatever their codes are, ``[rows, groups]``."""
    scales, biases = groups.scales, groups.biases
    kept = groups.rounded_scales == scales
    if block_type(spec) != GgmlType.Q8_0:
        return np.asarray(kept & (groups.rounded_biases == biases))
    # Q8_0 has no bias: it must be a whole number of steps that keeps all codes within 8 bits.
    offset = np.where(scales == 0, np.float32(0), np.rint(biases / scales))
    within = (offset >= -128) & (offset + (1 << spec.bits) - 1 <= 127)
    return np.asarray(kept & within & (offset * scales == biases))


def _only_unused_scales(
    rows: TensorRows, spec: QuantSpec, first: int, lossy: npt.NDArray[np.bool_], groups: _Groups
) -> bool:
    """Whether all groups that would change have nothing but zero codes, and a bias that is kept."""
    wanted = np.float32(0) if block_type(spec) == GgmlType.Q8_0 else groups.rounded_biases
    unused = (groups.biases == wanted) & np.isfinite(groups.rounded_scales)
    if (lossy & ~unused).any():
        return False
    at_hand = rows.held()
    for line in np.flatnonzero(lossy.any(axis=1)):
        words = at_hand.stored("weight", first + int(line), first + int(line) + 1)
        used = words.reshape(lossy.shape[1], -1).any(axis=1)
        if (used & lossy[line]).any():
            return False
    return True


def _largest_value(groups: _Groups, spec: QuantSpec) -> float:
    """A bound of all magnitudes; NaN where a scale or bias is."""
    codes = float((1 << spec.bits) - 1)
    return float((np.abs(groups.scales, dtype=np.float64) * codes + np.abs(groups.biases)).max())


def _expected_squares(scales: Float32, biases: Float32, spec: QuantSpec) -> float:
    """Expected sum of ``(scale * code + bias) ** 2`` over all values, all codes equally likely."""
    top = (1 << spec.bits) - 1
    mean, mean_square = top / 2, top * (2 * top + 1) / 6
    total = mean_square * _dot(scales, scales) + 2 * mean * _dot(scales, biases)
    return (total + _dot(biases, biases)) * spec.group_size


def _dot(first: Float32, second: Float32) -> float:
    # Not BLAS, which starts threads, here inside threads.
    return float(np.einsum("rg,rg->", first, second, dtype=np.float64))


def _codebook_facts(rows: TensorRows, spec: QuantSpec, first: int, last: int) -> ScaleFacts:
    stored = rows.stored("scales", first, last)
    codes = stored.view(np.uint8)
    global_scale = None
    if rows.global_scales is not None:
        global_scale = float(np.abs(rows.global_scales).max())
    scales = codebook_scales(stored, spec, global_scale).astype(np.float64)
    table = codebooks.E2M1 if spec.bits == 4 else codebooks.E4M3
    return ScaleFacts(
        _codebook_exact(codes, spec) and global_scale is None,
        float(np.abs(scales).max(initial=0) * np.nanmax(table)),
        scales.size * spec.group_size,
        float(np.square(scales).sum()) * spec.group_size * _MEAN_SQUARES[spec.bits],
    )


def _codebook_exact(codes: Array, spec: QuantSpec) -> bool:
    if spec.mode == "nvfp4":  # llama.cpp does not read the sign of a scale
        return int(codes.max(initial=0)) < 128
    if spec.mode == "mxfp8":
        return int(codes.min(initial=255)) >= _SMALLEST_BF16_CODE
    return True
