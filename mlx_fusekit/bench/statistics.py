"""What is said of timings: quantiles, paired ratios with an interval, drift, outliers.

Timings have a long tail to one side, so everything here is built on medians.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from mlx_fusekit.resampling import RESAMPLES, widened_tail

#: With fewer pairs, no interval of the sample's own values holds the median with 95 %:
#: all of them lie on one side of it with a probability of 2 ** (1 - pairs).
FEWEST_PAIRS = 6
#: An outlier lies further from the median than this many robust standard deviations.
_OUTLIER_DEVIATIONS = 5.0
#: The median absolute deviation of a normal distribution, in standard deviations.
_MAD = NormalDist().inv_cdf(0.75)

Verdict = Literal["faster", "slower", "no difference", "too few trials"]


@dataclass(frozen=True)
class Summary:
    """Quantiles of a sample, in the sample's unit; each is an observed or interpolated value."""

    count: int
    median: float
    mean: float
    p90: float
    p99: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Summary | None":
        """Summarize; None of nothing."""
        if not samples:
            return None
        values = np.asarray(samples, np.float64)
        median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
        return cls(
            len(samples),
            float(median),
            float(values.mean()),
            float(p90),
            float(p99),
            float(values.min()),
            float(values.max()),
        )


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one arm is as another.

    Attributes:
        ratio: the median over rounds of the slower-is-larger quotients: above 1 is faster.
        ci95: bounds of its 95 % confidence interval; None with fewer than two pairs.
        pairs: rounds that went in.
    """

    ratio: float
    ci95: tuple[float, float] | None
    pairs: int

    @property
    def verdict(self) -> Verdict:
        """What can be said at 95 % confidence."""
        if self.ci95 is None or self.pairs < FEWEST_PAIRS:
            return "too few trials"
        low, high = self.ci95
        if low > 1:
            return "faster"
        return "slower" if high < 1 else "no difference"


def speedup(
    reference_seconds: Sequence[float], arm_seconds: Sequence[float], *, seed: int
) -> Ratio:
    """How many times as fast an arm is as a reference, from times of the same rounds.

    The estimate is the median of the rounds' quotients, taken of logarithms, so that exchanging the
    two arms inverts it. Its interval is a percentile bootstrap over rounds (Efron 1979), at levels
    widened for the number of pairs.

    Args:
        reference_seconds: one a round, positive.
        arm_seconds: one a round, positive, of the same rounds in the same order.
        seed: of the resampling.

    Raises:
        ValueError: when there are no pairs, or not as many of one as of the other.
    """
    logarithms = np.log(np.asarray(reference_seconds, np.float64))
    if len(logarithms) != len(arm_seconds) or not len(logarithms):
        raise ValueError("a paired ratio needs one time of each arm from each round")
    logarithms -= np.log(np.asarray(arm_seconds, np.float64))
    pairs = len(logarithms)
    ratio = math.exp(float(np.median(logarithms)))
    if pairs < 2:
        return Ratio(ratio, None, pairs)
    draws = np.random.default_rng(seed).integers(0, pairs, (RESAMPLES, pairs))
    medians = np.median(logarithms[draws], axis=1)
    tail = widened_tail(0.025, pairs)
    low, high = np.exp(np.quantile(medians, [tail, 1 - tail]))
    return Ratio(ratio, (float(low), float(high)), pairs)


def drift(seconds: Sequence[Sequence[float]]) -> float | None:
    """How much longer trials took in the last third of the time than in the first, as a share.

    Args:
        seconds: of each arm, in the order of time; each arm is measured in its own median.

    Returns:
        0.05 where they took 5 % longer; None with fewer than three trials an arm.
    """
    changes = []
    for samples in seconds:
        third = len(samples) // 3
        if third:
            changes.append(np.median(samples[-third:]) / np.median(samples[:third]))
    return float(np.median(changes)) - 1 if changes else None


def outliers(seconds: Sequence[float]) -> list[int]:
    """Places of the samples that lie far from the others, by the median absolute deviation.

    They stay in every figure; a median hardly moves by them.
    """
    values = np.asarray(seconds, np.float64)
    if len(values) < 3:
        return []
    distances = np.abs(values - np.median(values))
    deviation = float(np.median(distances)) / _MAD
    if deviation == 0:
        return []
    return [int(place) for place in np.flatnonzero(distances > _OUTLIER_DEVIATIONS * deviation)]
