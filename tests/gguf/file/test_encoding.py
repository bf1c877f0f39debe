"""The type a tensor gets: exact only where it is, rounded only where that costs next to nothing."""

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fusekit.checkpoint.sanitized import ArrayTensor
from mlx_fusekit.formats.floats import Array, Float32, from_float32
from mlx_fusekit.formats.quantization import QuantizedRows, dequantize, pack, to_block, to_matrix
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.gguf.file.blocks import (
    decode,
    encode_nearest_q8_0,
    encode_quantized,
    encode_values,
)
from mlx_fusekit.gguf.file.encoding import choose_converted, choose_type
from mlx_fusekit.gguf.file.rows import TensorRows
from mlx_fusekit.gguf.file.scales import scan_scales

ROWS, COLUMNS = 6, 128
AFFINE = [QuantSpec(bits, 64) for bits in (2, 4, 5, 6, 8)]
CODEBOOKS = [QuantSpec(4, 32, "mxfp4"), QuantSpec(8, 32, "mxfp8"), QuantSpec(4, 16, "nvfp4")]


def tensor(rows: QuantizedRows, spec: QuantSpec, global_scale: float | None = None) -> TensorRows:
    parts: dict[str, tuple[Array, str]] = {
        "weight": (rows.codes, "U32"),
        "scales": (rows.scales, rows.scale_dtype),
    }
    if rows.biases is not None:
        parts["biases"] = (rows.biases, rows.scale_dtype)
    sources = {leaf: ArrayTensor(leaf, dtype, a.shape, a) for leaf, (a, dtype) in parts.items()}
    shape = (len(rows.codes), spec.columns(rows.codes.shape[1]))
    scales = None if global_scale is None else np.array([global_scale], np.float32)
    return TensorRows(sources, spec, shape, None, scales)


