"""Formats to test, and weights that are hard on them."""

import numpy as np

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import TargetFormat
from mlx_fusekit.formats.specs import QuantSpec

_GROUPS = (32, 64, 128)
#: Every width with every group size and every type of scales, and every two of those together.
AFFINE = {
    f"{bits}-bit-{group}-{dtype}": TargetFormat(QuantSpec(bits, group), dtype)
    for i, bits in enumerate((2, 3, 4, 5, 6, 8))
    for j, dtype in enumerate(("F16", "BF16", "F32"))
    for group in [_GROUPS[(i + j) % 3]]
}
CODEBOOKS = {
    "mxfp4": TargetFormat(QuantSpec(4, 32, "mxfp4"), "U8"),
    "mxfp8": TargetFormat(QuantSpec(8, 32, "mxfp8"), "U8"),
    "nvfp4": TargetFormat(QuantSpec(4, 16, "nvfp4"), "U8"),
    "nvfp4-global": TargetFormat(QuantSpec(4, 16, "nvfp4"), "U8", global_scale=0.75),
}
FORMATS = {**AFFINE, **CODEBOOKS}
#: One of each kind, where all of them would take long.
SOME = {
    name: FORMATS[name]
    for name in ("2-bit-32-F16", "3-bit-128-BF16", "4-bit-64-F32", "8-bit-32-BF16", *CODEBOOKS)
}


def hard_weights(columns: int, rows: int, seed: int = 0) -> Float32:
    """``[columns, rows]``: in turn ordinary, constant, zero, with an outlier, offset, and tiny."""
    random = np.random.default_rng(seed)
    weights = random.normal(0, 0.05, (columns, rows)).astype(np.float32)
    weights[:, 1::6] = weights[:1, 1::6]
    weights[:, 2::6] = 0
    weights[random.integers(columns), 3::6] = 40
    weights[:, 4::6] = 3 + 0.01 * weights[:, 4::6]
    weights[:, 5::6] *= 1e-5
    return weights
