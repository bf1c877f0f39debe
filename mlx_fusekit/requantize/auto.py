"""From a plan to solved weights: teacher, text, calibration, measurement, and wider bits."""

import contextlib
import gc
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fusekit import samples
from mlx_fusekit.adapters.updates import AdapterFolder
from mlx_fusekit.merging.plan import FusePlan, WeightStep, plan_fuse
from mlx_fusekit.progress import StepProgress, of_step
from mlx_fusekit.requantize.calibrated import Calibration
from mlx_fusekit.requantize.journal import Journal, decided_text, keep_text, kept_text
from mlx_fusekit.requantize.needs import allowed_bytes, memory_needs, spills, streams
from mlx_fusekit.requantize.options import CalibrationOptions, CalibrationReport
from mlx_fusekit.requantize.ranks import Ranks
from mlx_fusekit.requantize.requantizer import Prepared, Request
from mlx_fusekit.requantize.walk import FinalStates, measured_batches
from mlx_fusekit.requantize.widening import NARROWEST, choose_widths, measured_costs
from mlx_fusekit.running.model import RunningModel
from mlx_fusekit.running.shared import RunningBase
from mlx_fusekit.running.streamed import StreamedModel
from mlx_fusekit.texts.calibration import CalibrationText, Written, calibration_text
from mlx_fusekit.texts.data import TrainingData, training_data
from mlx_fusekit.texts.items import Features
from mlx_fusekit.texts.sequences import up_to
from mlx_fusekit.verifying.parity import (
    Batch,
    Parity,
    Variant,
    compare,
    make_batches,
    vocabulary_of,
)

#: Rounds of widening after which the search ends.
_MOST_ROUNDS = 5
#: Tokens to estimate gains on; each group of modules runs them.
_PROBE_TOKENS = 1024
#: Share of the bound that is aimed at, since gains are estimates, and the share that is near enough
#: for no narrower bits to be tried.
_AIM = 0.85
_CLOSE_ENOUGH = 0.6


def calibrate(request: Request) -> Prepared:
    """Solve the weights of a plan's re-quantized modules.

    Returns:
        The plan, with wider bits for some modules where the bound asked for them, and its weights.

    Raises:
        FusekitError: when there is no text to calibrate on, or the teacher cannot be loaded.
    """
    ranks = Ranks()
    with ranks.telling():
        if streams(request.plan, request.options):
            return _streamed(request, ranks)
        base = request.base or RunningBase(request.sources.model)
        with base.adapted(request.sources.adapter) as teacher:
            text = decided_text(
                ranks, lambda: _kept(request, lambda: _text(request, teacher, base.written))
            )
            return _Session(request, teacher, text, ranks=ranks).run()


def _streamed(request: Request, ranks: Ranks) -> Prepared:
    """With one layer at a time in memory."""
    streamed = StreamedModel(request.sources.model, request.sources.adapter)
    text = decided_text(
        ranks, lambda: _kept(request, lambda: _text_for_streamed(request, streamed))
    )
    return _Session(request, streamed.running, text, streamed, ranks=ranks).run()


def _kept(request: Request, make: Callable[[], CalibrationText]) -> CalibrationText:
    """The text of an interrupted run, or one that is made and kept."""
    if request.work is None:
        return make()
    text = kept_text(request.work.folder)
    if text is None:
        text = make()
        keep_text(request.work.folder, text)
    return text


def _text_for_streamed(request: Request, streamed: StreamedModel) -> CalibrationText:
    """The whole model writes the text if it can: running it takes less than calibrating it."""
    sources, options = request.sources, request.options
    if memory_needs(request.plan, options.tokens).running > allowed_bytes(options):
        return _text(request, streamed.running, {}, packaged=samples.general_data_path())
    base = request.base or RunningBase(sources.model)
    with base.adapted(sources.adapter) as teacher:
        text = _text(request, teacher, base.written)
    del teacher
    base.let_go()
    gc.collect()
    mx.clear_cache()
    return text


def _text(
    request: Request, teacher: RunningModel, written: Written, packaged: Path | None = None
) -> CalibrationText:
    sources, options = request.sources, request.options
    return calibration_text(
        teacher=lambda: contextlib.nullcontext(teacher.model),
        base=teacher.without_adapter,
        tokenizer=teacher.tokenizer,
        author="base+adapter" if sources.opened else "the model",
        file=options.file,
        features=[Features.trained_on(adapter.config) for adapter in sources.opened],
        training_data=known_training_data(sources.opened),
        tokens=options.tokens,
        seed=options.seed,
        written=written,
        packaged=packaged,
        progress=of_step(request.progress, "generating text"),
    )