def affine(
    spec: QuantSpec, scales: Any, biases: Any, dtype: str = "BF16", codes: Any = None
) -> QuantizedRows:
    shape = (ROWS, COLUMNS // spec.group_size)
    random = np.random.default_rng(0)
    if codes is None:
        codes = random.integers(0, 1 << spec.bits, (ROWS, COLUMNS), dtype=np.uint32)
    stored = [
        from_float32(np.array(np.broadcast_to(np.asarray(part, np.float32), shape)), dtype)
        for part in (scales, biases)
    ]
    return QuantizedRows(pack(to_block(codes), spec.bits), *stored, dtype)


def written(rows: QuantizedRows, spec: QuantSpec, ggml_type: GgmlType) -> Float32:
    values = dequantize(rows, spec)
    if ggml_type in (GgmlType.F32, GgmlType.F16, GgmlType.BF16):
        data = encode_values(to_matrix(values), ggml_type)
    elif ggml_type == GgmlType.Q8_0:
        data = encode_nearest_q8_0(values, rows, spec)
    else:
        data = encode_quantized(rows, spec)
    return decode(data, ggml_type)


def chosen(
    rows: QuantizedRows, spec: QuantSpec, outtype: str = "auto", **more: Any
) -> tuple[GgmlType, bool]:
    of = tensor(rows, spec, **more)
    return choose_type(spec, scan_scales(of), of.columns, outtype)


def random_affine(seed: int, spec: QuantSpec, dtype: str, exponent: int, spread: int) -> Any:
    random = np.random.default_rng(seed)
    shape = (ROWS, COLUMNS // spec.group_size)
    scales = np.ldexp(random.normal(0, 1, shape), exponent + random.integers(0, spread, shape))
    return affine(spec, scales, scales * random.integers(-20, 20, shape), dtype)


@given(
    seed=st.integers(0, 2**32 - 1),
    spec=st.sampled_from(AFFINE),
    dtype=st.sampled_from(["F16", "BF16", "F32"]),
    exponent=st.integers(-13, 8),
    outtype=st.sampled_from(["auto", "lossless", "f32", "f16", "bf16", "q8_0"]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_called_exact_is(
    seed: int, spec: QuantSpec, dtype: str, exponent: int, outtype: str
) -> None:
    rows = random_affine(seed, spec, dtype, exponent, 4)
    ggml_type, exact = chosen(rows, spec, outtype)
    true = to_matrix(dequantize(rows, spec))
    if exact:
        assert np.array_equal(written(rows, spec, ggml_type), true)
    assert exact or outtype != "lossless"


@given(
    seed=st.integers(0, 2**32 - 1),
    spec=st.sampled_from(AFFINE),
    dtype=st.sampled_from(["BF16", "F32"]),
    exponent=st.integers(-40, 14),
)
@settings(max_examples=60, deadline=None)
def test_auto_keeps_the_error_small_whatever_the_range(
    seed: int, spec: QuantSpec, dtype: str, exponent: int
) -> None:
    """Q8_0 of 6- and 8-bit weights costs less than 1 %, all else at most about 1e-3."""
    rows = random_affine(seed, spec, dtype, exponent, 2)
    ggml_type, _ = chosen(rows, spec)
    true = to_matrix(dequantize(rows, spec)).astype(np.float64)
    error = written(rows, spec, ggml_type) - true
    bound = 1e-2 if ggml_type == GgmlType.Q8_0 else 2e-3
    assert np.square(error).sum() <= bound**2 * np.square(true).sum()


@pytest.mark.parametrize(
    ("spec", "scale", "bias", "dtype", "expected"),
    [
        (QuantSpec(4, 64), 0.01, -0.07, "BF16", (GgmlType.Q4_1, True)),
        (QuantSpec(2, 64), 0.01, -0.07, "F16", (GgmlType.Q4_1, True)),
        (QuantSpec(5, 64), -0.01, 0.1, "BF16", (GgmlType.Q5_1, True)),
        (QuantSpec(4, 64), 0.01, -0.07, "F32", (GgmlType.Q4_1, False)),
        (QuantSpec(4, 64), 0.25, -2.0, "F32", (GgmlType.Q4_1, True)),
        (QuantSpec(4, 64), 0.25 + 2.0**-24, -2.0, "F32", (GgmlType.Q4_1, False)),
        (QuantSpec(4, 64), 0.25, -2.0 - 2.0**-21, "F32", (GgmlType.Q4_1, False)),
        (QuantSpec(6, 64), 0.01, -0.33, "BF16", (GgmlType.Q8_0, False)),
        (QuantSpec(8, 64), 0.25, -32.0, "BF16", (GgmlType.Q8_0, True)),
        (QuantSpec(8, 64), 0.25, -31.75, "BF16", (GgmlType.Q8_0, False)),
        (QuantSpec(4, 64), 2.0**-18 * 1.0234375, 0.0, "BF16", (GgmlType.F16, False)),
        (QuantSpec(4, 64), 2.0**-26, 0.0, "BF16", (GgmlType.F32, True)),
        (QuantSpec(4, 64), 2.0**17, 0.0, "BF16", (GgmlType.F32, True)),
        (QuantSpec(8, 64), 2.0**-30, 0.0, "BF16", (GgmlType.F32, True)),
    ],
)
def test_auto(spec: QuantSpec, scale: float, bias: float, dtype: str, expected: Any) -> None:
    assert chosen(affine(spec, scale, bias, dtype), spec) == expected


@pytest.mark.parametrize(
    ("spec", "scale", "bias", "dtype", "expected"),
    [
        (QuantSpec(4, 64), 0.01, -0.07, "BF16", GgmlType.Q4_1),
        (QuantSpec(4, 64), 0.01, -0.07, "F32", GgmlType.F32),
        (QuantSpec(6, 64), 0.01, -0.33, "BF16", GgmlType.F32),
        (QuantSpec(8, 64), 0.25, -32.0, "BF16", GgmlType.Q8_0),
    ],
)
def test_lossless(spec: QuantSpec, scale: float, bias: float, dtype: str, expected: Any) -> None:
    assert chosen(affine(spec, scale, bias, dtype), spec, "lossless") == (expected, True)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_zeros_are_exact_whatever_their_scale(bits: int) -> None:
    """MLX gives them a scale of 1e-7, which float16 does not hold."""
    spec = QuantSpec(bits, 64)
    bias = -0.125 * (1 << (bits - 1))
    codes = np.random.default_rng(0).integers(0, 1 << bits, (ROWS, COLUMNS), dtype=np.uint32)
    codes[2], codes[4, :64] = 0, 0
    scales, biases = np.full((ROWS, 2), 0.125), np.full((ROWS, 2), bias)
    scales[2], biases[2] = 1e-7, 0
    scales[4, 0], biases[4, 0] = 1e-7, 0
    rows = affine(spec, scales, biases, codes=codes)
    ggml_type, exact = chosen(rows, spec, "lossless")
    assert ggml_type == (GgmlType.Q4_1 if bits == 4 else GgmlType.Q8_0)
    assert exact
    assert np.array_equal(written(rows, spec, ggml_type), to_matrix(dequantize(rows, spec)))
    codes[4, 63] = 1
    assert not scan_scales(tensor(affine(spec, scales, biases, codes=codes), spec)).exact


@pytest.mark.parametrize("spec", CODEBOOKS, ids=str)
def test_codebooks(spec: QuantSpec) -> None:
    shape = (ROWS, COLUMNS // spec.group_size)
    codes = np.zeros((ROWS, spec.words(COLUMNS)), np.uint32)
    rows = QuantizedRows(codes, np.full(shape, 100, np.uint8), None, "U8")
    own = {"mxfp4": GgmlType.MXFP4, "mxfp8": GgmlType.BF16, "nvfp4": GgmlType.NVFP4}[spec.mode]
    assert chosen(rows, spec) == chosen(rows, spec, "lossless") == (own, True)
    assert chosen(rows, spec, "f32") == (GgmlType.F32, True)


@pytest.mark.parametrize(("scale", "exact"), [(2, False), (3, True), (246, True)])
def test_mxfp8_in_bfloat16(scale: int, exact: bool) -> None:
    codes = np.arange(1, ROWS * COLUMNS + 1, dtype=np.uint32) % 127
    codes = codes.astype(np.uint8).reshape(ROWS, COLUMNS).view(np.uint32)
    rows = QuantizedRows(codes, np.full((ROWS, COLUMNS // 32), scale, np.uint8), None, "U8")
    assert chosen(rows, CODEBOOKS[1]) == (GgmlType.BF16, exact)
    lossless, _ = chosen(rows, CODEBOOKS[1], "lossless")
    assert lossless == (GgmlType.BF16 if exact else GgmlType.F32)


def test_nvfp4_that_has_no_blocks_becomes_float() -> None:
    spec = QuantSpec(4, 16, "nvfp4")
    codes = np.random.default_rng(0).integers(0, 2**32, (ROWS, spec.words(96)), dtype=np.uint32)
    rows = QuantizedRows(codes, np.full((ROWS, 6), 56, np.uint8), None, "U8")
    assert chosen(rows, spec) == chosen(rows, spec, "lossless") == (GgmlType.F16, True)
    assert np.array_equal(written(rows, spec, GgmlType.F16), to_matrix(dequantize(rows, spec)))
    assert chosen(rows, spec, global_scale=0.7) == (GgmlType.F16, False)
    assert chosen(rows, spec, "lossless", global_scale=0.7) == (GgmlType.F32, True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("where", ["scale", "bias"])
def test_scales_that_make_weights_infinite_are_seen(bad: float, where: str) -> None:
    scales, biases = np.ones((ROWS, 2)), np.ones((ROWS, 2))
    (scales if where == "scale" else biases)[3, 1] = bad
    facts = scan_scales(tensor(affine(AFFINE[1], scales, biases), AFFINE[1]))
    assert facts.finite == (bad == 3e38 and where == "bias")


@pytest.mark.parametrize(
    ("spec", "bad"), [*zip(CODEBOOKS, (255, 255, 127), strict=True), (CODEBOOKS[0], 253)]
)
def test_bad_scale_codes_are_seen(spec: QuantSpec, bad: int) -> None:
    scales = np.full((ROWS, COLUMNS // spec.group_size), 60, np.uint8)
    codes = np.zeros((ROWS, spec.words(COLUMNS)), np.uint32)
    assert scan_scales(tensor(QuantizedRows(codes, scales, None, "U8"), spec)).finite
    scales[1, 1] = bad
    assert not scan_scales(tensor(QuantizedRows(codes, scales, None, "U8"), spec)).finite


def test_rows_of_broken_blocks_become_f16() -> None:
    assert choose_converted(96, "q8_0") == GgmlType.Q8_0
    assert choose_converted(80, "q8_0") == GgmlType.F16
    assert choose_converted(80, "bf16") == GgmlType.BF16
