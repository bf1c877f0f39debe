"""The small floating-point formats of MLX's mxfp4, mxfp8 and nvfp4 modes.

E2M1 and E8M0 are defined in the OCP Microscaling Formats (MX) v1.0 specification, E4M3 (without
infinities) in "FP8 Formats for Deep Learning" (arXiv 2209.05433). Tables hold the exact float32
value of every code.
"""

import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.floats import Float32

Codes = npt.NDArray[np.uint8]

_MAGNITUDES_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Values of the 16 four-bit codes; the high bit is the sign.
E2M1 = np.array([*_MAGNITUDES_E2M1, *(-value for value in _MAGNITUDES_E2M1)], np.float32)
E2M1_MAX = np.float32(6)


def _e4m3_table() -> Float32:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(
        exponent == 0,
        np.ldexp(mantissa / 8, -6),
        np.ldexp(1 + mantissa / 8, exponent - 7),
    )
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code & 128, -magnitude, magnitude).astype(np.float32)


#: Values of the 256 E4M3 codes; 0x7f and 0xff are NaN.
E4M3 = _e4m3_table()
E4M3_MAX = np.float32(448)
_E4M3_LARGEST_CODE = 0x7E


def _e8m0_table() -> Float32:
    table = np.ldexp(np.float32(1), np.arange(-127, 129))
    table[255] = np.nan
    return table.astype(np.float32)


#: Values of the 256 E8M0 codes: ``2 ** (code - 127)``; 255 is NaN.
with np.errstate(over="ignore"):
    E8M0 = _e8m0_table()

# Half-way points between neighbouring magnitudes. A tie goes to the even code, so the points above
# an even code are exclusive and those above an odd one inclusive.
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def encode_e2m1(values: Float32) -> Codes:
    """Nearest E2M1 code of each value, ties to even, saturating at 6."""
    magnitude = np.abs(values)
    codes = np.zeros(values.shape, np.uint8)
    for code, midpoint in enumerate(_E2M1_MIDPOINTS):
        codes += magnitude > midpoint if code % 2 == 0 else magnitude >= midpoint
    codes |= np.signbit(values).astype(np.uint8) << 3
    return codes


def encode_e4m3(values: Float32) -> Codes:
    """Nearest E4M3 code of each value, ties to even, saturating at 448."""
    magnitude = np.minimum(np.abs(values), E4M3_MAX)
    # Spacing of E4M3 around each magnitude: 2**(exponent - 3), and 2**-9 for subnormals.
    exponent = np.where(magnitude == 0, -6, np.maximum(np.frexp(magnitude)[1] - 1, -6))
    steps = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int32)
    # 8 to 15 steps are the mantissas of a normal number; 16 carries into the next exponent, which
    # the addition does by itself, and below 8 the exponent field is zero.
    codes: Codes = np.minimum(((exponent + 6) << 3) + steps, _E4M3_LARGEST_CODE).astype(np.uint8)
    codes |= np.signbit(values).astype(np.uint8) << 7
    return codes


def encode_e8m0_ceiling(values: Float32) -> Codes:
    """Code of the smallest power of two that is not below each (non-negative) value."""
    mantissa, exponent = np.frexp(values)
    ceiling = np.where(mantissa == 0.5, exponent - 1, exponent)
    ceiling = np.where(values == 0, -127, ceiling)
    codes: Codes = (np.clip(ceiling, -127, 127) + 127).astype(np.uint8)
    return codes