@dataclass(frozen=True)
class _Attempt:
    """A plan, solved and measured."""

    plan: FusePlan
    calibration: Calibration
    report: CalibrationReport

    def better_than(self, other: "_Attempt") -> bool:
        """Whether it keeps the bound with fewer bytes, or comes closer while neither does."""
        if self.within != other.within:
            return self.within
        if self.within:
            return self.plan.output_bytes < other.plan.output_bytes
        return self.report.kl_upper < other.report.kl_upper

    @property
    def within(self) -> bool:
        """Whether it keeps the bound, as far as the text shows; so without a bound."""
        return self.report.max_kl is None or self.report.kl_upper <= self.report.max_kl


@dataclass
class _Session:
    request: Request
    teacher: RunningModel
    text: CalibrationText
    streamed: StreamedModel | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def plan(self) -> FusePlan:
        return self.request.plan

    @property
    def options(self) -> CalibrationOptions:
        return self.request.options

    @property
    def progress(self) -> StepProgress | None:
        return self.request.progress

    def run(self) -> Prepared:
        first = self._attempt({}, "re-quantizing")
        measurable = math.isfinite(first.report.kl_upper) and first.report.kl_mean > 0
        if self.options.target_bpw is not None:
            assert self.streamed is None, "it was refused"
            first = self._fitted(first, self.options.target_bpw, measurable=measurable)
            return Prepared(first.plan, first.calibration.solved, first.report)
        # Finding what to widen takes the whole model many times.
        if self.options.widen and measurable and not first.within and self.streamed is None:
            first = self._widened(first)
        return Prepared(first.plan, first.calibration.solved, first.report)

    def _attempt(self, widths: Mapping[str, int], label: str) -> "_Attempt":
        plan = self.plan
        if widths:
            plan = plan_fuse(plan.base, plan.adapter, replace(plan.options, widths=widths))
        calibration = self._calibrated(plan, label, self._journal(widths))
        known = calibration.measured_states
        found = self.ranks.decided(lambda: asdict(self._report(plan, calibration, known, widths)))
        interval, not_seen = found["kl_mean_ci95"], tuple(found["not_seen"])
        found |= {"kl_mean_ci95": interval and tuple(interval), "not_seen": not_seen}
        return _Attempt(plan, calibration, CalibrationReport(**found))

    def _widened(self, narrow: "_Attempt") -> "_Attempt":
        """The smallest model found that keeps the bound, or else the closest to it.

        Modules are widened in the order of their estimated gain for a byte; how far along that
        order is enough is found by re-quantizing and measuring.
        """
        bound, kl = self.options.max_kl, narrow.report.kl_mean
        assert bound is not None
        steps = {step.module: step for step in self.plan.requantized}
        costs = self._costs(narrow, steps) if self.ranks.first else {}
        growth = self.options.max_growth
        cap = None if growth is None else int(growth * self.plan.output_bytes)
        best, tried = narrow, [dict[str, int]()]
        # The bound is for the interval's upper end, and gains are estimated of the mean.
        too_little, enough, aim = kl, 0.0, _AIM * bound * kl / narrow.report.kl_upper
        for number in range(2, _MOST_ROUNDS + 2):
            widths = self.ranks.decided(partial(_bits, costs, steps, kl, aim, cap))
            if widths in tried:
                break
            tried.append(dict(widths))
            attempt = self._attempt(widths, f"re-quantizing, round {number}")
            if attempt.better_than(best):
                best = attempt
            measured = attempt.report.kl_upper
            if attempt.within:
                enough = aim
                if measured > _CLOSE_ENOUGH * bound:
                    break
            else:
                too_little = aim
            aim = math.sqrt(too_little * enough) if enough else aim * _AIM * bound / measured
        return best

    def _fitted(self, planned: "_Attempt", target: float, *, measurable: bool) -> "_Attempt":
        """The model that takes so many bits a weight; the planned one where that is closer."""
        steps = {step.module: step for step in self.plan.requantized}
        costs, kl = dict.fromkeys(planned.calibration.groups, 1.0), 1.0
        if measurable:
            costs = self._costs(planned, steps) if self.ranks.first else {}
            kl = planned.report.kl_mean
        free = int(target * self.plan.parameters / 8) - self.plan.text_bytes
        widths = self.ranks.decided(partial(_bits, costs, steps, kl, 0.0, free, NARROWEST))
        if not widths:
            return planned
        fitted = self._attempt(widths, "re-quantizing, with fitted widths")
        closer = planned.report.kl_mean <= fitted.report.kl_mean
        return planned if free >= 0 and closer else fitted

    def _costs(
        self, narrow: "_Attempt", steps: Mapping[str, WeightStep]
    ) -> dict[tuple[str, ...], float]:
        """What each group of modules adds to the KL divergence."""
        return measured_costs(
            self.teacher,
            steps,
            narrow.calibration.groups,
            {path: result.error for path, result in narrow.calibration.solved.results.items()},
            list(up_to(self.text.held_out, _PROBE_TOKENS)),
            of_step(self.progress, "looking for what to widen"),
        )

    def _journal(self, widths: Mapping[str, int]) -> Journal | None:
        work = self.request.work
        if work is None:
            return None
        name = hashlib.sha256(json.dumps(sorted(widths.items())).encode()).hexdigest()[:16]
        return Journal(work, f"walk-{name}")

    def _calibrated(self, plan: FusePlan, label: str, journal: Journal | None) -> Calibration:
        calibration = Calibration(
            plan,
            self.teacher,
            self.text.sequences,
            streamed=self.streamed,
            measured=measured_batches(self._measured),
            journal=journal,
            ranks=self.ranks,
            spill=spills(self.plan, self.options),
        )
        calibration.run(of_step(self.progress, label))
        return calibration

    @cached_property
    def _measured(self) -> list[Batch]:
        return make_batches(self.text.held_out, vocabulary_of(self.teacher.model))

    def _compared(
        self, calibration: Calibration, known: Mapping[str, Sequence[mx.array]] | None
    ) -> dict[str, Parity]:
        """The fused model and the base against the teacher, on text that was not calibrated on.

        Args:
            calibration: of the fused model.
            known: hidden states behind the last layer, where its layers are a chain.
        """
        model, told = self.teacher.model, of_step(self.progress, "measuring")
        fused, base = calibration.fused.active, self.teacher.without_adapter
        text = self.text.held_out
        if known is None:
            whole = {"fused": Variant(model, fused), "base": Variant(model, base)}
            return compare(model, whole, text, progress=told)
        batches = [batch.sequences for batch in self._measured]
        states = {name: dict(zip(batches, own, strict=True)) for name, own in known.items()}
        candidates = {
            "fused": FinalStates(model, fused, states["student"]),
            "base": FinalStates(model, base, states["base"]),
        }
        with self.streamed.trunk() if self.streamed else contextlib.nullcontext():
            teacher = FinalStates(model, states=states["teacher"])
            return compare(teacher, candidates, text, progress=told)

    def _report(
        self,
        plan: FusePlan,
        calibration: Calibration,
        known: Mapping[str, Sequence[mx.array]] | None,
        widths: Mapping[str, int],
    ) -> CalibrationReport:
        measured = self._compared(calibration, known)
        fused, base = measured["fused"], measured["base"]
        results = calibration.solved.results
        bound, interval = self.options.max_kl, fused.kl_mean_ci95
        return CalibrationReport(
            source=self.text.source,
            tokens=self.text.tokens,
            general_tokens=self.text.general_tokens,
            general_source=self.text.general_source,
            streamed=self.streamed is not None,
            resumed_modules=calibration.resumed,
            kl_mean=fused.kl_mean,
            kl_mean_ci95=interval,
            kl_p99=fused.kl_p99,
            kl_base_mean=base.kl_mean,
            kl_tokens=len(fused.kl),
            kl_sequences=len(fused.lengths),
            recovered=1 - fused.kl_mean / base.kl_mean if base.kl_mean > 0 else None,
            output_error=float(np.median([result.error for result in results.values()])),
            max_kl=bound,
            max_kl_asked=self.options.max_kl_asked,
            reached=None if bound is None or interval is None else interval[1] <= bound,
            widened=dict(widths),
            added_bytes=plan.output_bytes - self.plan.output_bytes,
            not_seen=tuple(path for path, result in results.items() if not result.tokens),
            skipped_tokens=max(result.skipped for result in results.values()),
        )


def _bits(*chosen_from: Any) -> dict[str, int]:
    return dict(choose_widths(*chosen_from).bits)


def known_training_data(adapters: Sequence[AdapterFolder]) -> list[TrainingData]:
    """Of each adapter; none where one of several has none, whose task would be left out."""
    found = [training_data(adapter.config, adapter.folder) for adapter in adapters]
    known = [data for data in found if data is not None]
    return known if len(known) == len(found) else []
