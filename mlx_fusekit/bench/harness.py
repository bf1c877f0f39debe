"""The benchmark from end to end: check, load, warm up, time in balanced order, compare, measure."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fusekit import figures, hub, launched
from mlx_fusekit.adapters.sources import NamedSources, open_model
from mlx_fusekit.bench.arms import (
    ADAPTED,
    BASE,
    FUSED,
    ArmSource,
    LoadedArm,
    load_arm,
    weight_facts,
)
from mlx_fusekit.bench.bandwidth import memory_bandwidth
from mlx_fusekit.bench.environment import Environment
from mlx_fusekit.bench.equivalence import equivalence
from mlx_fusekit.bench.isolated import MEASURED_ALONE, measure_isolated
from mlx_fusekit.bench.options import Workload
from mlx_fusekit.bench.report import DRIFT_TO_WARN, ArmReport, BenchReport, Run, Trial
from mlx_fusekit.bench.schedule import balanced_rounds
from mlx_fusekit.bench.timing import Timing, time_generation
from mlx_fusekit.bench.workload import (
    Shape,
    check_context,
    random_prompts,
    text_prompt,
    vocabulary_size,
)
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.machine import memory_bytes
from mlx_fusekit.progress import Progress, StepProgress, of_step
from mlx_fusekit.running.model import RunningModel
from mlx_fusekit.texts.chat import special_ids
from mlx_fusekit.texts.sequences import derived_seed
from mlx_fusekit.texts.tokens import token_rows
from mlx_fusekit.verifying.structure import check_same_model

#: The share of memory that all arms may take together; the rest is for what they compute.
_MEMORY_SHARE = 0.85


def benchmark(
    model: str | Path,
    adapter_path: str | Path | None = None,
    fused: Mapping[str, str | Path] | str | Path | None = None,
    *,
    workload: Workload | None = None,
    skip_base: bool = False,
    fuse_seconds: float | None = None,
    scale: float | None = None,
    ignore: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: StepProgress | None = None,
) -> BenchReport:
    """Time base, base+adapter as mlx-lm runs them, and fused models on the same tokens.

    Under ``mlx.launch`` every rank calls it, and each model is shared by all ranks.

    Interrupted (``KeyboardInterrupt``) after its first trial, it returns what was measured, marked
    as incomplete.

    Args:
        model: base, folder or Hub id.
        adapter_path: its adapter, folder or Hub id; without one, fused models are compared with the
            base.
        fused: fused models by name; of a single one the name is ``fused``.
        workload: what to do; mlx_lm.benchmark's prompt of 512 tokens by default.
        skip_base: leave out the base by itself.
        fuse_seconds: what fusing took, for the break-even.
        scale: of the adapter's update, taken instead of the one in ``adapter_config.json``.
        ignore: shell patterns (``*vision_tower*``) of the adapter's modules to leave out.
        revision: of a Hub base.
        trust_remote_code: let the models' own code run.
        progress: called between trials only.

    Raises:
        FusekitError: before anything is timed, when models and adapter do not belong together, the
            prompt is too long or the memory too small.
    """
    ignored = tuple(ignore)
    with launched.together():
        sources = _sources(
            model, adapter_path, fused, skip_base, scale, ignored, revision, trust_remote_code
        )
    return benchmark_arms(
        sources, workload or Workload(), fuse_seconds=fuse_seconds, progress=progress
    )


def benchmark_arms(
    sources: Sequence[ArmSource],
    workload: Workload,
    *,
    reference: str | None = None,
    fuse_seconds: float | None = None,
    progress: StepProgress | None = None,
) -> BenchReport:
    """As :func:`benchmark`, of any arms.

    Args:
        sources: the first is the one whose tokenizer is used.
        workload: what to do.
        reference: the arm that others are compared with: base+adapter, else the first.
        fuse_seconds: as for :func:`benchmark`.
        progress: called between trials only.
    """
    names = [source.name for source in sources]
    chosen = reference or (ADAPTED if ADAPTED in names else names[0])
    with launched.together():
        session = _Session(sources, workload, chosen, progress)
    report = session.run()
    report.fuse_seconds = fuse_seconds
    return report


class _Session:
    """One benchmark."""

    def __init__(
        self,
        sources: Sequence[ArmSource],
        workload: Workload,
        reference: str,
        progress: StepProgress | None,
    ) -> None:
        self._sources = sources
        self._workload = workload
        self._reference = reference
        self._progress = progress
        _check(sources, workload)

    def run(self) -> BenchReport:
        with launched.together():
            environment = Environment.read()
            loaded = {source.name: load_arm(source) for source in self._sources}
            shapes = self._shapes(loaded)
        report = BenchReport(
            arms={
                source.name: _arm_report(source, loaded[source.name]) for source in self._sources
            },
            runs=[],
            settings=self._settings(),
            environment=environment,
            seed=self._workload.seed,
        )
        try:
            with launched.in_contact():
                self._time(report, shapes, {name: arm.model for name, arm in loaded.items()})
            loaded.clear()
            mx.clear_cache()
            report.bandwidth_bytes_per_second = memory_bandwidth()
            if launched.backend() in MEASURED_ALONE:
                self._isolate(report, *next(iter(shapes.items())))
        except KeyboardInterrupt:
            report.runs = [run for run in report.runs if run.trials]
            if not report.runs:
                raise
            report.complete = False
        opened = [adapter for source in self._sources if (adapter := source.opened_adapter())]
        ignored = [note for a in opened for note in a.ignored.notes(a.folder.name)]
        report.warnings = [*ignored, *_warnings(report)]
        return report

    def _shapes(self, loaded: Mapping[str, LoadedArm]) -> dict[Shape, list[list[int]]]:
        """Each shape and its prompts."""
        work, first = self._workload, next(iter(loaded.values())).running
        if work.prompt is not None:
            tokens = text_prompt(work.prompt, first.tokenizer)
            shapes = [Shape(len(tokens), g, work.batch_size) for g in work.generation_tokens]
            prompts = {shape: [tokens] * work.batch_size for shape in shapes}
        else:
            running = [arm.running for arm in loaded.values()]
            sizes = [token_rows(each.model, each.config) for each in running]
            vocabulary = min(size for size in sizes if size is not None)
            special = _special(first)
            prompts = {
                shape: random_prompts(shape, vocabulary, special, work.seed)
                for p in work.prompt_tokens
                for g in work.generation_tokens
                for shape in [Shape(p, g, work.batch_size)]
            }
        for shape in prompts:
            for source in self._sources:
                check_context(loaded[source.name].running.config, shape, source.public_name)
        return prompts

    def _time(
        self,
        report: BenchReport,
        shapes: Mapping[Shape, list[list[int]]],
        models: Mapping[str, nn.Module],
    ) -> None:
        for shape, prompts in shapes.items():
            run = Run(shape, self._reference, deterministic=dict.fromkeys(models, True))
            report.runs.append(run)
            label = f" {shape}" if len(shapes) > 1 else ""
            tokens = measure(
                run,
                models,
                prompts,
                self._workload,
                warming=of_step(self._progress, f"warming up{label}"),
                timing=of_step(self._progress, f"timing{label}"),
            )
            comparing = of_step(self._progress, f"comparing{label}")
            if comparing is not None:
                comparing(0, 1)
            run.equivalence = equivalence(models, self._reference, prompts, tokens)
            if comparing is not None:
                comparing(1, 1)

    def _isolate(self, report: BenchReport, shape: Shape, prompts: list[list[int]]) -> None:
        """Load times and peak memory, each in a process of its own, in balanced order."""
        told = of_step(self._progress, "loading")
        order = balanced_rounds(len(self._sources), self._workload.load_trials, self._workload.seed)
        done = 0
        for number, arms in enumerate(order):
            for source in (self._sources[place] for place in arms):
                with launched.together():
                    found = measure_isolated(
                        source, prompts if number == 0 else (), shape.generation_tokens
                    )
                arm = report.arms[source.name]
                share = found.adapter_load_seconds
                arm = replace(arm, load_seconds=(*arm.load_seconds, found.load_seconds))
                if share is not None:
                    arm = replace(arm, adapter_load_seconds=(*arm.adapter_load_seconds, share))
                if number == 0:
                    arm = replace(
                        arm,
                        peak_memory_bytes=found.peak_memory_bytes,
                        peak_rss_bytes=found.peak_rss_bytes,
                    )
                report.arms[source.name] = arm
                done += 1
                if told is not None:
                    told(done, len(order) * len(self._sources))

    def _settings(self) -> dict[str, Any]:
        work = self._workload
        return {
            "prompt_tokens": list(work.prompt_tokens) if work.prompt is None else None,
            "generation_tokens": list(work.generation_tokens),
            "prompt": work.prompt,
            "batch_size": work.batch_size,
            "trials": work.trials,
            "load_trials": work.load_trials,
            "delay_seconds": work.delay_seconds,
            "prefill_step_size": work.prefill_step,
        }


def measure(
    run: Run,
    models: Mapping[str, nn.Module],
    prompts: Sequence[Sequence[int]],
    workload: Workload,
    *,
    warming: Progress | None = None,
    timing: Progress | None = None,
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Warm up every arm with the full shape, then time them in balanced order.

    Args:
        run: its shape is timed, and its trials noted in it, one by one.
        models: by arm.
        prompts: token ids ``[batch][prompt]``.
        workload: how often, with which delay and seed.
        warming: called between the warm-ups.
        timing: called between the trials.

    Returns:
        What each arm generated, ``[batch][tokens]``.
    """

    def once(name: str) -> Timing:
        time.sleep(workload.delay_seconds)
        return time_generation(
            models[name],
            prompts,
            run.shape.generation_tokens,
            prefill_step=workload.prefill_step,
        )

    names, tokens = list(models), {}
    run.deterministic = dict.fromkeys(names, True)
    for done, name in enumerate(names):
        _tell(warming, done, len(names))
        tokens[name] = once(name).tokens
    _tell(warming, len(names), len(names))
    seed = derived_seed(workload.seed, f"order/{run.shape}")
    order = balanced_rounds(len(names), workload.trials, seed)
    start = time.perf_counter()
    for number, places in enumerate(order):
        for position, name in enumerate(names[place] for place in places):
            _tell(timing, number * len(names) + position, len(order) * len(names))
            started = time.perf_counter() - start
            found = once(name)
            run.deterministic[name] &= found.tokens == tokens[name]
            run.trials.append(
                Trial(name, number, position, started, found.ttft_seconds, found.itl_seconds)
            )
    _tell(timing, len(order) * len(names), len(order) * len(names))
    return tokens


