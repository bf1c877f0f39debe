"""Solving: against the textbook, against all points, and on moments that are hard to solve with."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.formats import FORMATS, SOME, hard_weights

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import QuantizedRows, TargetFormat
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.requantize import solver
from mlx_fusekit.requantize.grids import (
    AffineGrid,
    fitted_grid,
    grid_of,
    nearest_of,
    values_of,
)
from mlx_fusekit.requantize.solver import Moments, solve

Float64 = npt.NDArray[np.float64]
FOUR = TargetFormat(QuantSpec(4, 32), "BF16")


def correlated(columns: int, tokens: int, seed: int = 0) -> Float32:
    """Second moments of inputs as they are: few large directions, many small ones."""
    random = np.random.default_rng(seed)
    spectrum = 1 / np.arange(1, columns + 1)
    directions = np.linalg.qr(random.normal(size=(columns, columns)))[0]
    inputs = random.normal(size=(tokens, columns)) * spectrum @ directions
    return (inputs.T @ inputs).astype(np.float32)


def random_weights(columns: int, rows: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).normal(0, 0.05, (columns, rows)).astype(np.float32)


def errors_by_hand(matrix: Float32, values: Float32, target: Float32) -> Float64:
    change = values.astype(np.float64) - target
    return np.einsum("cr,cd,dr->r", change, matrix.astype(np.float64), change)


def prepared(second_moments: Float32, **options: Any) -> Moments:
    """Made ready from a copy, which is overwritten."""
    return Moments.prepared(second_moments.copy(), **options)


def factor_of(moments: Moments) -> Float64:
    """Upper triangular, of the matrix in the order of its columns."""
    roots = np.sqrt(moments.factor.pivots.astype(np.float64))
    factor: Float64 = moments.factor.unit * roots[:, None]
    return factor


# ---- moments ----


@pytest.mark.parametrize("columns", [32, 200])
def test_moments_are_damped_and_factored(columns: int) -> None:
    raw = 1e4 * correlated(columns, 3 * columns)
    moments = prepared(raw, damping=0.05)
    assert np.diag(moments.matrix).mean() == pytest.approx(1.05, rel=1e-5)
    np.testing.assert_allclose(
        moments.matrix, raw * moments.scale + 0.05 * np.eye(columns), atol=1e-5
    )
    factor, order = factor_of(moments), moments.factor.order
    assert not np.tril(factor, -1).any()
    assert (np.diff(np.diag(moments.matrix)[order]) >= 0).all()
    np.testing.assert_allclose(factor.T @ factor, moments.matrix[np.ix_(order, order)], atol=1e-3)


def test_only_the_upper_triangle_counts() -> None:
    raw = correlated(96, 300)
    np.testing.assert_array_equal(prepared(np.triu(raw)).matrix, prepared(raw).matrix)


def hard_moments(columns: int) -> dict[str, Float32]:
    random = np.random.default_rng(0)
    one = random.normal(size=(1, columns)).astype(np.float32)
    noisy = one.T @ one
    noisy -= 0.1 * np.eye(columns, dtype=np.float32) * noisy.trace() / columns
    spread = np.logspace(-12, 12, columns).astype(np.float32)
    dead = correlated(columns, 50)
    dead[10:], dead[:, 10:] = 0, 0
    nan = correlated(columns, 50)
    nan[3, 4] = np.nan
    infinite = correlated(columns, 50)
    infinite[0, 0] = np.inf
    return {
        "identity": np.eye(columns, dtype=np.float32),
        "one token": one.T @ one,
        "zeros": np.zeros((columns, columns), np.float32),
        "one column": np.diag([1.0] + [0.0] * (columns - 1)).astype(np.float32),
        "dead columns": dead,
        "below zero": noisy,
        "far below zero": -5 * correlated(columns, 50) + 6 * np.eye(columns, dtype=np.float32),
        "no moments at all": -np.eye(columns, dtype=np.float32),
        "ill-conditioned": np.diag(spread),
        "dust": np.full((columns, columns), 1e-40, np.float32),
        "small": np.full((columns, columns), 1e-28, np.float32),
        "large": np.full((columns, columns), 1e35, np.float32),
        "overflow of the trace": np.full((columns, columns), 3e38, np.float32),
        "nan": nan,
        "all nan": np.full((columns, columns), np.nan, np.float32),
        "inf": infinite,
    }


HARD = hard_moments(96)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning:numpy")
@pytest.mark.parametrize("kind", HARD)
def test_any_moments_are_made_ready(kind: str) -> None:
    moments = prepared(HARD[kind])
    assert np.isfinite(moments.matrix).all()
    assert np.isfinite(moments.factor.unit).all()
    assert (moments.factor.pivots > 0).all()
    assert np.isfinite(moments.scale)
    assert (np.linalg.eigvalsh(moments.matrix.astype(np.float64)) > -1e-4).all()


@pytest.mark.parametrize("kind", ["zeros", "dust", "nan", "all nan", "inf", "no moments at all"])
def test_moments_that_say_nothing_are_the_identity(kind: str) -> None:
    np.testing.assert_array_equal(prepared(HARD[kind]).matrix, np.eye(96))


def test_errors_are_the_change_of_the_output() -> None:
    inputs = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    moments = prepared(inputs.T @ inputs, damping=0)
    target = random_weights(64, 5)
    values = values_of(nearest_of(target, FOUR), FOUR.spec)
    change = ((inputs @ (values - target)) ** 2).sum(axis=0)
    np.testing.assert_allclose(moments.errors(values, target), change * moments.scale, rtol=1e-4)


# ---- error feedback ----


def textbook_gptq(target: Float32, moments: Moments, grid: Any) -> Float64:
    """GPTQ by the inverse of H, largest moment first (arXiv 2210.17323, eq. 2, 3)."""
    wanted = target.astype(np.float64)
    values = np.empty_like(wanted)
    inverse = np.linalg.inv(moments.matrix.astype(np.float64))
    size = len(target) // grid.groups
    for column in reversed(np.argsort(np.diag(moments.matrix), kind="stable")):
        values[column] = grid.nearest(wanted[column].astype(np.float32), column // size)
        error = (wanted[column] - values[column]) / inverse[column, column]
        wanted -= np.outer(inverse[:, column], error)
        # What is left when this column is fixed.
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return values


@pytest.mark.parametrize(
    "name", ["3-bit-32-F32", "4-bit-32-BF16", "4-bit-64-F32", "mxfp4", "nvfp4"]
)
@pytest.mark.parametrize("columns", [64, 192, 320])
def test_error_feedback_is_textbook_gptq(name: str, columns: int) -> None:
    target = random_weights(columns, 6)
    moments = prepared(correlated(columns, 2 * columns))
    grid = fitted_grid(target, np.diag(moments.matrix), FORMATS[name])
    values, squares = solver._with_error_feedback(target, moments, grid)
    np.testing.assert_allclose(squares, errors_by_hand(moments.matrix, values, target), rtol=1e-3)
    # In float32, a weight half-way between two codes can go to either, and others follow it.
    assert np.mean(values == textbook_gptq(target, moments, grid).astype(np.float32)) > 0.98


def test_error_feedback_with_a_last_block_that_is_not_full() -> None:
    """Columns need not be a multiple of a block's."""
    spec = TargetFormat(QuantSpec(3, 32), "F32")
    for columns in (32, 96, 160):
        target = random_weights(columns, 4)
        moments = prepared(correlated(columns, 300))
        grid = fitted_grid(target, np.diag(moments.matrix), spec)
        np.testing.assert_array_equal(
            solver._with_error_feedback(target, moments, grid)[0],
            textbook_gptq(target, moments, grid).astype(np.float32),
        )


