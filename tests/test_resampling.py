"""Intervals by resampling."""

import numpy as np
import pytest

from mlx_fusekit.resampling import mean_interval


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Groups of skewed values that are alike within a group, as tokens of a text are."""
    generator = np.random.default_rng(1)
    held, trials = 0, 200
    for _ in range(trials):
        weights = generator.integers(5, 40, 12).astype(float)
        sums = weights * generator.gamma(2, 0.5, 12)
        bounds = mean_interval(sums, weights)
        assert bounds is not None
        held += bounds[0] <= 1 <= bounds[1]
    assert held / trials > 0.88


def test_a_long_tail_is_not_forgotten() -> None:
    """A few texts have most of the sum; the percentile bootstrap alone falls short in 30 of 100."""
    generator = np.random.default_rng(2)
    short, trials = 0, 100
    for _ in range(trials):
        weights = generator.integers(10, 60, 30).astype(float)
        sums = weights * np.exp(generator.normal(-2, 2, 30))
        bounds = mean_interval(sums, weights)
        assert bounds is not None
        short += bounds[1] < 1
    assert short <= 20


def test_groups_count_by_their_weight() -> None:
    """One short group of a mean of 100 among long ones of 0."""
    sums, weights = np.array([100.0] + [0.0] * 30), np.array([1.0] + [1000.0] * 30)
    bounds = mean_interval(sums, weights)
    assert bounds is not None
    assert bounds[1] < 0.05


def test_the_same_numbers_give_the_same_interval() -> None:
    sums, weights = np.arange(2000.0), np.ones(2000)  # more than are drawn at once
    first = mean_interval(sums, weights)
    assert first == mean_interval(sums, weights)
    assert first is not None
    assert first[0] < 999.5 < first[1]
    assert first[1] - first[0] == pytest.approx(2 * 1.96 * sums.std() / 2000**0.5, rel=0.05)


def test_there_is_none_of_nothing_or_nan() -> None:
    assert mean_interval(np.ones(1), np.ones(1)) is None
    assert mean_interval(np.array([1.0, np.nan]), np.ones(2)) is None
