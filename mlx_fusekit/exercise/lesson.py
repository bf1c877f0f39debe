"""The lesson from end to end: fuse twice, compare, time, and write the report."""

import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from mlx_fusekit import (
    BenchReport,
    ParityReport,
    PreparedFuse,
    Workload,
    benchmark,
    hub,
    prepare_fuse,
    samples,
    verify,
)
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.sources import Sources
from mlx_fusekit.bench.workload import Shape, check_context
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.exercise import parts, plots, report
from mlx_fusekit.exercise.findings import (
    ADAPTED,
    BASE,
    CALIBRATED,
    JSON_NAME,
    ROUNDED,
    Closeness,
    Findings,
    Fusing,
    read_findings_file,
)
from mlx_fusekit.exercise.options import Settings
from mlx_fusekit.exercise.peer import fuse_by_rounding, weight_bytes
from mlx_fusekit.exercise.texts import text
from mlx_fusekit.exercise.trade_off import speed_sentence
from mlx_fusekit.machine import memory_bytes
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.reading import is_file
from mlx_fusekit.tables import Table
from mlx_fusekit.texts.data import check_text
from mlx_fusekit.writing.files import write_new
from mlx_fusekit.writing.staging import staged
from mlx_fusekit.writing.targets import FolderTarget

#: Folders of the fused models, in the exercise's.
FOLDERS = {ROUNDED: "mlx-lm", CALIBRATED: "fused"}
#: Tokens to compare the models on.
PARITY_TOKENS = 1000
#: Without the base by itself, two models are timed where three would take more of the memory.
_MEMORY_SHARE = 0.6


class Audience(Protocol):
    """Whom the lesson speaks to."""

    def heading(self, words: str) -> None:
        """A step begins."""

    def say(self, words: str) -> None:
        """A paragraph."""

    def show(self, table: Table) -> None:
        """What was measured."""

    def warn(self, words: str) -> None:
        """Something that may matter."""

    def watching(self, *, animated: bool = True) -> AbstractContextManager[StepProgress | None]:
        """What work that takes long reports to; while timing, nothing may move on its own."""


