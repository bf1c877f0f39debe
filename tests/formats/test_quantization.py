"""Our float32 arithmetic against MLX's own quantization, for every format."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.formats import codebooks
from mlx_fusekit.formats.floats import from_float32, to_float32
from mlx_fusekit.formats.quantization import (
    QuantizedRows,
    dequantize,
    pack,
    quantize_nearest,
    to_block,
    to_matrix,
    unpack,
)
from mlx_fusekit.formats.specs import AFFINE_BITS, AFFINE_GROUPS, CODEBOOK_MODES, QuantSpec

DTYPES = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}


def stored(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def affine(weight: mx.array, spec: QuantSpec, dtype: str) -> tuple[QuantizedRows, np.ndarray]:
    """A weight quantized by MLX, and its float32 values as MLX computes them."""
    codes, scales, biases = mx.quantize(weight.astype(DTYPES[dtype]), spec.group_size, spec.bits)
    rows = QuantizedRows(np.array(codes), stored(scales), stored(biases), dtype)
    values = mx.dequantize(
        codes,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        spec.group_size,
        spec.bits,
    )
    return rows, np.array(values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", AFFINE_GROUPS)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_affine_dequantize_is_exact(bits: int, group_size: int, dtype: str) -> None:
    spec = QuantSpec(bits, group_size)
    rows, values = affine(mx.random.normal((48, 384)), spec, dtype)
    assert np.array_equal(to_matrix(dequantize(rows, spec)), values)


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group_size", AFFINE_GROUPS)
def test_affine_nearest_is_not_worse_than_mlx(bits: int, group_size: int) -> None:
    spec = QuantSpec(bits, group_size)
    weight = mx.random.normal((64, 512)).astype(mx.bfloat16)
    _, by_mlx = affine(weight, spec, "BF16")
    exact = np.array(weight.astype(mx.float32))
    ours = to_matrix(dequantize(quantize_nearest(to_block(exact), spec, "BF16"), spec))
    error = np.square(ours - exact).sum()
    assert error <= np.square(by_mlx - exact).sum() * 1.0001
    assert error > 0


def test_affine_nearest_without_rounded_scales_is_mlx() -> None:
    """With float32 scales the grid and the codes are those of ``mx.quantize``."""
    spec = QuantSpec(4, 64)
    weight = mx.random.normal((64, 512))
    rows, _ = affine(weight, spec, "F32")
    ours = quantize_nearest(to_block(np.array(weight)), spec, "F32")
    assert np.allclose(ours.scales, rows.scales, rtol=1e-6)
    assert np.allclose(ours.biases, rows.biases, rtol=1e-6)
    codes = unpack(ours.codes, 4).astype(int), unpack(rows.codes, 4).astype(int)
    # A value half-way between two points may fall either way.
    assert (codes[0] != codes[1]).mean() < 1e-3


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-30])
def test_affine_nearest_of_a_constant(value: float) -> None:
    spec = QuantSpec(4, 32)
    block = np.full((32, 3, 2), value, np.float32)
    values = dequantize(quantize_nearest(block.copy(), spec, "F16"), spec)
    assert np.abs(values - block).max() <= 2e-3 * abs(value) + 1e-6


@pytest.mark.parametrize("planes", [1, 32])
def test_a_block_is_its_matrix_in_planes(planes: int) -> None:
    matrix = np.arange(3 * 96).reshape(3, 96)
    block = to_block(matrix, planes)
    assert block.shape == (planes, 3, 96 // planes)
    assert block[-1, 2, 1] == matrix[2, 2 * planes - 1]
    assert np.array_equal(to_matrix(block), matrix)


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_pack_inverts_unpack(bits: int, blocks: int, rows: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**32, (rows, blocks * bits), np.uint32)
    codes = unpack(words, bits)
    assert codes.shape == (32, rows, blocks)
    assert codes.max() < 1 << bits
    assert np.array_equal(pack(codes, bits), words)


def test_unpack_reads_a_little_endian_bit_stream() -> None:
    codes = [5, 0, 7, 1, 2, 6, 3, 4] * 4
    stream = sum(code << (3 * place) for place, code in enumerate(codes))
    words = np.array([[(stream >> shift) & 0xFFFFFFFF for shift in (0, 32, 64)]], np.uint32)
    assert unpack(words, 3)[:, 0, 0].tolist() == codes


CODEBOOKS = [(mode, False) for mode in CODEBOOK_MODES] + [("nvfp4", True)]


def codebook(
    weight: mx.array, spec: QuantSpec, with_global: bool
) -> tuple[QuantizedRows, np.ndarray]:
    more = {"global_scale": mx.max(mx.abs(weight))} if with_global else {}
    codes, scales = mx.quantize(weight, spec.group_size, spec.bits, mode=spec.mode, **more)
    values = mx.dequantize(
        codes, scales, None, spec.group_size, spec.bits, spec.mode, dtype=mx.float32, **more
    )
    global_scale = more["global_scale"].item() if with_global else None
    return QuantizedRows(np.array(codes), np.array(scales), None, "U8", global_scale), np.array(
        values
    )


@pytest.mark.parametrize(("mode", "with_global"), CODEBOOKS)
def test_codebook_dequantize_is_exact(mode: str, with_global: bool) -> None:
    spec = QuantSpec(*CODEBOOK_MODES[mode], mode)
    rows, values = codebook(mx.random.normal((48, 256)) * 0.02, spec, with_global)
    assert np.array_equal(to_matrix(dequantize(rows, spec)), values)


@pytest.mark.parametrize(("mode", "with_global"), CODEBOOKS)
def test_codebook_nearest_is_not_worse_than_mlx(mode: str, with_global: bool) -> None:
    spec = QuantSpec(*CODEBOOK_MODES[mode], mode)
    weight = mx.random.normal((64, 256)) * 0.02
    rows, by_mlx = codebook(weight, spec, with_global)
    exact = np.array(weight)
    ours = to_matrix(
        dequantize(quantize_nearest(to_block(exact), spec, "U8", rows.global_scale), spec)
    )
    error = np.square(ours - exact).sum()
    assert 0 < error <= np.square(by_mlx - exact).sum() * 1.0001


@pytest.mark.parametrize(("mode", "with_global"), CODEBOOKS)
def test_codebook_values_survive(mode: str, with_global: bool) -> None:
    """Values that are on a codebook's grid stay there, but for nvfp4's rounded scales."""
    spec = QuantSpec(*CODEBOOK_MODES[mode], mode)
    rows, values = codebook(mx.random.normal((64, 256)) * 0.02, spec, with_global)
    again = quantize_nearest(to_block(values), spec, "U8", rows.global_scale)
    unchanged = values == to_matrix(dequantize(again, spec))
    assert unchanged.mean() > (0.99 if mode == "nvfp4" else 0.9999)


def test_e4m3_round_trip() -> None:
    codes = np.flatnonzero(~np.isnan(codebooks.E4M3))
    assert len(codes) == 254
    assert np.array_equal(codebooks.encode_e4m3(codebooks.E4M3[codes]), codes)


def test_e4m3_rounds_to_nearest() -> None:
    values = np.random.default_rng(0).normal(0, 30, 2000).astype(np.float32)
    table = codebooks.E4M3[np.isfinite(codebooks.E4M3)]
    nearest = np.abs(values[:, None] - table[None]).min(axis=1)
    chosen = np.abs(values - codebooks.E4M3[codebooks.encode_e4m3(values)])
    assert np.allclose(chosen, nearest)


def test_e2m1_rounds_to_nearest_and_ties_to_even() -> None:
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0, -2.5], np.float32)
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -2.0]
    assert codebooks.E2M1[codebooks.encode_e2m1(ties)].tolist() == expected


def test_bfloat16_rounds_as_mlx_does() -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 20000, np.uint32)
    values = bits.view(np.float32)
    ours = from_float32(values, "BF16")
    by_mlx = np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))
    nan = np.isnan(values)
    assert np.array_equal(ours[~nan], by_mlx[~nan])
    assert np.isnan(to_float32(ours[nan], "BF16")).all()


@pytest.mark.parametrize(
    "bad", [(7, 64, "affine"), (4, 16, "affine"), (4, 64, "mxfp4"), (4, 32, "q4")]
)
def test_unknown_formats_are_refused(bad: tuple[int, int, str]) -> None:
    with pytest.raises(ConfigurationError, match="MLX has no quantization"):
        QuantSpec(*bad)
