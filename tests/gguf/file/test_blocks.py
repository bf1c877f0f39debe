"""Blocks hold the values of MLX's formats: bit for bit where the table says so."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fusekit.formats import codebooks
from mlx_fusekit.formats.floats import STORAGE, Array, Float32, from_float32, to_float32
from mlx_fusekit.formats.quantization import (
    QuantizedRows,
    dequantize,
    quantize_nearest,
    to_block,
    to_matrix,
)
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.gguf.file.blocks import (
    block_type,
    decode,
    encode_nearest_q8_0,
    encode_quantized,
    encode_values,
)

ROWS, COLUMNS = 12, 256
#: bfloat16 of these magnitudes is a float16, subnormal or not; below, its last bit may be lost.
EXACT_BFLOAT16 = (2.0**-17, 2.0**16)


def random_scales(random: np.random.Generator, shape: tuple[int, int], dtype: str) -> Array:
    """Stored scales or biases that float16 holds: both signs, all magnitudes, zeros."""
    if dtype == "BF16":
        low, high = (int(np.float32(edge).view(np.uint32)) >> 16 for edge in EXACT_BFLOAT16)
        bits = random.integers(low, high, shape, dtype=np.uint16)
    else:
        bits = random.integers(0, 0x7C00, shape, dtype=np.uint16)
    bits[random.random(shape) < 0.05] = 0
    bits |= random.integers(0, 2, shape, dtype=np.uint16) << np.uint16(15)
    if dtype == "F32":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(STORAGE[dtype])


def random_rows(
    random: np.random.Generator, spec: QuantSpec, dtype: str, columns: int = COLUMNS
) -> QuantizedRows:
    codes = random.integers(0, 2**32, (ROWS, spec.words(columns)), dtype=np.uint32)
    shape = (ROWS, columns // spec.group_size)
    if spec.affine:
        return QuantizedRows(
            codes, random_scales(random, shape, dtype), random_scales(random, shape, dtype), dtype
        )
    largest = {"mxfp4": 252, "nvfp4": 126, "mxfp8": 246}[spec.mode]
    scales = random.integers(0, largest, shape, dtype=np.uint8, endpoint=True)
    return QuantizedRows(codes, scales, None, "U8")


def true_values(rows: QuantizedRows, spec: QuantSpec) -> Float32:
    return to_matrix(dequantize(rows, spec))


def read_by_gguf(data: Array, spec: QuantSpec) -> Float32:
    return gguf.quants.dequantize(data, block_type(spec))


def same_bits(first: Float32, second: Float32) -> bool:
    return np.array_equal(first.view(np.uint32), second.view(np.uint32))


def test_which_bfloat16_are_float16() -> None:
    """The range that the property test draws from is the whole range in which every one is."""
    values = to_float32(np.arange(1 << 16, dtype=np.uint16), "BF16")
    values = values[np.isfinite(values)]
    held = to_float32(from_float32(values, "F16"), "F16") == values
    low, high = EXACT_BFLOAT16
    within = (np.abs(values) >= low) & (np.abs(values) < high)
    assert held[within].all()
    assert not held[np.abs(values) >= high].any()
    just_below = (np.abs(values) < low) & (np.abs(values) >= low / 2)
    assert not held[just_below].all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@given(
    group_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["F16", "BF16", "F32"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30, deadline=None)
def test_affine_repack_is_bit_exact(bits: int, group_size: int, dtype: str, seed: int) -> None:
    spec = QuantSpec(bits, group_size)
    rows = random_rows(np.random.default_rng(seed), spec, dtype)
    data = encode_quantized(rows, spec)
    expected = GgmlType.Q5_1 if bits == 5 else GgmlType.Q4_1
    assert data.shape == gguf.quants.quant_shape_to_byte_shape((ROWS, COLUMNS), expected)
    assert same_bits(read_by_gguf(data, spec), true_values(rows, spec))


@pytest.mark.parametrize(("mode", "group_size"), [("mxfp4", 32), ("nvfp4", 16)])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_codebook_repack_is_exact(mode: str, group_size: int, seed: int) -> None:
    """Up to the sign of a zero: llama.cpp's codebook has no negative zero."""
    spec = QuantSpec(4, group_size, mode)
    rows = random_rows(np.random.default_rng(seed), spec, "U8")
    data = encode_quantized(rows, spec)
    assert np.array_equal(read_by_gguf(data, spec), true_values(rows, spec))


