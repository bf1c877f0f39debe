"""From a plan to solved weights: teacher, text, calibration, measurement, and wider bits."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mlx_fusekit.adapters import AdapterFolder
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.parity import Model, Variant, compare
from mlx_fusekit.plan import FusePlan, plan_fuse
from mlx_fusekit.requantize.calibrated import Calibration, SolvedWeights
from mlx_fusekit.requantize.options import CalibrationOptions, CalibrationReport
from mlx_fusekit.requantize.widening import choose_widths, measured_shares, step_bits
from mlx_fusekit.running import RunningModel, run_adapted
from mlx_fusekit.texts.calibration import CalibrationText, calibration_text
from mlx_fusekit.texts.data import training_data

#: Rounds of widening after which the bound is given up.
_MOST_ROUNDS = 5

#: Called with the step, and how much of it is done and there is in all.
Progress = Callable[[str, int, int], None]


def calibrate(
    plan: FusePlan,
    adapters: tuple[AdapterFolder, ...],
    options: CalibrationOptions,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[FusePlan, SolvedWeights, CalibrationReport]:
    """Solve the weights of a plan's re-quantized modules.

    Args:
        plan: the fuse.
        adapters: their folders, which may name their training data.
        options: see there.
        trust_remote_code: let model code that lies in the base's folder run.
        progress: told of each step.

    Returns:
        The plan, with wider bits for some modules where the bound asked for them, and its weights.

    Raises:
        FusekitError: when there is no text to calibrate on, or the teacher cannot be loaded.
    """
    teacher = run_adapted(plan.base.folder, plan.adapter, trust_remote_code=trust_remote_code)
    text = calibration_text(
        teacher=lambda: contextlib.nullcontext(teacher.model),
        base=teacher.without_adapter,
        tokenizer=teacher.tokenizer,
        file=options.file,
        training_data=_training_data(adapters),
        tokens=options.tokens,
        seed=options.seed,
        progress=_step(progress, "generating text"),
    )
    session = _Session(plan, teacher, text, options, trust_remote_code, progress)
    return session.run()


@dataclass
class _Session:
    plan: FusePlan
    teacher: RunningModel
    text: CalibrationText
    options: CalibrationOptions
    trust_remote_code: bool
    progress: Progress | None

    def run(self) -> tuple[FusePlan, SolvedWeights, CalibrationReport]:
        widths: dict[str, int] = {}
        plan, calibration = self._calibrated(self.plan, "re-quantizing")
        report = self._report(plan, calibration, widths)
        for number in range(1, _MOST_ROUNDS + 1):
            wider = None if report.reached is not False else self._wider(calibration, report)
            if not self.options.widen or not wider or wider == widths:
                break
            widths = wider
            plan = plan_fuse(plan.base, plan.adapter, replace(plan.options, widths=widths))
            plan, calibration = self._calibrated(plan, f"re-quantizing, round {number + 1}")
            report = self._report(plan, calibration, widths)
        return plan, calibration.solved, report

    def _calibrated(self, plan: FusePlan, label: str) -> tuple[FusePlan, Calibration]:
        readable = plan
        if not isinstance(plan.base, Checkpoint):
            # What mlx-lm converts can be read once, and the fuse itself will.
            base = open_base(plan.base.folder, trust_remote_code=self.trust_remote_code)
            readable = plan_fuse(base, plan.adapter, plan.options)
        calibration = Calibration(readable, self.teacher, self.text.sequences)
        calibration.run(_step(self.progress, label))
        return plan, calibration

    def _report(
        self, plan: FusePlan, calibration: Calibration, widths: Mapping[str, int]
    ) -> CalibrationReport:
        model = self.teacher.model
        candidates: dict[str, Model] = {
            "fused": Variant(model, calibration.fused.active),
            "base": Variant(model, self.teacher.without_adapter),
        }
        measured = compare(
            model, candidates, self.text.held_out, progress=_step(self.progress, "measuring")
        )
        fused, base = measured["fused"], measured["base"]
        results = calibration.solved.results
        bound = self.options.max_kl
        return CalibrationReport(
            source=self.text.source,
            tokens=self.text.tokens,
            general_tokens=self.text.general_tokens,
            kl_mean=fused.kl_mean,
            kl_p99=fused.kl_p99,
            kl_base_mean=base.kl_mean,
            kl_tokens=len(fused.kl),
            recovered=1 - fused.kl_mean / base.kl_mean if base.kl_mean > 0 else None,
            output_error=float(np.median([result.error for result in results.values()])),
            max_kl=bound,
            max_kl_asked=self.options.max_kl_asked,
            reached=None if bound is None else bool(fused.kl_mean <= bound),
            widened=dict(widths),
            added_bytes=plan.output_bytes - self.plan.output_bytes,
            not_seen=tuple(path for path, result in results.items() if not result.tokens),
            skipped_tokens=max(result.skipped for result in results.values()),
        )

    def _wider(self, calibration: Calibration, report: CalibrationReport) -> dict[str, int] | None:
        """Wider bits that promise to keep the bound, or as much of it as the cap allows."""
        assert self.options.max_kl is not None
        steps = {s.module: s for s in self.plan.merged if s.target_spec is not None}
        shares = measured_shares(
            self.teacher.model,
            calibration.fused,
            calibration.groups,
            self.text.held_out,
            _step(self.progress, "looking for what to widen"),
        )
        growth = self.options.max_growth
        cap = None if growth is None else int(growth * self.plan.base_bytes)
        chosen = choose_widths(
            shares, steps, report.kl_mean, self.options.max_kl, cap, report.widened
        )
        return {p: b for p, b in chosen.bits.items() if b > step_bits(steps[p])}


def _training_data(adapters: tuple[AdapterFolder, ...]) -> Path | None:
    found = (training_data(adapter.config, adapter.folder) for adapter in adapters)
    return next((path for path in found if path is not None), None)


def _step(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else partial(progress, name)