# ---- coordinate descent ----


def all_points(grid: AffineGrid, group: int, row: int) -> Float32:
    codes = np.arange(1 << grid.bits, dtype=np.float32)
    return codes * grid.scales[group, row] + grid.biases[group, row]


@pytest.mark.parametrize("columns", [32, 96, 160])
def test_descent_ends_where_no_code_can_be_changed_for_the_better(columns: int) -> None:
    target = random_weights(columns, 4)
    moments = prepared(correlated(columns, 2 * columns))
    grid = fitted_grid(target, np.diag(moments.matrix), TargetFormat(QuantSpec(3, 32), "F32"))
    assert isinstance(grid, AffineGrid)
    values = values_of(grid.quantized(target), QuantSpec(3, 32))
    before = errors_by_hand(moments.matrix, values, target).sum()
    change = values - target
    while True:
        gain = solver._descend_once(values, change, target, moments.matrix, grid)
        np.testing.assert_array_equal(change, values - target)
        after = errors_by_hand(moments.matrix, values, target).sum()
        assert gain == pytest.approx(before - after, abs=1e-5 * before)
        before = after
        if gain <= 0:
            break
    errors = errors_by_hand(moments.matrix, values, target)
    for column, row in itertools.product(range(columns), range(4)):
        for point in all_points(grid, column // 32, row):
            moved = values.copy()
            moved[column, row] = point
            assert errors_by_hand(moments.matrix, moved[:, [row]], target[:, [row]])[0] >= (
                errors[row] * (1 - 1e-5)
            )
    np.testing.assert_array_equal(values_of(grid.quantized(values), QuantSpec(3, 32)), values)


def test_the_result_is_near_the_best_of_all_points() -> None:
    """Three columns that depend on each other, and 29 that stand alone: 64 points a row."""
    random = np.random.default_rng(0)
    rows, spec = 40, TargetFormat(QuantSpec(2, 32), "F32")
    target = random.normal(0, 1, (32, rows)).astype(np.float32)
    mixed = random.normal(size=(3, 3))
    raw = np.eye(32)
    raw[:3, :3] = mixed @ mixed.T + 0.05 * np.eye(3)
    moments = prepared(raw.astype(np.float32), damping=1e-6)
    solution = solve(target, target, moments, spec)
    values = values_of(solution.quantized, spec.spec)
    grid = grid_of(solution.quantized, spec.spec)
    assert isinstance(grid, AffineGrid)
    block = moments.matrix[:3, :3]
    ratios = []
    for row in range(rows):
        points = np.array(list(itertools.product(all_points(grid, 0, row), repeat=3)), np.float32).T
        least = errors_by_hand(block, points, target[:3, [row]]).min()
        ours = errors_by_hand(block, values[:3, [row]], target[:3, [row]])[0]
        ratios.append(ours / least)
    assert min(ratios) > 1 - 1e-3
    assert np.median(ratios) < 1 + 1e-3
    assert np.mean(ratios) < 1.3


# ---- the whole ----


def by_row(moments: Moments, quantized: QuantizedRows, target: Float32, spec: QuantSpec) -> Float64:
    return errors_by_hand(moments.matrix, values_of(quantized, spec), target)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning:numpy")
@pytest.mark.parametrize(
    ("name", "kind"),
    # A kind of moments meets an affine grid and a codebook; a format, moments and none.
    [(name, kind) for kind in HARD for name in ("3-bit-128-BF16", "nvfp4-global")]
    + [(name, kind) for name in SOME for kind in ("one token", "zeros")],
)
def test_no_row_is_worse_than_rounded_to_nearest(name: str, kind: str) -> None:
    format_ = SOME[name]
    target = hard_weights(128, 12)
    moments = prepared(hard_moments(128)[kind])
    base = nearest_of(hard_weights(128, 12, seed=1), format_)
    solution = solve(target, target, moments, format_, base)
    ours, nearest, bases = (
        by_row(moments, rows, target, format_.spec)
        for rows in (solution.quantized, nearest_of(target, format_), base)
    )
    assert (ours <= np.minimum(nearest, bases) * (1 + 1e-3) + 1e-12).all()
    assert solution.error == pytest.approx(ours.sum(), rel=1e-3, abs=1e-12)
    assert solution.nearest_error == pytest.approx(nearest.sum(), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_of_correlated_inputs_are_kept_better(name: str) -> None:
    format_ = FORMATS[name]
    target = random_weights(128, 32)
    moments = prepared(correlated(128, 60))
    solution = solve(target, target, moments, format_)
    assert solution.error < 0.5 * solution.nearest_error
    assert solution.quantized.codes.shape == (32, format_.spec.words(128))
    assert solution.quantized.scales.shape == (32, 128 // format_.spec.group_size)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_the_base_give_the_base(name: str) -> None:
    format_ = FORMATS[name]
    base = nearest_of(hard_weights(128, 12), format_)
    target = values_of(base, format_.spec)
    moments = prepared(correlated(128, 60))
    solution = solve(target, target, moments, format_, base)
    assert solution.error == 0
    np.testing.assert_array_equal(values_of(solution.quantized, format_.spec), target)


@pytest.mark.parametrize("name", SOME)
def test_a_tiny_update_is_not_lost_to_a_coarser_grid(name: str) -> None:
    """Where the update is far below a step, the base's codes are a good answer already."""
    format_ = SOME[name]
    base = nearest_of(random_weights(128, 12), format_)
    values = values_of(base, format_.spec)
    step = np.ptp(values, axis=0) / 2**format_.spec.bits
    target = values + np.float32(1e-4) * step * random_weights(128, 12, seed=4) / np.float32(0.05)
    moments = prepared(correlated(128, 60))
    solution = solve(target, target, moments, format_, base)
    ours, bases = (
        by_row(moments, rows, target, format_.spec) for rows in (solution.quantized, base)
    )
    assert (ours <= bases * (1 + 1e-3)).all()
    alone = solve(target, target, moments, format_).error
    assert solution.error <= alone * (1 + 1e-3)


def test_the_target_is_not_the_merged_weights() -> None:
    """Nearest is of the merged weights; what is approached, and the errors, are the target's."""
    merged = random_weights(64, 8)
    target = merged + random_weights(64, 8, seed=1)
    moments = prepared(correlated(64, 200))
    solution = solve(target, merged, moments, FOUR)
    nearest = by_row(moments, nearest_of(merged, FOUR), target, FOUR.spec).sum()
    assert solution.nearest_error == pytest.approx(nearest, rel=1e-4)
    assert solution.error < 0.02 * solution.nearest_error


def test_what_was_exact_before_has_no_error_to_compare_with() -> None:
    """The nearest error is that of rounding to nearest, also where it is none."""
    codes = np.tile(np.arange(16, dtype=np.float32), 4)[:, None]
    weights = np.ascontiguousarray(np.repeat(codes - 8, 3, axis=1))
    other = nearest_of(random_weights(64, 3), FOUR)
    solution = solve(weights, weights, prepared(np.eye(64, dtype=np.float32)), FOUR, other)
    assert solution.error == solution.nearest_error == 0


def test_inputs_are_left_alone() -> None:
    target, merged = random_weights(64, 8), random_weights(64, 8)
    raw = correlated(64, 200)
    moments = prepared(raw)
    base = nearest_of(merged, FOUR)
    kept = [a.copy() for a in (target, merged, raw, moments.matrix, base.codes, base.scales)]
    solve(target, merged, moments, FOUR, base)
    now = (target, merged, raw, moments.matrix, base.codes, base.scales)
    for before, after in zip(kept, now, strict=True):
        np.testing.assert_array_equal(before, after)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    columns=st.sampled_from((32, 64, 96)),
    tokens=st.integers(0, 70),
    name=st.sampled_from([n for n in FORMATS if "-64-" not in n and "-128-" not in n]),
    scale=st.sampled_from((1e-6, 1e-2, 1.0, 1e3)),
    compensation=st.sampled_from((0.0, 0.1)),
)
def test_never_worse_than_nearest_and_always_finite(
    seed: int, columns: int, tokens: int, name: str, scale: float, compensation: float
) -> None:
    format_ = FORMATS[name]
    merged = np.float32(scale) * random_weights(columns, 5, seed)
    target = merged + np.float32(compensation * scale) * random_weights(columns, 5, seed + 1)
    moments = prepared(correlated(columns, tokens, seed))
    base = nearest_of(np.float32(scale) * random_weights(columns, 5, seed + 2), format_)
    solution = solve(target, merged, moments, format_, base)
    values = values_of(solution.quantized, format_.spec)
    assert np.isfinite(values).all()
    ours = errors_by_hand(moments.matrix, values, target)
    nearest = by_row(moments, nearest_of(merged, format_), target, format_.spec)
    assert (ours <= nearest * (1 + 1e-3) + 1e-30).all()


def test_moments_of_few_tokens_are_damped_more() -> None:
    raw = correlated(64, 300)
    added = [
        prepared(raw, tokens=tokens).matrix - raw * prepared(raw).scale for tokens in (1, 64, 10**6)
    ]
    wanted = [solver.DAMPING + solver.SHRINKAGE * share for share in (64, 1, 64e-6)]
    for matrix, damping in zip(added, wanted, strict=True):
        np.testing.assert_allclose(matrix, damping * np.eye(64), atol=1e-5)
    zeros = prepared(np.zeros((64, 64), np.float32), tokens=0)
    np.testing.assert_array_equal(zeros.matrix, np.eye(64))
