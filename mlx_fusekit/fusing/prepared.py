"""A fuse from its plan to its folder: planned, written, looked at, and put in its place.

Reading never writes, planning reads headers only, and nothing touches the target until everything
in the staging folder is checked.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from mlx_fusekit import launched
from mlx_fusekit.adapters.sources import NamedSources, Sources
from mlx_fusekit.checkpoint import recipe
from mlx_fusekit.checkpoint.belongings import Companions, find_companions
from mlx_fusekit.checkpoint.front_matter import front_matter
from mlx_fusekit.checkpoint.sanitized import beside_text
from mlx_fusekit.checkpoint.target import model_target
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.fusing import destinations, folder, history
from mlx_fusekit.fusing.execute import execute, working_memory
from mlx_fusekit.fusing.options import FuseOptions
from mlx_fusekit.fusing.report import (
    FuseReport,
    beside_text_warnings,
    calibration_warnings,
    dtype_name,
    format_warnings,
    formats_of,
    rounding_warnings,
    unmeasured_warnings,
)
from mlx_fusekit.fusing.resuming import deciding_inputs
from mlx_fusekit.fusing.shared import Shared
from mlx_fusekit.fusing.strategy import chosen_strategy
from mlx_fusekit.machine import default_workers, free_disk_bytes
from mlx_fusekit.merging.plan import FusePlan, outputs_of, plan_fuse
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.publishing.licenses import License
from mlx_fusekit.requantize.options import CalibrationReport
from mlx_fusekit.requantize.requantizer import Prepared, RequantizedWeight, Request
from mlx_fusekit.requantize.strategy import Strategy
from mlx_fusekit.writing.staging import staged
from mlx_fusekit.writing.targets import FolderTarget
from mlx_fusekit.writing.work import Work, kept_work


@dataclass(frozen=True)
class PreparedFuse:
    """A fuse that was checked and planned; nothing has been written.

    Attributes:
        sources: base and adapters.
        target: the folder to be made.
        plan: of its weights.
        companions: files of the base that come along.
        options: what was asked for.
        strategy: how merged weights are re-quantized; None where none are.
        notes: warnings about the strategy and the destinations.
    """

    sources: Sources
    target: FolderTarget
    plan: FusePlan
    companions: Companions
    options: FuseOptions
    strategy: Strategy | None
    notes: tuple[str, ...] = ()

    @property
    def calibrates(self) -> bool:
        """Whether the base is run to calibrate its weights."""
        return self.strategy is not None and self.strategy.calibrates

    def report(
        self,
        *,
        cloned: bool = False,
        seconds: float = 0.0,
        dry_run: bool = True,
        calibration: CalibrationReport | None = None,
    ) -> FuseReport:
        """What will be done, from the plan alone."""
        plan = self.plan
        return FuseReport(
            save_path=str(self.target.path),
            base=self.sources.model.public_name,
            revision=self.sources.model.revision,
            adapters=self.sources.adapter_names,
            weights=self.sources.weights,
            combine=self.sources.combination.as_json(),
            kind=plan.adapter.kind,
            requantize=self.strategy.name if self.strategy else None,
            modules=formats_of(plan),
            unchanged=len(plan.unchanged),
            parameters=len(plan.adapter.parameters),
            base_bytes=plan.base_bytes,
            output_bytes=plan.output_bytes,
            bits_per_weight=8 * plan.text_bytes / plan.parameters,
            computed_bytes=plan.computed_bytes,
            memory_bytes=working_memory(plan, default_workers()),
            disk_free_bytes=free_disk_bytes(self.target.path),
            files=tuple(file.name for file in plan.files),
            cloned=cloned,
            seconds=seconds,
            dry_run=dry_run,
            warnings=self._warnings(calibration),
            left_out=self.companions.left_out,
            ignored=self.sources.ignored,
            max_kl=self.options.max_kl,
            calibration=calibration,
        )

    def with_needs(self) -> FuseReport:
        """The report of the plan, and what calibrating will take, for which this is timed."""
        if not self.calibrates:
            return self.report()
        from mlx_fusekit.requantize.auto import known_training_data
        from mlx_fusekit.requantize.needs import calibration_needs

        options = self.options.calibrating
        data = bool(options.file or known_training_data(self.sources.opened))
        needs = calibration_needs(self.plan, options, data)
        return replace(self.report(), needs=needs)

    def _warnings(self, calibration: CalibrationReport | None) -> tuple[str, ...]:
        rounds = self.strategy is not None and not self.strategy.calibrates
        return (
            *self.plan.base.warnings,
            *self.plan.adapter.warnings,
            *self.notes,
            *(unmeasured_warnings(self.options.max_kl) if self.strategy is None else ()),
            *(rounding_warnings(self.plan) if rounds else ()),
            *format_warnings(self.plan),
            *(calibration_warnings(calibration) if calibration else ()),
        )

    def run(
        self,
        *,
        clone: bool = True,
        workers: int | None = None,
        progress: StepProgress | None = None,
        shared: Shared | None = None,
    ) -> FuseReport:
        """Write the fused model, and what else was asked for.

        Args:
            clone: whether the file system may share unchanged blocks with the base.
            workers: threads; the result does not depend on their number.
            progress: called with the step, and how much of it is done and there is in all.
            shared: what other fuses of this base have too.

        Raises:
            FusekitError: with a line for the user; the target is then as it was before, or, where
                export or upload failed, the fused model is there and the line says so.
        """
        start = time.perf_counter()
        if not launched.first():
            return self._helped(progress)
        files = self.adapter_files if shared else {"base": self.base_files, **self.adapter_files}
        with ExitStack() as stack:
            work = self._begun(stack) if self.calibrates else None
            destinations.check_upload(self.options)
            staging = stack.enter_context(staged(self.target))
            hashing = stack.enter_context(folder.Hashing(files))
            kept = self._solved_bytes if self.calibrates else 0
            folder.check_disk((self.plan,), self.target.path, staging, clone=clone, kept=kept)
            final, ready = self._made_ready(progress, shared, work)
            if final is not self:
                folder.check_disk((final.plan,), self.target.path, staging, clone=clone)
            cloned = execute(
                final.plan,
                staging,
                ready.requantizer if ready else nothing_to_requantize,
                workers=workers,
                clone=clone,
                progress=counted(final.plan.output_bytes, progress),
            )
            calibrated = ready.report if ready else None
            digests = hashing.result() | ({"base": shared.digests()} if shared else {})
            final.complete(staging, digests, calibrated)
        seconds = time.perf_counter() - start
        report = final.report(cloned=cloned, seconds=seconds, dry_run=False, calibration=calibrated)
        return self.bring(report, progress)

    def complete(
        self,
        staging: Path,
        digests: dict[str, dict[str, str]],
        calibrated: CalibrationReport | None = None,
    ) -> None:
        """Write what lies beside the weights, and look at all of it once more.

        Args:
            staging: the folder with the weights.
            digests: of the base's and the adapters' files, by group and name.
            calibrated: what calibrating did, where there was any.
        """
        folder.write_beside_weights(
            self.plan, self.companions, staging, text_only=self.options.text_only
        )
        folder.check_written(self.plan, staging)
        folder.write_recipe(staging, self.recipe(digests, calibrated))

    def bring(self, report: FuseReport, progress: StepProgress | None) -> FuseReport:
        """Bring the fused model where else it was asked for; the report, with what came of it.

        Raises:
            FusekitError: with a line that says where the fused model is.
        """
        sources, trusted = self.sources.folders, self.sources.model.trusted
        return destinations.bring(
            report, self.options, sources=sources, trusted=trusted, progress=progress
        )

    def _helped(self, progress: StepProgress | None) -> FuseReport:
        """Do a further rank's share of calibrating; only the first one writes."""
        if self.calibrates:
            with ExitStack() as stack:
                work = self._begun(stack)
                self._made_ready(progress, None, work)
        return self.report(dry_run=False)

    def _begun(self, stack: ExitStack) -> Work:
        """Where what calibrating does is kept, so that an interrupted run can go on.

        The ranks of a launcher end together, so that none forgets its work before all is written.
        """
        inputs = deciding_inputs(
            self.plan, self.sources, self.options.calibrating, self.base_files, self.adapter_files
        )
        with launched.together():
            kept = kept_work(self.target.path, inputs, self.options.resume, launched.ranks()[0])
            work = stack.enter_context(kept)
        stack.enter_context(launched.together())
        return work

    def _made_ready(
        self, progress: StepProgress | None, shared: Shared | None, work: Work | None
    ) -> tuple[Self, Prepared | None]:
        """This fuse, with the widths and the strategy that came of it, and the strategy, ready."""
        if self.strategy is None:
            return self, None
        base = shared.base if shared and self.calibrates else None
        request = Request(self.plan, self.sources, self.options.calibrating, progress, base, work)
        try:
            ready = self.strategy.prepare(request)
        except (CheckpointError, ConfigurationError, launched.FailedElsewhereError) as error:
            otherwise = self.strategy.otherwise
            if otherwise is None or not self.options.rounding_will_do:
                raise
            note = f"not calibrated: {error}"
            changed = replace(self, strategy=otherwise, notes=(*self.notes, note))
            return changed, otherwise.prepare(request)
        return (self if ready.plan is self.plan else replace(self, plan=ready.plan)), ready

    @property
    def _solved_bytes(self) -> int:
        """Of the rows that calibrating keeps until the model is whole."""
        outputs = (output for step in self.plan.requantized for output in outputs_of(step))
        return sum(output.nbytes for output in outputs)

    @property
    def base_files(self) -> list[Path]:
        """What of the base is named in the recipe by its digest."""
        base = self.plan.base
        return [base.folder / name for name in ("config.json", *base.headers)]

    @property
    def adapter_files(self) -> dict[str, list[Path]]:
        """The same of each adapter."""
        adapters = enumerate(self.sources.opened)
        return {f"adapter {place}": list(opened.files) for place, opened in adapters}

    def recipe(
        self, digests: dict[str, dict[str, str]], calibrated: CalibrationReport | None
    ) -> dict[str, Any]:
        """The content of ``fusekit.json``: what was asked for and done, and nothing measured."""
        adapters = [
            {
                "id": choice.folder.public_name,
                "revision": choice.folder.revision,
                "weight": choice.weight,
                "scale": None if opened.kind == "full" else opened.scale,
                "ignore": list(opened.ignored.patterns),
                "ignored": list(opened.ignored.modules),
                "sha256": digests[f"adapter {place}"],
            }
            for place, (choice, opened) in enumerate(
                zip(self.sources.choices, self.sources.opened, strict=True)
            )
        ]
        model, formats = self.sources.model, self.plan.options
        return {
            "base": {
                "id": model.public_name,
                "revision": model.revision,
                "sha256": digests["base"],
                "license": self._license,
            },
            "adapters": adapters,
            "combine": self.sources.combination.as_json(),
            "earlier_adapters": history.held_by(self.plan.base.folder),
            "kind": self.plan.adapter.kind,
            "requantize": self.strategy.name if self.strategy else None,
            "calibration": calibrated.recorded if calibrated else None,
            "bits": formats.bits,
            "quantize": formats.quantize.as_config() if formats.quantize else None,
            "dequantize": formats.dequantize,
            "text_only": self.options.text_only,
            "dtype": dtype_name(formats.dtype) if formats.dtype else None,
            "seed": self.options.seed,
            "modules": [step.module for step in self.plan.merged],
            "parameters": list(self.plan.adapter.parameters),
            "versions": recipe.versions(),
        }

    @property
    def _license(self) -> dict[str, str] | None:
        """What the card of the base says of its license, for where the base cannot be asked."""
        card, model = front_matter(self.plan.base.folder), self.sources.model
        known = License.of_card(card, model.repo_id, self.companions.copied)
        if known is None:
            return None
        return {name: value for name, value in known.metadata.items() if value is not None}