@pytest.mark.parametrize(("mode", "scale_codes"), [("mxfp4", 255), ("nvfp4", 127)])
def test_every_code_with_every_scale(mode: str, scale_codes: int) -> None:
    spec = QuantSpec(4, 32 if mode == "mxfp4" else 16, mode)
    columns = 64
    byte_of = np.arange(0, 16, 2, dtype=np.uint8)
    packed = np.tile(byte_of | (byte_of + 1) << 4, (scale_codes, columns // 16)).view(np.uint32)
    scales = np.repeat(np.arange(scale_codes, dtype=np.uint8)[:, None], columns // 4, axis=1)
    rows = QuantizedRows(packed, scales[:, : columns // spec.group_size], None, "U8")
    with np.errstate(over="ignore"):
        written = read_by_gguf(encode_quantized(rows, spec), spec)
        true = true_values(rows, spec)
    assert np.array_equal(written, true)
    assert len(np.unique(true)) > 15 * 4


def test_mxfp8_is_exact_in_bfloat16_from_scale_code_3_on() -> None:
    spec = QuantSpec(8, 32, "mxfp8")
    codes = np.array([c for c in range(256) if c & 127 != 127] + [0, 0], np.uint8)
    for scale in range(247):
        rows = QuantizedRows(
            codes.reshape(1, -1).view(np.uint32), np.full((1, 8), scale, np.uint8), None, "U8"
        )
        true = true_values(rows, spec)
        exact = np.array_equal(decode(encode_values(true, GgmlType.BF16), GgmlType.BF16), true)
        assert exact == (scale >= 3)
    assert float(codebooks.E8M0[246]) * 448 < float(np.finfo(np.float32).max)
    assert float(codebooks.E8M0[247]) * 448 > float(np.finfo(np.float32).max)


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("group_size", [32, 128])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_symmetric_grids_are_exact_in_q8_0(bits: int, group_size: int, seed: int) -> None:
    """A bias that is a whole number of steps, as in models that came from Q8_0 or GPTQ."""
    random = np.random.default_rng(seed)
    spec = QuantSpec(bits, group_size)
    rows = random_rows(random, spec, "F16")
    scales = random.normal(0, 0.02, rows.scales.shape).astype(np.float16)
    biases = (scales.astype(np.float32) * -(1 << (bits - 1))).astype(np.float16)
    rows = QuantizedRows(rows.codes, scales, biases, "F16")
    data = encode_nearest_q8_0(dequantize(rows, spec), rows, spec)
    assert np.array_equal(read_by_gguf(data, spec), true_values(rows, spec))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize(("bits", "group_size"), [(6, 64), (8, 64), (8, 128)])
def test_q8_0_is_closer_than_requantizing_the_values(
    bits: int, group_size: int, dtype: str
) -> None:
    weights = np.random.default_rng(0).standard_t(6, (64, 512)).astype(np.float32) / 50
    spec = QuantSpec(bits, group_size)
    rows = quantize_nearest(to_block(weights), spec, dtype)
    true = true_values(rows, spec)
    ours = read_by_gguf(encode_nearest_q8_0(dequantize(rows, spec), rows, spec), spec)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(true, GgmlType.Q8_0), GgmlType.Q8_0)
    assert np.square(ours - true).sum() < 0.95 * np.square(theirs - true).sum()


@pytest.mark.parametrize("value", [0.0, 1e-7, -3e-5, 0.5, 300.0])
def test_q8_0_of_constant_groups(value: float) -> None:
    """Where MLX's scale is tiny and its bias is everything."""
    spec = QuantSpec(8, 32)
    rows = quantize_nearest(to_block(np.full((4, 64), value, np.float32)), spec, "F16")
    true = true_values(rows, spec)
    written = read_by_gguf(encode_nearest_q8_0(dequantize(rows, spec), rows, spec), spec)
    assert np.abs(written - true).max() <= np.abs(true).max() * 0.005 + 2.0**-25


def test_q8_0_steps_below_float16s_normal_range_clip_nothing() -> None:
    """Such a step, rounded down to the next float16, would clip the block's largest values."""
    random = np.random.default_rng(0)
    spec = QuantSpec(8, 32)
    weights = random.normal(0, 1e-4, (64, 64)).astype(np.float32)
    rows = quantize_nearest(to_block(weights), spec, "F32")
    true = true_values(rows, spec)
    written = read_by_gguf(encode_nearest_q8_0(dequantize(rows, spec), rows, spec), spec)
    blocks = np.abs(true).reshape(-1, 32).max(axis=1, keepdims=True)
    half_steps = (blocks / 127 + 2.0**-24) * 0.51
    assert (np.abs(written - true).reshape(-1, 32) <= half_steps).all()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_values_as_gguf_writes_them(name: str) -> None:
    values = np.random.default_rng(0).normal(0, 1, (5, 96)).astype(np.float32)
    ggml_type = GgmlType[name]
    theirs = gguf.quants.quantize(values, ggml_type)
    ours = encode_values(values, ggml_type)
    assert np.array_equal(ours, theirs.view(np.uint8))
    assert np.array_equal(decode(ours, ggml_type), gguf.quants.dequantize(theirs, ggml_type))
