"""Stored floats to float32 and back."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_fusekit.formats.floats import (
    DTYPE_NAMES,
    FLOAT_DTYPES,
    STORAGE,
    from_float32,
    to_float32,
)

TYPES = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
#: Ties, subnormal numbers of either 16-bit type, and the largest numbers.
HARD = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 6e-8, 3e-8, 1e-40, 65504, 65520, -3.4e38]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rounding_is_mlxs(dtype: str) -> None:
    random = np.random.default_rng(0).normal(0, 100, 1000)
    values = np.array([*HARD, np.inf, -np.inf, *random], np.float32)
    stored = from_float32(values, dtype)
    assert stored.dtype == STORAGE[dtype]
    rounded = mx.array(values).astype(TYPES[dtype]).astype(mx.float32)
    assert to_float32(stored, dtype).tobytes() == np.array(rounded).tobytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_stored_number_comes_back(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = to_float32(bits.view(STORAGE[dtype]), dtype)
    assert np.isnan(values).sum() == 2 * (2**10 - 1 if dtype == "F16" else 2**7 - 1)
    numbers = ~np.isnan(values)
    assert (from_float32(values, dtype).view(np.uint16) == bits)[numbers].all()


def test_no_nan_becomes_a_number() -> None:
    """Not even one whose payload is in the bits that are dropped."""
    nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    for dtype in FLOAT_DTYPES:
        assert np.isnan(to_float32(from_float32(nans, dtype), dtype)).all()


def test_the_shape_stays() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    for dtype in DTYPE_NAMES.values():
        assert np.array_equal(to_float32(from_float32(values, dtype), dtype), values)