def plan_named(
    named: NamedSources,
    path: Path,
    asked: FuseOptions,
    open_sources: Callable[[], Sources],
    *,
    beside: Sequence[Path] = (),
) -> PreparedFuse:
    """The same of sources that were found.

    Args:
        named: base and adapters.
        path: of the folder to make.
        asked: how.
        open_sources: opens base and adapters.
        beside: folders that are read too, so that nothing may be written there.

    Raises:
        FusekitError: as :func:`prepare_fuse`.
    """
    target = model_target(path, overwrite=asked.overwrite, sources=(*named.folders, *beside))
    target.check()
    sources = open_sources()
    trusted = named.model.trusted
    if not asked.again:
        history.refuse_twice(sources)
    formats = asked.formats
    if asked.text_only:
        left_out = beside_text(sources.base, trust_remote_code=trusted)
        formats = replace(formats, left_out=left_out)
    plan = plan_fuse(sources.base, sources.adapter, formats)
    companions = find_companions(
        named.model.path, trust_remote_code=trusted, text_only=asked.text_only
    )
    strategy, notes = chosen_strategy(plan, sources.model, asked)
    notes += destinations.check(sources.base, path, asked, named.folders)
    destinations.check_texts(named.folders, companions.copied, path, asked)
    notes += tuple(history.better_start(sources))
    notes += tuple(beside_text_warnings(plan, text_only=asked.text_only))
    return PreparedFuse(
        sources=sources,
        target=target,
        plan=plan,
        companions=companions,
        options=asked,
        strategy=strategy,
        notes=notes,
    )


def nothing_to_requantize(step: Any, _: object) -> RequantizedWeight:
    """A requantizer for a plan in which nothing is."""
    raise AssertionError(f"{step.module}: no strategy was chosen, but it is re-quantized")


def counted(total: int, progress: StepProgress | None) -> Callable[[int], None]:
    """What is called with the number of bytes just written, of so many in all."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress("writing", min(done, total), total)

    return count
