"""Fusing: a base model and its adapters into one model folder.

Reading never writes, planning reads headers only, and nothing touches the target until everything
in the staging folder is checked.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from mlx_fusekit.adapters.sources import AdapterNames, NamedSources, Sources
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
from mlx_fusekit.fusing.strategy import chosen_strategy
from mlx_fusekit.machine import default_workers, free_disk_bytes
from mlx_fusekit.merging.plan import FusePlan, plan_fuse
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.publishing.licenses import License
from mlx_fusekit.requantize.options import CALIBRATION_TOKENS, CalibrationReport
from mlx_fusekit.requantize.requantizer import Prepared, RequantizedWeight, Request
from mlx_fusekit.requantize.strategy import Strategy
from mlx_fusekit.writing.staging import staged
from mlx_fusekit.writing.targets import FolderTarget


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
    ) -> FuseReport:
        """Write the fused model, and what else was asked for.

        Args:
            clone: whether the file system may share unchanged blocks with the base.
            workers: threads; the result does not depend on their number.
            progress: called with the step, and how much of it is done and there is in all.

        Raises:
            FusekitError: with a line for the user; the target is then as it was before, or, where
                export or upload failed, the fused model is there and the line says so.
        """
        start = time.perf_counter()
        destinations.check_upload(self.options)
        files = self._hashed_files()
        with staged(self.target) as staging, folder.Hashing(files) as hashing:
            folder.check_disk(self.plan, self.target.path, staging, clone=clone)
            final, ready = self._made_ready(progress)
            if final is not self:
                folder.check_disk(final.plan, self.target.path, staging, clone=clone)
            cloned = execute(
                final.plan,
                staging,
                ready.requantizer if ready else _nothing_to_requantize,
                workers=workers,
                clone=clone,
                progress=_counted(final.plan, progress),
            )
            folder.write_beside_weights(
                final.plan, self.companions, staging, text_only=self.options.text_only
            )
            folder.check_written(final.plan, staging)
            calibrated = ready.report if ready else None
            folder.write_recipe(staging, final.recipe(hashing.result(), calibrated))
        report = final.report(
            cloned=cloned,
            seconds=time.perf_counter() - start,
            dry_run=False,
            calibration=calibrated,
        )
        trusted = self.sources.model.trusted
        return destinations.bring(
            report, self.options, sources=self.sources.folders, trusted=trusted, progress=progress
        )

    def _made_ready(self, progress: StepProgress | None) -> tuple[Self, Prepared | None]:
        """This fuse, with the widths and the strategy that came of it, and the strategy, ready."""
        if self.strategy is None:
            return self, None
        request = Request(self.plan, self.sources, self.options.calibrating, progress)
        try:
            ready = self.strategy.prepare(request)
        except (CheckpointError, ConfigurationError) as error:
            otherwise = self.strategy.otherwise
            if otherwise is None or not self.options.rounding_will_do:
                raise
            note = f"not calibrated: {error}"
            changed = replace(self, strategy=otherwise, notes=(*self.notes, note))
            return changed, otherwise.prepare(request)
        return (self if ready.plan is self.plan else replace(self, plan=ready.plan)), ready

    def _hashed_files(self) -> dict[str, list[Path]]:
        base = self.plan.base
        return {
            "base": [base.folder / name for name in ("config.json", *base.headers)],
            **{
                f"adapter {place}": list(opened.files)
                for place, opened in enumerate(self.sources.opened)
            },
        }

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


def prepare_fuse(
    model: str | Path,
    adapter_path: AdapterNames,
    save_path: str | Path,
    *,
    scale: float | None = None,
    ignore: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreparedFuse:
    """Check everything that can be refused, and plan the fuse; writes nothing.

    Args: as :func:`fuse`.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure.
    """
    asked = FuseOptions(**options)
    named = NamedSources.find(
        model,
        adapter_path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        scale=scale,
        combination=asked.combination,
        ignore=ignore,
    )
    path = Path(save_path).expanduser()
    target = model_target(path, overwrite=asked.overwrite, sources=named.folders)
    target.check()
    sources = named.open()
    if not asked.again:
        history.refuse_twice(sources)
    formats = asked.formats
    if asked.text_only:
        beside = beside_text(sources.base, trust_remote_code=trust_remote_code)
        formats = replace(formats, left_out=beside)
    plan = plan_fuse(sources.base, sources.adapter, formats)
    companions = find_companions(
        named.model.path, trust_remote_code=trust_remote_code, text_only=asked.text_only
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


def fuse(
    model: str | Path,
    adapter_path: AdapterNames,
    save_path: str | Path,
    *,
    requantize: str = "auto",
    bits: int | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    max_kl: float | None = None,
    max_growth: float | None = None,
    seed: int = 0,
    scale: float | None = None,
    combine: str = "sum",
    density: float | None = None,
    combine_seed: int = 0,
    ignore: Sequence[str] = (),
    again: bool = False,
    text_only: bool = False,
    export_gguf: bool = False,
    gguf_path: str | Path = "model.gguf",
    outtype: str = "auto",
    upload_repo: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: StepProgress | None = None,
) -> FuseReport:
    """Fuse adapters into a base model and write the result to a folder that mlx-lm loads.

    Args:
        model: folder or Hub id of the base, quantized by MLX or not.
        adapter_path: folder or Hub id of an mlx-lm adapter, or several; each may be followed by
            ``:WEIGHT`` to scale its update.
        save_path: the folder to make.
        requantize: how merged weights are brought back into the base's format: "calibrated" so
            that the layers' outputs change least on calibration text; "nearest" by rounding, which
            can lose a fine-tune; "auto" calibrated, and with wider bits for the modules that hurt
            most where ``max_kl`` asks for them.
        bits: width to give merged modules instead of the base's.
        dequantize: write the whole model unquantized.
        dtype: "float16", "bfloat16" or "float32" for ``dequantize``; by default as stored scales.
        calibration: text to calibrate on, JSON lines or an array in mlx-lm's formats, a folder with
            ``train.jsonl`` or a text file; by default the adapter's own training data where its
            configuration names an existing folder, else text that base+adapter writes.
        calibration_tokens: about how many tokens to calibrate on.
        max_kl: bound on the mean KL divergence from base+adapter, in nats a token, on text that
            was not calibrated on. For "auto" it is 0.1 by default.
        max_growth: how much larger than the base wider bits may make the model, as a share; by
            default there is no cap where ``max_kl`` is given, and 0.1 otherwise.
        seed: of calibration text that is chosen or generated.
        scale: of the adapter's update, taken instead of the one in ``adapter_config.json``.
        combine: how several adapters become one update: "sum" adds them up exactly; "ties", "dare"
            and "dare-ties" combine them element by element, as :mod:`mlx_fusekit.adapters.combined`
            says.
        density: share of each update's elements that ties and dare keep; 0.5 by default.
        combine_seed: of the elements that dare keeps.
        ignore: shell patterns (``*vision_tower*``) of the adapter's modules to leave out.
        again: fuse an adapter also into a model that holds it already.
        text_only: leave out vision, sound and further heads, which mlx-lm does not run; by default
            they come along unchanged.
        export_gguf: write the fused model as a GGUF file too.
        gguf_path: that file, seen from ``save_path``.
        outtype: its types, as :func:`mlx_fusekit.export_gguf` takes them.
        upload_repo: repository on the Hub to upload the result to, which is made private; not where
            ``max_kl`` was given and does not hold, or was not measured.
        revision: of the base on the Hub.
        overwrite: replace an existing model folder.
        trust_remote_code: let model code that lies in the base's folder run, and copy it.
        progress: called with the step, and how much of it is done and there is in all.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure; the target
            is then as it was before, or, where export or upload failed, the line says that the
            fused model is there.
    """
    prepared = prepare_fuse(
        model,
        adapter_path,
        save_path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        requantize=requantize,
        bits=bits,
        dequantize=dequantize,
        dtype=dtype,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        max_kl=max_kl,
        max_growth=max_growth,
        seed=seed,
        scale=scale,
        combine=combine,
        density=density,
        combine_seed=combine_seed,
        ignore=ignore,
        again=again,
        text_only=text_only,
        overwrite=overwrite,
        export_gguf=export_gguf,
        gguf_path=gguf_path,
        outtype=outtype,
        upload_repo=upload_repo,
    )
    return prepared.run(progress=progress)


def _nothing_to_requantize(step: Any, _: object) -> RequantizedWeight:
    raise AssertionError(f"{step.module}: no strategy was chosen, but it is re-quantized")


def _counted(plan: FusePlan, progress: StepProgress | None) -> Callable[[int], None]:
    total, done = plan.output_bytes, 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress("writing", min(done, total), total)

    return count