def exercise_target(out: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> FolderTarget:
    """The folder to be made, which replaces nothing but an earlier exercise.

    Args:
        out: the folder.
        overwrite: whether an earlier exercise may be replaced.
        sources: folders that are read.
    """
    return FolderTarget(out, "--out", _refusal, overwrite, sources)


def _refusal(out: Path) -> str | None:
    try:
        read_findings_file(out / JSON_NAME)
    except ConfigurationError:
        return "holds no exercise"
    return None


def run_lesson(
    settings: Settings, out: Path, language: str, audience: Audience, *, overwrite: bool = False
) -> Findings:
    """Run the exercise and write its folder: the report, its JSON, pictures, both fused models.

    Args:
        settings: what to run.
        out: the folder to make.
        language: one of :data:`mlx_fusekit.exercise.texts.LANGUAGES`.
        audience: hears it step by step.
        overwrite: replace an earlier exercise, with the answer in it.

    Raises:
        FusekitError: with one line that names the file or flag, and the cure; the folder is then
            as it was before.
    """
    lesson = _Lesson(settings, language, audience)
    sources = (lesson.model.path, lesson.adapter.path)
    with staged(exercise_target(out, overwrite=overwrite, sources=sources)) as staging:
        findings = lesson.run(staging)
        value = findings.as_json()
        written = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        write_new(staging / JSON_NAME, written.encode())
        # From what a reader of the file will find in it.
        words = report.render(json.loads(written), language)
        write_new(staging / report.NAME, words.encode())
    return findings


class _Lesson:
    """One exercise."""

    def __init__(self, settings: Settings, language: str, audience: Audience) -> None:
        self._settings, self._language, self._audience = settings, language, audience
        code = settings.trust_remote_code
        sample = settings.model is None
        self.model = hub.resolve(settings.model or samples.model_path(), code=code)
        adapter = settings.adapter_path or samples.adapter_path()
        self.adapter = hub.resolve(adapter, what="--adapter-path")
        self._data = Path(settings.data).expanduser() if settings.data else None
        if self._data is None and sample:
            self._data = samples.evaluation_data_path()
        if self._data is not None and not is_file(self._data):
            raise ConfigurationError(f"--data {settings.data}: there is no such file")
        if self._data is not None:
            check_text(self._data)

    def run(self, folder: Path) -> Findings:
        prepared = self._prepared(folder / FOLDERS[CALIBRATED])
        plan = prepared.report()
        rank, scale = _rank_and_scale(prepared.sources)
        formats = plan.modules or {"parameters": plan.parameters}
        quantized = plan.requantize is not None
        names = {"model": report.plain(self.model.public_name), "adapter": self._adapter_name}
        self._audience.heading(self._text("title", **names))
        self._say("intro", **names)
        self._audience.heading(self._text("step_fuse"))
        modules = sum(formats.values())
        self._audience.say(parts.explain_merging(plan.kind, rank, scale, modules, self._language))
        self._audience.say(parts.explain_rounding(quantized, formats, self._language))
        fusing = self._fuse(folder, prepared)
        parity, tokens = self._compare(folder, fusing)
        if quantized:
            self._say("parity_depends")
        bench = self._time(folder, fusing[CALIBRATED])
        drawn = plots.draw(folder, parity, bench)
        findings = Findings(
            model=self.model.public_name,
            revision=self.model.revision,
            adapter=self.adapter.public_name,
            kind=plan.kind,
            rank=rank,
            scale=scale,
            formats=formats,
            quantized=quantized,
            adapters=self._settings.adapters,
            fusing=fusing,
            parity=parity,
            parity_data=self._data.name if self._data else "",
            parity_tokens=tokens,
            bench=bench,
            plots=drawn,
            seed=self._settings.seed,
        )
        self._audience.heading(self._text("step_cost"))
        self._say("cost_explained", adapters=findings.adapters)
        self._audience.show(parts.cost_table(findings, self._language))
        if not drawn:
            self._audience.warn(self._text("no_plots"))
        return findings

    @property
    def _adapter_name(self) -> str:
        return report.plain(self.adapter.public_name)

    def _text(self, key: str, **values: object) -> str:
        return text(self._language, key, **values)

    def _say(self, key: str, **values: object) -> None:
        self._audience.say(self._text(key, **values))

    def _prepared(self, target: Path) -> PreparedFuse:
        """The calibrated fuse, checked and planned; and what timing would refuse, refused now."""
        prepared = prepare_fuse(
            self.model.path,
            self.adapter.path,
            target,
            requantize="calibrated",
            seed=self._settings.seed,
            ignore=self._settings.ignore,
            trust_remote_code=self._settings.trust_remote_code,
        )
        shape = Shape(self._settings.prompt_tokens, self._settings.generation_tokens)
        check_context(prepared.plan.base.config, shape, self.model.public_name)
        return prepared

    def _fuse(self, folder: Path, prepared: PreparedFuse) -> dict[str, Fusing]:
        """Both ways, mlx-lm's first."""
        fusing = self._fused_by_rounding(folder)
        start = time.perf_counter()
        with self._audience.watching() as progress:
            done = prepared.run(progress=progress)
        for warning in done.warnings:
            self._audience.warn(warning)
        target = folder / FOLDERS[CALIBRATED]
        seconds = time.perf_counter() - start
        fusing[CALIBRATED] = Fusing(target.name, seconds, weight_bytes(target))
        self._audience.say(parts.fusing_sentence(CALIBRATED, fusing[CALIBRATED], self._language))
        return fusing

    def _fused_by_rounding(self, folder: Path) -> dict[str, Fusing]:
        """With mlx-lm's own command; empty where that cannot do it."""
        if self._settings.ignore:
            self._audience.warn(self._text("peer_ignores_nothing"))
            return {}
        rounded = fuse_by_rounding(
            self.model.path,
            self.adapter.path,
            folder / FOLDERS[ROUNDED],
            trust_remote_code=self._settings.trust_remote_code,
        )
        if not isinstance(rounded, Fusing):
            self._audience.warn(self._text("peer_failed", line=rounded))
            return {}
        self._audience.say(parts.fusing_sentence(ROUNDED, rounded, self._language))
        return {ROUNDED: rounded}

    def _compare(self, folder: Path, fusing: dict[str, Fusing]) -> tuple[dict[str, Closeness], int]:
        """How close all models are to base+adapter, and how many tokens tell it."""
        self._audience.heading(self._text("step_parity"))
        found = {}
        for name, made in fusing.items():
            with self._audience.watching() as progress:
                found[name] = verify(
                    self.model.path,
                    self.adapter.path,
                    folder / made.folder,
                    data=self._data,
                    seed=self._settings.seed,
                    max_tokens=PARITY_TOKENS,
                    ignore=self._settings.ignore,
                    trust_remote_code=self._settings.trust_remote_code,
                    progress=progress,
                )
        last = found[CALIBRATED]
        parity = _closeness(found)
        data = self._data.name if self._data else ""
        self._audience.say(parts.explain_parity(data, last.tokens, self._language))
        self._audience.show(parts.parity_table(parity, self._language))
        return parity, last.tokens

    def _time(self, folder: Path, fused: Fusing) -> BenchReport:
        chosen = self._settings
        self._audience.heading(self._text("step_timing"))
        self._audience.say(
            parts.explain_timing(
                chosen.prompt_tokens, chosen.generation_tokens, chosen.trials, self._language
            )
        )
        with self._audience.watching(animated=False) as progress:
            bench = benchmark(
                self.model.path,
                self.adapter.path,
                folder / fused.folder,
                workload=Workload(
                    prompt_tokens=(chosen.prompt_tokens,),
                    generation_tokens=(chosen.generation_tokens,),
                    trials=chosen.trials,
                    load_trials=chosen.load_trials,
                    seed=chosen.seed,
                ),
                skip_base=3 * fused.disk_bytes > _MEMORY_SHARE * memory_bytes(),
                fuse_seconds=fused.seconds,
                ignore=chosen.ignore,
                trust_remote_code=chosen.trust_remote_code,
                progress=progress,
            )
        if not bench.complete:
            # Half a benchmark makes no report; it was interrupted, and so is the exercise.
            raise KeyboardInterrupt
        self._audience.show(parts.timing_table(bench, self._language))
        assert bench.speedup is not None
        self._say("interval_explained")
        self._audience.say(speed_sentence(bench.speedup, self._language))
        for caution in parts.cautions(bench, self._language):
            self._audience.warn(caution)
        return bench


def _closeness(found: dict[str, ParityReport]) -> dict[str, Closeness]:
    """From the base to base+adapter."""
    last = found[CALIBRATED].as_json()
    models = {
        name: Closeness(value["kl_mean"], value["top1_agreement"], value["exact_match_fused"])
        for name, value in ((name, parity.as_json()) for name, parity in found.items())
    }
    base = Closeness(last["kl_base_mean"], last["top1_agreement_base"], last["exact_match_base"])
    return {BASE: base, **models, ADAPTED: Closeness(0.0, 1.0, last["exact_match_reference"])}


def _rank_and_scale(sources: Sources) -> tuple[int | None, float | None]:
    """Of the adapter, the largest rank where modules differ; None of a full fine-tune."""
    updates = sources.adapter.weights.values()
    ranks = [update.rank for update in updates if isinstance(update, LowRankUpdate)]
    return (max(ranks), sources.opened[0].scale) if ranks else (None, None)
