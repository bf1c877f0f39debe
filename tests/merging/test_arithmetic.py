"""The arithmetic of merging, against plain NumPy in float64."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.updates import FullUpdate
from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.formats.floats import STORAGE, Float32, from_float32, to_float32
from mlx_fusekit.formats.quantization import to_block, to_matrix
from mlx_fusekit.merging.arithmetic import BaseBlock, RowRange, merge, unchanged_rows

EXPERTS, ROWS, COLUMNS, RANK = 3, 12, 96, 4
PART = RowRange(expert=2, first=3, last=10)
PLANES = [1, 32]


def normal(*shape: int, seed: int) -> Float32:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def low_rank(magnitude: Float32 | None = None) -> LowRankUpdate:
    return LowRankUpdate(
        normal(EXPERTS, ROWS, RANK, seed=1), normal(EXPERTS, RANK, COLUMNS, seed=2), magnitude
    )


def block_of(matrix: npt.NDArray[np.floating], planes: int = 32) -> Float32:
    return to_block(matrix[PART.first : PART.last].astype(np.float32), planes)


def exact_delta(update: LowRankUpdate) -> npt.NDArray[np.float64]:
    up, down = (m[PART.expert].astype(np.float64) for m in (update.up, update.down))
    return up @ down


def full(path: Path, values: Float32, dtype: str = "F32") -> FullUpdate:
    stored = from_float32(values, dtype)
    path.write_bytes(b"head" + stored.tobytes())
    assert stored.dtype == STORAGE[dtype]
    return FullUpdate(TensorRef("w", dtype, values.shape, path, 4))


WEIGHT = normal(ROWS, COLUMNS, seed=0)


# --- merging ----------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", PLANES)
def test_lora_adds_the_experts_product(planes: int) -> None:
    update = low_rank()
    merged = merge(BaseBlock(block_of(WEIGHT, planes)), update, PART)
    assert merged.shape == (planes, 7, COLUMNS // planes)
    expected = (WEIGHT + exact_delta(update))[PART.first : PART.last]
    np.testing.assert_allclose(to_matrix(merged), expected, atol=1e-5)


def test_products_larger_than_a_slab_are_the_same() -> None:
    """Rows go through the BLAS library in slabs."""
    rows, columns = 300, 1024
    update = LowRankUpdate(normal(1, rows, 8, seed=1), normal(1, 8, columns, seed=2))
    whole = RowRange(0, 0, rows)
    merged = merge(BaseBlock(np.zeros((1, rows, columns), np.float32)), update, whole)
    np.testing.assert_allclose(
        to_matrix(merged), update.up[0].astype(np.float64) @ update.down[0], atol=1e-4
    )


def test_doras_rows_have_the_learned_norms() -> None:
    magnitude = np.abs(normal(ROWS, seed=3)) + 1
    update = low_rank(magnitude)
    merged = to_matrix(merge(BaseBlock(block_of(WEIGHT)), update, PART))
    adapted = WEIGHT + exact_delta(update)
    expected = magnitude[:, None] * adapted / np.linalg.norm(adapted, axis=1, keepdims=True)
    np.testing.assert_allclose(merged, expected[PART.first : PART.last], atol=1e-5)


def test_doras_norms_are_those_of_the_weights_as_mlx_lm_rounds_them() -> None:
    magnitude = np.abs(normal(ROWS, seed=3)) + 1
    update = low_rank(magnitude)
    rounded = to_float32(from_float32(WEIGHT + np.float32(0.3), "BF16"), "BF16")
    base = BaseBlock(block_of(WEIGHT), lambda: block_of(rounded))
    merged = to_matrix(merge(base, update, PART))
    delta = exact_delta(update)
    norms = np.linalg.norm(rounded + delta, axis=1, keepdims=True)
    expected = (magnitude[:, None] * (WEIGHT + delta) / norms)[PART.first : PART.last]
    np.testing.assert_allclose(merged, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_full_fine_tune_replaces(tmp_path: Path, dtype: str) -> None:
    values = normal(EXPERTS, ROWS, COLUMNS, seed=4)
    update = full(tmp_path / "w", values, dtype)
    merged = to_matrix(merge(BaseBlock(block_of(WEIGHT)), update, PART))
    exact = to_float32(from_float32(values, dtype), dtype)
    assert np.array_equal(merged, exact[PART.expert, PART.first : PART.last])


def test_a_full_fine_tune_of_a_module_without_experts(tmp_path: Path) -> None:
    update = full(tmp_path / "w", normal(ROWS, COLUMNS, seed=4))
    rows = RowRange(0, 2, 5)
    merged = merge(BaseBlock(to_block(WEIGHT[2:5])), update, rows)
    assert np.array_equal(to_matrix(merged), normal(ROWS, COLUMNS, seed=4)[2:5])


# --- what stays -------------------------------------------------------------------------------


def test_rows_of_zeros_in_up_stay() -> None:
    update = low_rank()
    update.up[PART.expert, [3, 6, 9]] = 0
    update.up[0] = 0  # another expert's
    still = unchanged_rows(BaseBlock(block_of(WEIGHT)), update, PART)
    assert np.flatnonzero(still).tolist() == [0, 3, 6]


def test_all_rows_stay_where_down_is_zero() -> None:
    update = low_rank()
    update.down[PART.expert] = 0
    assert unchanged_rows(BaseBlock(block_of(WEIGHT)), update, PART).all()
    other = RowRange(1, PART.first, PART.last)
    assert not unchanged_rows(BaseBlock(block_of(WEIGHT)), update, other).any()


def test_doras_rows_stay_where_their_norm_is_the_learned_one() -> None:
    norms = np.linalg.norm(WEIGHT, axis=1)
    norms[4] *= 1 + 1e-3
    norms[5] *= 1 + 1e-7  # as sums of float32 differ
    update = low_rank(norms)
    update.down[PART.expert] = 0
    still = unchanged_rows(BaseBlock(block_of(WEIGHT)), update, PART)
    assert np.flatnonzero(~still).tolist() == [1]
    # The norm that counts is the one of the weights as mlx-lm rounds them.
    base = BaseBlock(block_of(WEIGHT), lambda: block_of(2 * WEIGHT))
    assert not unchanged_rows(base, update, PART).any()


def test_rows_that_a_full_fine_tune_repeats_stay(tmp_path: Path) -> None:
    values = np.stack([WEIGHT] * EXPERTS)
    values[PART.expert, 4, -1] += 1
    values[0] += 1
    still = unchanged_rows(BaseBlock(block_of(WEIGHT)), full(tmp_path / "w", values), PART)
    assert np.flatnonzero(~still).tolist() == [1]
