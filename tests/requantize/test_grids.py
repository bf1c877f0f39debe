"""Grids: what is solved on them is what is stored, and nearest is nearest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.formats import AFFINE, CODEBOOKS, FORMATS, hard_weights

from mlx_fusekit.formats import codebooks
from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import TargetFormat, to_block, to_matrix
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.requantize.grids import (
    AffineGrid,
    CodebookGrid,
    Grid,
    fitted_grid,
    grid_of,
    nearest_of,
    values_of,
)

COLUMNS, ROWS = 128, 12


def rounded(grid: Grid, values: Float32) -> Float32:
    size = len(values) // grid.groups
    return np.stack([grid.nearest(column, i // size) for i, column in enumerate(values)])


def points(grid: Grid, group: int) -> Float32:
    """All values a group can hold, ``[codes, rows]``."""
    if isinstance(grid, AffineGrid):
        codes = np.arange(1 << grid.bits, dtype=np.float32)[:, None]
        return codes * grid.scales[group] + grid.biases[group]
    assert isinstance(grid, CodebookGrid)
    table = codebooks.E2M1 if grid.spec.bits == 4 else codebooks.E4M3[~np.isnan(codebooks.E4M3)]
    return table[:, None] * grid.scales[group]


def grids(target: TargetFormat, weights: Float32) -> list[Grid]:
    start = grid_of(nearest_of(weights, target), target.spec)
    fitted = fitted_grid(weights, np.linspace(0, 2, len(weights), dtype=np.float32), target)
    some_rows = np.arange(weights.shape[1]) % 2 == 0
    some_groups = np.random.default_rng(3).random((fitted.groups, weights.shape[1])) < 0.5
    return [start, fitted, start.mixed(fitted, some_rows), fitted.mixed(start, some_groups)]


@pytest.mark.parametrize("name", FORMATS)
def test_values_on_a_grid_are_stored_bit_for_bit(name: str) -> None:
    target = FORMATS[name]
    weights = hard_weights(COLUMNS, ROWS)
    wild = weights + np.random.default_rng(1).normal(0, 0.1, weights.shape).astype(np.float32)
    for grid in grids(target, weights):
        assert grid.groups == COLUMNS // target.spec.group_size
        for wanted in (weights, wild, 1000 * wild):
            values = rounded(grid, wanted)
            stored = grid.quantized(values)
            assert (stored.scale_dtype, stored.global_scale) == (
                target.scale_dtype,
                target.global_scale,
            )
            np.testing.assert_array_equal(values_of(stored, target.spec), values)
            np.testing.assert_array_equal(rounded(grid, values), values)
            again = grid_of(stored, target.spec)
            np.testing.assert_array_equal(rounded(again, wanted), values)


@pytest.mark.parametrize("name", FORMATS)
def test_nearest_is_the_nearest_of_all_codes(name: str) -> None:
    weights = hard_weights(COLUMNS, ROWS)
    wild = weights + np.random.default_rng(2).normal(0, 0.1, weights.shape).astype(np.float32)
    for grid in grids(FORMATS[name], weights)[:2]:
        size = COLUMNS // grid.groups
        for column in range(0, COLUMNS, 29):
            for values in (weights[column], wild[column], 1000 * wild[column]):
                every = points(grid, column // size).astype(np.float64)
                least = np.abs(every - values).min(axis=0)
                found = np.abs(grid.nearest(values, column // size).astype(np.float64) - values)
                # A value half-way between two points may go to either.
                assert (found <= least + 1e-6 * (np.ptp(every, axis=0) + least)).all()


def weighted_error(
    grid: Grid, weights: Float32, importance: Float32, spec: QuantSpec
) -> np.ndarray:
    """Of each group, ``[groups, rows]``."""
    error = importance[:, None] * (rounded(grid, weights).astype(np.float64) - weights) ** 2
    return error.reshape(-1, spec.group_size, weights.shape[1]).sum(axis=1)


def importances(columns: int) -> dict[str, Float32]:
    random = np.random.default_rng(5)
    one = np.zeros(columns, np.float32)
    one[7] = 3
    return {
        "equal": np.ones(columns, np.float32),
        "uneven": random.exponential(1, columns).astype(np.float32) ** 3,
        "one": one,
        "none": np.zeros(columns, np.float32),
    }


@pytest.mark.parametrize("name", FORMATS)
def test_a_fitted_grid_is_never_worse_than_the_min_max_grid(name: str) -> None:
    target = FORMATS[name]
    weights = hard_weights(COLUMNS, ROWS)
    start = grid_of(nearest_of(weights, target), target.spec)
    for counts in importances(COLUMNS).values():
        fitted = fitted_grid(weights, counts, target)
        before, after = (weighted_error(g, weights, counts, target.spec) for g in (start, fitted))
        assert (after <= before * (1 + 1e-4) + 1e-14).all()


@pytest.mark.parametrize("name", [n for n in AFFINE if n[0] in "2345"] + ["mxfp4", "nvfp4"])
def test_a_fitted_grid_is_better_where_columns_count_unequally(name: str) -> None:
    target = FORMATS[name]
    weights = np.random.default_rng(0).normal(0, 1, (COLUMNS, 64)).astype(np.float32)
    counts = importances(COLUMNS)["uneven"]
    start = grid_of(nearest_of(weights, target), target.spec)
    before, after = (
        weighted_error(grid, weights, counts, target.spec).sum()
        for grid in (start, fitted_grid(weights, counts, target))
    )
    assert after < (0.75 if target.spec.affine else 0.98) * before


def test_a_line_through_points_that_lie_on_one_is_found() -> None:
    """A min-max grid holds zero, as these weights do not."""
    codes = np.random.default_rng(0).integers(0, 16, (64, 5)).astype(np.float32)
    weights = codes * np.float32(0.125) - np.float32(0.74)
    target = TargetFormat(QuantSpec(4, 64), "F32")
    grid = fitted_grid(weights, np.ones(64, np.float32), target)
    np.testing.assert_allclose(rounded(grid, weights), weights, atol=1e-6)
    start = grid_of(nearest_of(weights, target), target.spec)
    assert np.abs(rounded(start, weights) - weights).max() > 1e-3


def test_one_scale_too_large_for_its_type_spoils_no_other_group() -> None:
    weights = np.random.default_rng(0).normal(0, 1, (64, 4)).astype(np.float32)
    fine = fitted_grid(weights, np.ones(64, np.float32), TargetFormat(QuantSpec(2, 32), "F16"))
    weights[0, 1] = 1e6
    with np.errstate(all="ignore"):
        spoiled = fitted_grid(
            weights, np.ones(64, np.float32), TargetFormat(QuantSpec(2, 32), "F16")
        )
    assert isinstance(fine, AffineGrid)
    assert isinstance(spoiled, AffineGrid)
    others = np.ones((2, 4), bool)
    others[0, 1] = False
    np.testing.assert_array_equal(spoiled.scales[others], fine.scales[others])


def test_nearest_leaves_its_input_alone() -> None:
    weights = hard_weights(COLUMNS, ROWS)
    before = weights.copy()
    for target in (*list(AFFINE.values())[:2], *CODEBOOKS.values()):
        for grid in grids(target, weights):
            values = rounded(grid, weights)
            assert not np.shares_memory(values, weights)
            grid.quantized(weights)
    np.testing.assert_array_equal(weights, before)


def test_columns_come_first() -> None:
    weights = hard_weights(64, 6)
    target = TargetFormat(QuantSpec(8, 32), "F32")
    values = values_of(nearest_of(weights, target), target.spec)
    np.testing.assert_allclose(values[:, ::6], weights[:, ::6], atol=1e-3)
    np.testing.assert_array_equal(to_matrix(to_block(np.ascontiguousarray(values.T))), values.T)


numbers = st.floats(-1e4, 1e4, width=16, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(
    scale=numbers,
    bias=numbers,
    bits=st.sampled_from((2, 3, 4, 5, 6, 8)),
    dtype=st.sampled_from(("F16", "BF16", "F32")),
    seed=st.integers(0, 9),
)
def test_any_scale_and_bias_round_trip(
    scale: float, bias: float, bits: int, dtype: str, seed: int
) -> None:
    grid = AffineGrid.stored(
        np.full((1, 2), scale, np.float32), np.full((1, 2), bias, np.float32), bits, dtype
    )
    spread = abs(scale) * 2**bits + abs(bias) + 1
    random = np.random.default_rng(seed)
    values = rounded(grid, random.uniform(-spread, spread, (32, 2)).astype(np.float32))
    stored = grid.quantized(values)
    np.testing.assert_array_equal(values_of(stored, QuantSpec(bits, 32)), values)
