"""Whether a fused model kept its fine-tune: one rule, and its reason in words.

docs/requantization.md states the rule. Terminal, JSON report and model card all say what
:func:`judge` said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mlx_fusekit.figures import count, nats, setting, share
from mlx_fusekit.texts.sequences import FEWEST_SCORED, FEWEST_SEQUENCES
from mlx_fusekit.verifying.options import DEFAULT_MAX_KL

if TYPE_CHECKING:  # a fuse, whose report has these words, needs neither MLX nor mlx-lm
    from mlx_fusekit.verifying.parity import Parity
    from mlx_fusekit.verifying.structure import Check

Verdict = Literal["kept", "lost", "not judged"]

#: Shares of the base's own KL: at most the first is kept, above the second is lost.
_KEPT_SHARE, _LOST_SHARE = 0.1, 0.5
#: Answers are lost when fewer are exact by more than this share of all, and that by chance has less
#: than this probability.
_LOST_ANSWERS, _BY_CHANCE = 0.05, 0.05
#: What narrows an interval.
MORE_TEXT = "give more text (--data, --max-tokens)"


@dataclass(frozen=True)
class Judgement:
    """A verdict.

    Attributes:
        verdict: "not judged" where the measurement shows neither.
        reason: one sentence, with the figures and the bounds, without its full stop.
    """

    verdict: Verdict
    reason: str

    @property
    def passed(self) -> bool | None:
        """Whether it was kept; None where that was not judged."""
        return None if self.verdict == "not judged" else self.verdict == "kept"


def judge(
    ours: "Parity", base: "Parity | None", checks: "Sequence[Check]", max_kl: float | None
) -> Judgement:
    """Judge a fused model.

    Args:
        ours: what was measured of it.
        base: of the base without its adapter; None with another reference.
        checks: of its files and its numbers.
        max_kl: the bound that was asked for, in nats a token; None for the default ones.
    """
    if faults := [check.name for check in checks if not check.ok]:
        listed = ", ".join(faults)
        return Judgement("lost", f"not in order: {listed}")
    if ours.kl_mean_ci95 is None:
        why = too_little(len(ours.kl), len(ours.lengths))
        return Judgement("not judged", f"{why}; {MORE_TEXT}")
    found = _by_distance(ours.kl_mean_ci95, base, max_kl)
    verdict, reason = found.verdict, f"{_mean(ours)}{found.reason}"
    if len(ours.answers):
        chance = _probability_by_chance(ours)
        reference = "the reference" if base is None else "base+adapter"
        answers = (
            f"{_answers(ours.answers.sum(), len(ours.answers))} exact, {reference}'s "
            f"{share(ours.exact_match_reference)}"
        )
        if _drop(ours) > _LOST_ANSWERS and chance < _BY_CHANCE:
            verdict = "lost"
            answers += f", which is significantly fewer (p = {chance:.2g})"
        reason = f"{answers}; {reason}"
    return Judgement(verdict, reason)


def too_little(tokens: int, sequences: int) -> str:
    """Why so little text has no verdict."""
    return (
        f"measured on {count(tokens)} tokens in {count(sequences)} sequences, and a verdict takes "
        f"{FEWEST_SCORED} in {FEWEST_SEQUENCES}"
    )


def interval_in_words(bounds: Sequence[float]) -> str:
    """A 95 % interval."""
    low, high = map(nats, bounds)
    return f"95 % interval {low} to {high}"


def _mean(ours: "Parity") -> str:
    assert ours.kl_mean_ci95 is not None, "judged only with an interval"
    return f"mean KL {nats(ours.kl_mean)} nats a token ({interval_in_words(ours.kl_mean_ci95)})"


def _by_distance(
    interval: tuple[float, float], base: "Parity | None", max_kl: float | None
) -> Judgement:
    """The verdict of the KL alone, and what follows its figures in the sentence."""
    low, high = interval
    if max_kl is not None:
        asked = f"the {setting(max_kl)} that was asked for"
        if high <= max_kl:
            return Judgement("kept", f", at most {asked}")
        if low > max_kl:
            return Judgement("lost", f", above {asked}")
        return Judgement("not judged", f", which holds {asked} within it; {MORE_TEXT}")
    default = setting(DEFAULT_MAX_KL)
    if low > DEFAULT_MAX_KL:
        return Judgement("lost", f", above {default}")
    own = f"the base's {nats(base.kl_mean)}" if base else ""
    if base is not None and low > _LOST_SHARE * base.kl_mean:
        return Judgement("lost", f", more than half of {own}")
    near = base is None or high <= _KEPT_SHARE * base.kl_mean
    if high <= DEFAULT_MAX_KL and near:
        return Judgement("kept", f", at most {default}{f' and a tenth of {own}' if own else ''}")
    kept = f"at most {default}{f' and a tenth of {own}' if own else ''}"
    lost = f"above {default}{' or half of that' if own else ''}"
    return Judgement(
        "not judged",
        f", not shown to be {kept}, nor {lost}; {MORE_TEXT}, or ask for a bound (--max-kl)",
    )


def _answers(exact: int, total: int) -> str:
    return f"{share(exact / total)} of {count(total)} answers"


def _drop(ours: "Parity") -> float:
    """By which share of all answers fewer are exact than the reference's."""
    return float(ours.answers_reference.mean() - ours.answers.mean())


def _probability_by_chance(ours: "Parity") -> float:
    """Of as many answers lost or more, were each changed answer as likely lost as gained.

    The one-sided exact binomial test of the answers on which the two models differ.
    """
    lost = int(np.sum(ours.answers_reference & ~ours.answers))
    changed = int(np.sum(ours.answers_reference != ours.answers))
    ways: int = sum(math.comb(changed, found) for found in range(lost, changed + 1))
    return float(ways / 2**changed)
