"""Factors in place, against NumPy's in float64, over one block, several, and parts of one."""

import numpy as np
import pytest

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.requantize import cholesky
from mlx_fusekit.requantize.cholesky import (
    Cholesky,
    add_cross_products,
    add_products,
    make_symmetric,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "_BLOCK", 16)
    monkeypatch.setattr(cholesky, "_ROWS", 40)


def normal(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def positive(columns: int) -> Float32:
    x = normal(3 * columns, columns)
    return x.T @ x / columns + np.eye(columns, dtype=np.float32)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100, 128])
def test_a_matrix_is_factored_and_solved_with(columns: int) -> None:
    matrix, wanted = positive(columns), normal(columns, 7)
    before, order = matrix.copy(), np.random.default_rng(1).permutation(columns)
    factor = Cholesky.of(matrix, order)
    np.testing.assert_array_equal(matrix, before)
    whole = factor.unit.T @ np.diag(factor.pivots) @ factor.unit
    np.testing.assert_allclose(whole, matrix[np.ix_(order, order)], rtol=1e-4, atol=1e-4)
    assert not np.tril(factor.unit, -1).any()
    found = np.linalg.solve(matrix.astype(np.float64), wanted)
    np.testing.assert_allclose(factor.solved(wanted), found, rtol=1e-3, atol=1e-4)
    squares = np.einsum("cr,cr->r", wanted, matrix.astype(np.float64) @ wanted)
    np.testing.assert_allclose(factor.squares(wanted), squares, rtol=1e-4)


@pytest.mark.parametrize("place", [0, 20, 99])
def test_what_is_not_positive_definite_is_said(place: int) -> None:
    matrix = positive(100)
    matrix[place, place] = -1
    with pytest.raises(np.linalg.LinAlgError):
        Cholesky.of(matrix, np.arange(100))


def test_products_are_added_up() -> None:
    x, y = normal(30, 100), normal(30, 9, seed=1)
    sums, cross = np.ones((100, 100), np.float32), np.ones((100, 9), np.float32)
    add_products(sums, x)
    add_cross_products(cross, x, y)
    np.testing.assert_allclose(np.triu(sums), np.triu(1 + x.T @ x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cross, 1 + x.T @ y, rtol=1e-4, atol=1e-4)
    make_symmetric(sums)
    np.testing.assert_array_equal(sums, sums.T)
    np.testing.assert_allclose(sums, 1 + x.T @ x, rtol=1e-4, atol=1e-4)
