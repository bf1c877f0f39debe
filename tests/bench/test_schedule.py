"""The order of trials."""

from collections import Counter
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fusekit.bench.schedule import balanced_rounds

arms = st.integers(1, 7)
seeds = st.integers(0, 2**32)


@given(arms, st.integers(0, 30), seeds)
def test_every_round_has_every_arm_once(count: int, rounds: int, seed: int) -> None:
    order = balanced_rounds(count, rounds, seed)
    assert len(order) == rounds
    assert all(sorted(row) == list(range(count)) for row in order)


@given(arms, st.integers(1, 15), seeds)
def test_each_arm_runs_as_often_before_as_after_each_other(
    count: int, pairs: int, seed: int
) -> None:
    order = balanced_rounds(count, 2 * pairs, seed)
    for one, other in permutations(range(count), 2):
        before = sum(row.index(one) < row.index(other) for row in order)
        assert before == pairs


@given(st.integers(2, 7), seeds)
def test_each_arm_follows_each_other_equally_often(count: int, seed: int) -> None:
    order = balanced_rounds(count, 2 * count, seed)
    followed = Counter(pair for row in order for pair in pairwise(row))
    assert set(followed) == set(permutations(range(count), 2))
    assert set(followed.values()) == {2}


def test_the_seed_chooses_the_order() -> None:
    assert balanced_rounds(4, 10, 1) == balanced_rounds(4, 10, 1)
    assert len({tuple(balanced_rounds(4, 10, seed)) for seed in range(20)}) > 10


@pytest.mark.parametrize("rounds", [1, 3, 5, 11])
def test_an_odd_number_of_rounds_is_off_by_one(rounds: int) -> None:
    order = balanced_rounds(3, rounds, 0)
    for one, other in permutations(range(3), 2):
        before = sum(row.index(one) < row.index(other) for row in order)
        assert abs(2 * before - rounds) == 1