def _special(running: RunningModel) -> frozenset[int]:
    """Token ids that stand for no text; a model without a usable tokenizer can be timed too."""
    try:
        return special_ids(running.tokenizer)
    except CheckpointError:
        return frozenset()


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _sources(
    model: str | Path,
    adapter_path: str | Path | None,
    fused: Mapping[str, str | Path] | str | Path | None,
    skip_base: bool,
    scale: float | None,
    ignore: tuple[str, ...],
    revision: str | None,
    trust_remote_code: bool,
) -> list[ArmSource]:
    """The arms a user named, each checked to belong to the base."""
    arms = []
    if adapter_path is None:
        if scale is not None:
            raise ConfigurationError(f"--scale {scale:g}: goes with --adapter-path; drop it")
        if ignore:
            raise ConfigurationError(f"--ignore {ignore[0]!r}: goes with --adapter-path; drop it")
        base = hub.resolve(model, revision=revision, code=trust_remote_code)
        opened = open_model(base)
    else:
        named = NamedSources.find(
            model,
            adapter_path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            weighted=False,
            scale=scale,
            ignore=ignore,
        )
        base, opened, adapter = named.model, named.open().base, named.adapters[0].folder
        place = base.public_name, base.path, adapter.path
        arms.append(ArmSource(ADAPTED, *place, trust_remote_code, scale, ignore))
    if not skip_base or adapter_path is None:
        arms.insert(0, ArmSource(BASE, base.public_name, base.path, None, trust_remote_code))
    models = fused if isinstance(fused, Mapping) else ({} if fused is None else {FUSED: fused})
    for name, path in models.items():
        if name in (BASE, ADAPTED):
            raise ConfigurationError(f"--fused {name}={path}: {name} is the name of another arm")
        found = hub.resolve(path, what="--fused", code=trust_remote_code)
        checkpoint = Checkpoint.open(found.path, trust_remote_code=trust_remote_code)
        flag = f"--fused {found.public_name}"
        check_same_model(opened, checkpoint, f"--model {base.public_name}", flag)
        _check_vocabulary(opened.config, checkpoint.config, flag)
        arms.append(ArmSource(name, found.public_name, found.path, None, trust_remote_code))
    if len(arms) < 2:
        raise ConfigurationError("nothing to compare: give --adapter-path, --fused, or both")
    return arms


