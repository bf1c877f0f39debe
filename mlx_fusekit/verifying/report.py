"""How close a fused model is to its reference, in figures, and the verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_fusekit import figures
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.parity import Parity
from mlx_fusekit.verifying.reference import Reference
from mlx_fusekit.verifying.structure import Check
from mlx_fusekit.verifying.tasks import TaskParity
from mlx_fusekit.verifying.verdict import Verdict, judge


@dataclass(frozen=True)
class ParityReport:
    """How close a fused model is to its reference, and whether that is close enough.

    KL is KL(reference || model) in nats at each scored token. Measures of the base are None when
    the reference is no base with an adapter, exact match is None when the data hold no answers.
    Numbers of a model that gives NaN are NaN, and None in :meth:`as_json`.

    Attributes:
        fused: Hub id or folder name of the model that was judged.
        reference: that of the reference, of the base where an adapter makes it the reference.
        revision: the commit of a reference from the Hub.
        adapters: what was put on the base, unmerged; empty with another reference.
        weights: what each adapter's update was multiplied by.
        combine: method, density and seed by which several were combined; None of one, or a sum.
        kl_mean: mean over all scored tokens; ``max_kl`` bounds it.
        kl_mean_ci95: bounds of its 95 % interval, by resampling whole sequences; None of too little
            text for one.
        kl_p99: 99 % of the tokens stay below.
        top1_agreement: share of the tokens where both models have the same arg-max.
        perplexity_fused: of the actual tokens.
        recovered: 1 - KL(fused) / KL(base): 1 is the reference, 0 no better than the base.
        exact_match_fused: share of the ``answers`` whose every token is the arg-max.
        tokens: how many were scored.
        data: where the text came from.
        float32: whether all weights were run as float32, so that kernels' rounding is left out.
        structure: checks of the fused model's files.
        verdict: of :mod:`mlx_fusekit.verifying.verdict`: "kept", "lost" or "not judged".
        verdict_reason: in a sentence, with the figures and bounds.
        tasks: with a text for each adapter, what each lost in the combination.
        passed: True for kept, False for lost, None for not judged.
    """

    fused: str
    reference: str
    revision: str | None
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    combine: Mapping[str, Any] | None
    kl_mean: float
    kl_mean_ci95: tuple[float, float] | None
    kl_median: float
    kl_p99: float
    kl_base_mean: float | None
    kl_base_median: float | None
    kl_base_p99: float | None
    top1_agreement: float
    top1_agreement_base: float | None
    perplexity_reference: float
    perplexity_fused: float
    perplexity_base: float | None
    exact_match_reference: float | None
    exact_match_fused: float | None
    exact_match_base: float | None
    recovered: float | None
    answers: int
    tokens: int
    sequences: int
    data: str
    seed: int
    float32: bool
    max_kl: float | None
    structure_ok: bool
    structure: tuple[Check, ...]
    verdict: Verdict
    verdict_reason: str
    passed: bool | None
    seconds: float
    warnings: tuple[str, ...]
    tasks: tuple[TaskParity, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing was lost, and what was asked for is shown to hold."""
        return self.passed is True or (self.passed is None and self.max_kl is None)

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object; numbers that are not finite are None."""
        own = figures.for_json(asdict(self))
        return own | {"tasks": [figures.for_json(task) for task in own["tasks"]]}


def parity_report(
    *,
    fused: str,
    truth: Reference,
    measured: Mapping[str, Parity],
    sequences: Sequence[TokenSequence],
    checks: tuple[Check, ...],
    data: str,
    seed: int,
    float32: bool,
    max_kl: float | None,
    seconds: float,
    tasks: tuple[TaskParity, ...] = (),
) -> ParityReport:
    """The report of what was measured.

    Args:
        fused: name of the model that was judged.
        truth: what it was compared with.
        measured: "fused", and "base" where there is one.
        sequences: what both ran on.
        checks: of the fused model.
        data: where the text came from.
        seed: of the text.
        float32: whether all weights were run as float32.
        max_kl: the bound, None for none.
        seconds: what it took.
        tasks: against each adapter alone.
    """
    ours, base = measured["fused"], measured.get("base")
    kl = ours.kl_mean
    finite = math.isfinite(kl) and math.isfinite(ours.perplexity)
    if not finite:
        bad = int(np.logical_not(np.isfinite(ours.kl)).sum())
        check = Check("finite probabilities", False, f"KL is not finite at {bad} tokens")
        checks = (*checks, check)
    structure_ok = all(check.ok for check in checks)
    recovered = None
    if base is not None and base.kl_mean > 0:
        recovered = 1 - kl / base.kl_mean
    judgement = judge(ours, base, checks, max_kl)
    return ParityReport(
        fused=fused,
        reference=truth.running.source.public_name,
        revision=truth.running.source.revision,
        adapters=truth.adapters,
        weights=truth.weights,
        combine=truth.combine,
        kl_mean=kl,
        kl_mean_ci95=ours.kl_mean_ci95,
        kl_median=ours.kl_median,
        kl_p99=ours.kl_p99,
        kl_base_mean=base.kl_mean if base else None,
        kl_base_median=base.kl_median if base else None,
        kl_base_p99=base.kl_p99 if base else None,
        top1_agreement=ours.top1_agreement,
        top1_agreement_base=base.top1_agreement if base else None,
        perplexity_reference=ours.perplexity_reference,
        perplexity_fused=ours.perplexity,
        perplexity_base=base.perplexity if base else None,
        exact_match_reference=ours.exact_match_reference,
        exact_match_fused=ours.exact_match,
        exact_match_base=base.exact_match if base else None,
        recovered=recovered,
        answers=len(ours.answers),
        tokens=len(ours.kl),
        sequences=len(sequences),
        data=data,
        seed=seed,
        float32=float32,
        max_kl=max_kl,
        structure_ok=structure_ok,
        structure=checks,
        verdict=judgement.verdict,
        verdict_reason=judgement.reason,
        passed=judgement.passed,
        seconds=seconds,
        warnings=truth.warnings,
        tasks=tasks,
    )
