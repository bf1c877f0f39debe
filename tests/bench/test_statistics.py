"""Quantiles, intervals, drift and outliers, against SciPy and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mlx_fusekit.bench.statistics import (
    FEWEST_PAIRS,
    Ratio,
    Summary,
    drift,
    outliers,
    speedup,
)
from mlx_fusekit.resampling import student_t_quantile

SAMPLE = [0.512, 0.498, 0.530, 0.505, 0.701, 0.499, 0.510, 0.502, 0.515, 0.508]
OTHER = [0.401, 0.420, 0.415, 0.399, 0.410, 0.640, 0.405, 0.411, 0.402, 0.408]


def test_a_summary_is_numpys() -> None:
    summary = Summary.of(SAMPLE)
    assert summary is not None
    assert summary.median == np.median(SAMPLE)
    assert (summary.p90, summary.p99) == tuple(np.percentile(SAMPLE, [90, 99]))
    assert (summary.mean, summary.minimum, summary.maximum) == (
        np.mean(SAMPLE),
        min(SAMPLE),
        max(SAMPLE),
    )
    assert Summary.of([]) is None


@pytest.mark.parametrize("probability", [0.9, 0.95, 0.975])
@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 19, 49, 1000])
def test_the_t_quantile_is_scipys(probability: float, freedom: int) -> None:
    expected = stats.t.ppf(probability, freedom)
    assert student_t_quantile(probability, freedom) == pytest.approx(expected, rel=0.007)
    if freedom >= 9:
        assert student_t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-4)


def test_the_interval_is_scipys_percentile_bootstrap_at_a_widened_level() -> None:
    """Hesterberg's level, computed by SciPy alone."""
    pairs = len(SAMPLE)
    level = 1 - 2 * stats.norm.cdf(-math.sqrt(pairs / (pairs - 1)) * stats.t.ppf(0.975, pairs - 1))
    logarithms = np.log(SAMPLE) - np.log(OTHER)
    expected = stats.bootstrap(
        (logarithms,),
        np.median,
        confidence_level=level,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(7),
    ).confidence_interval
    found = speedup(SAMPLE, OTHER, seed=3)
    assert found.ratio == pytest.approx(math.exp(np.median(logarithms)))
    assert found.ci95 == pytest.approx(tuple(np.exp(expected)), rel=0.01)
    assert found.verdict == "faster"


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=12),
    st.integers(0, 1000),
)
def test_exchanging_the_arms_inverts_the_ratio(pairs: list[tuple[float, float]], seed: int) -> None:
    before, after = zip(*pairs, strict=True)
    there, back = speedup(before, after, seed=seed), speedup(after, before, seed=seed)
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.ci95 is not None
    assert there.ci95[0] <= there.ratio * (1 + 1e-12)
    assert there.ci95[1] >= there.ratio * (1 - 1e-12)


@pytest.mark.parametrize("trials", [6, 10, 20])
def test_the_interval_holds_the_truth_as_often_as_it_says(trials: int) -> None:
    """Timings with a long tail and shared drift; the true ratio of medians is 1.25."""
    draw, held, runs = np.random.default_rng(trials), 0, 400
    for seed in range(runs):
        noise = draw.standard_exponential((2, trials)) ** 2 * 0.02
        shared = 1 + 0.1 * draw.random() * np.linspace(0, 1, trials)
        slow, fast = (1 + noise) * shared
        low, high = speedup(1.25 * slow, fast, seed=seed).ci95 or (0, 0)
        held += low <= 1.25 <= high
    assert held / runs >= 0.95


def test_a_clear_difference_is_found_and_no_difference_is_not() -> None:
    assert speedup([2.0, 2.1, 1.9, 2.0, 2.2, 2.05], [1.0] * 6, seed=0).verdict == "faster"
    assert speedup([1.0] * 6, [2.0, 2.1, 1.9, 2.0, 2.2, 2.05], seed=0).verdict == "slower"
    draw = np.random.default_rng(0)
    same = draw.normal(1, 0.05, (2, 10))
    assert speedup(same[0], same[1], seed=0).verdict == "no difference"


def test_few_trials_give_no_verdict() -> None:
    assert speedup([2.0], [1.0], seed=0) == Ratio(2.0, None, 1)
    few = speedup([2.0] * (FEWEST_PAIRS - 1), [1.0] * (FEWEST_PAIRS - 1), seed=0)
    assert few.verdict == "too few trials"
    with pytest.raises(ValueError, match="paired"):
        speedup([1.0, 2.0], [1.0], seed=0)


def test_drift_is_the_last_third_against_the_first() -> None:
    assert drift(
        [[1.0, 1.0, 1.05, 1.0, 1.1, 1.1], [4.0, 4.0, 4.2, 4.0, 4.4, 4.4]]
    ) == pytest.approx(0.1)
    assert drift([[1.0, 2.0]]) is None
    assert drift([[1.0, 9.0, 1.0]]) == pytest.approx(0)


def test_outliers_lie_far_from_the_median_and_stay() -> None:
    assert outliers(SAMPLE) == [4]
    assert outliers([1.0, 1.0, 1.0, 1.0]) == []
    assert outliers([1.0, 437.0]) == []