def _check_vocabulary(base: Mapping[str, Any], fused: Mapping[str, Any], flag: str) -> None:
    before, after = vocabulary_size(base), vocabulary_size(fused)
    if before != after:
        raise CheckpointError(
            f"{flag}: its vocabulary has {after} tokens, and the base's {before}; "
            "name the base it was fused from"
        )


def _check(sources: Sequence[ArmSource], workload: Workload) -> None:
    if workload.prompt is not None and not workload.prompt:
        raise ConfigurationError("--prompt: give a prompt that is not empty")
    adapted = [source.name for source in sources if source.adapter is not None]
    _, ranks = launched.ranks()
    if ranks > 1 and adapted:
        raise ConfigurationError(
            f"{adapted[0]}: mlx-lm cannot shard a model that has adapter layers; "
            "under mlx.launch leave --adapter-path out, and compare base and --fused"
        )
    limit = memory_bytes()
    with contextlib.suppress(KeyError):
        limit = min(limit, int(mx.device_info()["max_recommended_working_set_size"]))
    needed = sum(source.disk_bytes for source in sources) // ranks
    if needed > _MEMORY_SHARE * limit:
        raise ConfigurationError(
            f"all arms together take {figures.size(needed)} here, and this machine has "
            f"{figures.size(limit)} for them; leave some out (--skip-base, fewer --fused)"
        )


