"""llama.cpp's own C code reads our blocks as gguf-py does."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fusekit.formats.floats import Array, Float32
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
    encode_nearest_q8_0,
    encode_quantized,
    encode_values,
)

ROWS, COLUMNS = 16, 256
READERS = {
    GgmlType.Q4_1: "dequantize_row_q4_1",
    GgmlType.Q5_1: "dequantize_row_q5_1",
    GgmlType.Q8_0: "dequantize_row_q8_0",
    GgmlType.MXFP4: "dequantize_row_mxfp4",
    GgmlType.NVFP4: "dequantize_row_nvfp4",
    GgmlType.F16: "ggml_fp16_to_fp32_row",
    GgmlType.BF16: "ggml_bf16_to_fp32_row",
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    llama_cpp = pytest.importorskip("llama_cpp")
    (path,) = (
        path
        for name in ("libggml-base.so", "libggml-base.dylib")
        if (path := Path(llama_cpp.__file__).parent / "lib" / name).exists()
    )
    return ctypes.CDLL(str(path))


def read_by_llama(library: ctypes.CDLL, data: Array, ggml_type: GgmlType) -> Float32:
    values = np.empty((ROWS, COLUMNS), np.float32)
    data = np.ascontiguousarray(data)
    assert library.ggml_validate_row_data(
        ctypes.c_int(ggml_type), ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes)
    )
    read = getattr(library, READERS[ggml_type])
    read.restype = None
    read(
        ctypes.c_void_p(data.ctypes.data),
        ctypes.c_void_p(values.ctypes.data),
        ctypes.c_int64(values.size),
    )
    return values


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-12, 7))
@settings(max_examples=20, deadline=None)
def test_affine(library: ctypes.CDLL, bits: int, seed: int, exponent: int) -> None:
    random, spec = np.random.default_rng(seed), QuantSpec(bits, 64)
    codes = random.integers(0, 2**32, (ROWS, spec.words(COLUMNS)), dtype=np.uint32)
    grids = [np.ldexp(random.normal(0, 1, (ROWS, COLUMNS // 64)), exponent) for _ in range(2)]
    rows = QuantizedRows(codes, *(grid.astype(np.float16) for grid in grids), "F16")
    found = read_by_llama(library, encode_quantized(rows, spec), block_type(spec))
    assert np.array_equal(found.view("<u4"), to_matrix(dequantize(rows, spec)).view("<u4"))


@pytest.mark.parametrize(
    ("mode", "group_size", "largest"), [("mxfp4", 32, 252), ("nvfp4", 16, 126)]
)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_codebooks(
    library: ctypes.CDLL, mode: str, group_size: int, largest: int, seed: int
) -> None:
    random, spec = np.random.default_rng(seed), QuantSpec(4, group_size, mode)
    codes = random.integers(0, 2**32, (ROWS, spec.words(COLUMNS)), dtype=np.uint32)
    shape = (ROWS, COLUMNS // group_size)
    scales = random.integers(0, largest, shape, dtype=np.uint8, endpoint=True)
    rows = QuantizedRows(codes, scales, None, "U8")
    found = read_by_llama(library, encode_quantized(rows, spec), block_type(spec))
    assert np.array_equal(found, to_matrix(dequantize(rows, spec)))


@pytest.mark.parametrize("bits", [6, 8])
def test_q8_0(library: ctypes.CDLL, bits: int) -> None:
    """Also code -128, which llama.cpp's own quantizer does not make."""
    weights = np.random.default_rng(0).normal(0, 0.02, (ROWS, COLUMNS)).astype(np.float32)
    spec = QuantSpec(bits, 64)
    rows = quantize_nearest(to_block(weights), spec, "F16")
    scales = np.abs(rows.scales)
    biases = (scales.astype(np.float32) * -(1 << (bits - 1))).astype(np.float16)
    for chosen in (rows, QuantizedRows(rows.codes, scales, biases, "F16")):
        data = encode_nearest_q8_0(dequantize(chosen, spec), chosen, spec)
        found = read_by_llama(library, data, GgmlType.Q8_0)
        assert np.array_equal(found, gguf.quants.dequantize(data, GgmlType.Q8_0))
    assert np.array_equal(found, to_matrix(dequantize(chosen, spec)))
    assert bits == 6 or -128 in data.reshape(-1, 34)[:, 2:].view(np.int8)


@pytest.mark.parametrize("ggml_type", [GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0])
def test_values(library: ctypes.CDLL, ggml_type: GgmlType) -> None:
    values = np.random.default_rng(0).normal(0, 0.02, (ROWS, COLUMNS)).astype(np.float32)
    data = encode_values(values, ggml_type)
    found = read_by_llama(library, data, ggml_type)
    assert np.array_equal(found, gguf.quants.dequantize(data, ggml_type))
