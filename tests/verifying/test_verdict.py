"""The rule of the verdict, in figures."""

import numpy as np
import pytest

from mlx_fusekit.verifying.parity import Parity
from mlx_fusekit.verifying.structure import Check
from mlx_fusekit.verifying.verdict import judge


def measured(
    kl: float | list[float] = 0.01, sequences: int = 20, length: int = 20, right: str = ""
) -> Parity:
    """A KL for all tokens, or one for each sequence in turn; answers as in ``answers``."""
    each = np.resize(np.atleast_1d(kl), sequences)
    ours, reference = answers(right)
    tokens = np.repeat(each, length).astype(np.float32)
    return Parity(tokens, (length,) * sequences, 1.0, 2.0, 2.0, ours, reference)


def answers(pairs: str) -> tuple[np.ndarray, np.ndarray]:
    """``=`` both right, ``-`` lost, ``+`` gained, ``.`` both wrong."""
    return np.array([p in "=+" for p in pairs], bool), np.array([p in "=-" for p in pairs], bool)


def verdict(ours: Parity, base: float | None = 1.0, bound: float | None = None) -> str:
    found = judge(ours, None if base is None else measured(base), (), bound)
    assert found.passed is {"kept": True, "lost": False, "not judged": None}[found.verdict]
    return found.verdict


class TestWithoutABound:
    @pytest.mark.parametrize(
        ("kl", "base", "expected"),
        [
            (0.09, 1.0, "kept"),
            (0.11, 9.0, "lost"),  # above 0.1
            (0.09, 0.8, "not judged"),  # more than a tenth of the base's
            (0.03, 0.05, "lost"),  # more than half of it
            (0.0, 0.0, "kept"),  # an adapter without effect
            (0.09, None, "kept"),  # no adapter, no tenth
            (0.11, None, "lost"),
        ],
    )
    def test_both_bounds_count(self, kl: float, base: float | None, expected: str) -> None:
        assert verdict(measured(kl), base) == expected

    def test_an_interval_around_the_bound_is_not_judged(self) -> None:
        found = judge(measured([0.0, 0.2]), measured(9.0), (), None)
        assert found.verdict == "not judged"
        assert "not shown to be at most 0.1 and a tenth of the base's 9" in found.reason
        assert "give more text (--data, --max-tokens), or ask for a bound" in found.reason


class TestWithABound:
    @pytest.mark.parametrize(("bound", "expected"), [(0.25, "kept"), (0.001, "lost")])
    def test_it_stands_in_place_of_the_default_ones(self, bound: float, expected: str) -> None:
        assert verdict(measured([0.0, 0.2]), 0.2, bound) == expected

    def test_the_mean_below_it_is_not_enough(self) -> None:
        """0.1 on the mean, and an interval from about 0.05 to 0.15."""
        found = judge(measured([0.0, 0.2]), measured(9.0), (), 0.11)
        assert found.verdict == "not judged"
        assert "which holds the 0.11 that was asked for within it" in found.reason


class TestAnswers:
    def test_significantly_fewer_are_lost_whatever_the_kl(self) -> None:
        ours = measured(0.0, right="=" * 12 + "-" * 8)
        assert verdict(ours, bound=10.0) == verdict(ours) == "lost"
        reason = judge(ours, measured(1.0), (), None).reason
        assert reason.startswith("60.0% of 20 answers exact, base+adapter's 100.0%, which is signi")

    @pytest.mark.parametrize(
        "pairs",
        [
            "=" * 16 + "-" * 4,  # by chance in one of 16
            "=" * 4 + "-" * 6 + "+" * 5,  # as many gained
            "=" * 196 + "-" * 9,  # no more than one in twenty
            "." * 20,
        ],
    )
    def test_few_or_exchanged_ones_are_not(self, pairs: str) -> None:
        assert verdict(measured(0.01, right=pairs)) == "kept"


class TestTooLittle:
    @pytest.mark.parametrize(("sequences", "length"), [(7, 100), (10, 19)])
    def test_is_not_judged(self, sequences: int, length: int) -> None:
        for kl in (0.0, 9.0):
            assert verdict(measured(kl, sequences, length), bound=1.0) == "not judged"

    def test_but_files_that_are_not_in_order_are_lost(self) -> None:
        checks = (Check("same tensors as the base", False, ""), Check("same vocabulary", True, ""))
        found = judge(measured(0.0, 1, 2), None, checks, None)
        assert (found.verdict, found.reason) == ("lost", "not in order: same tensors as the base")

    def test_eight_sequences_and_200_tokens_are_enough(self) -> None:
        assert verdict(measured(0.01, 8, 25)) == "kept"