def _arm_report(source: ArmSource, arm: LoadedArm) -> ArmReport:
    facts = weight_facts(arm.model, arm.running.config)
    return ArmReport(
        model=source.public_name,
        adapter=str(source.adapter) if source.adapter else None,
        adapter_kind=opened.kind if (opened := source.opened_adapter()) else None,
        disk_bytes=source.disk_bytes,
        adapter_disk_bytes=source.adapter_disk_bytes,
        bits_per_weight=facts.bits_per_weight,
        weight_bytes=facts.weight_bytes,
        read_bytes_per_token=facts.read_bytes_per_token,
    )


def _warnings(report: BenchReport) -> list[str]:
    lines = []
    if report.environment.busy:
        load = report.environment.load_average
        lines.append(f"the machine was busy when this began (load average {figures.number(load)})")
    for run in report.runs:
        change = run.drift
        if change is not None and abs(change) > DRIFT_TO_WARN:
            way = "slower" if change > 0 else "faster"
            lines.append(
                f"{run.shape}: trials became {figures.share(abs(change), 0)} {way} while the "
                "benchmark ran; the order is balanced against that, but try --delay or a cooler "
                "machine"
            )
        unsteady = [arm for arm, same in run.deterministic.items() if not same]
        if unsteady:
            lines.append(
                f"{run.shape}: {', '.join(unsteady)} did not generate the same tokens every time"
            )
    return lines
