"""What a benchmark found: raw samples, and what is computed from them."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_fusekit.bench.environment import Environment
from mlx_fusekit.bench.equivalence import Equivalence
from mlx_fusekit.bench.statistics import Ratio, Summary, drift, outliers, speedup
from mlx_fusekit.bench.typed import typed
from mlx_fusekit.bench.workload import Shape
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.texts.sequences import derived_seed

FORMAT = "mlx-fusekit bench 1"
#: Drift that is worth a warning, as a share of the time.
DRIFT_TO_WARN = 0.05


@dataclass(frozen=True)
class Trial:
    """One timed generation.

    Attributes:
        arm: what ran.
        round: each arm runs once a round, from 0.
        position: in its round, from 0.
        started_seconds: since the first trial of the run began.
        ttft_seconds: until the first token was there.
        itl_seconds: each gap between tokens after that.
    """

    arm: str
    round: int
    position: int
    started_seconds: float
    ttft_seconds: float
    itl_seconds: tuple[float, ...]

    @property
    def tpot_seconds(self) -> float | None:
        """Mean gap: (last - first) / (tokens - 1); None of a single token."""
        return sum(self.itl_seconds) / len(self.itl_seconds) if self.itl_seconds else None

    @property
    def total_seconds(self) -> float:
        """From the start until the last token."""
        return self.ttft_seconds + sum(self.itl_seconds)


#: Times by which arms are compared; of each, shorter is better.
TIMES: Mapping[str, Callable[[Trial], float | None]] = {
    "tpot_seconds": lambda trial: trial.tpot_seconds,
    "ttft_seconds": lambda trial: trial.ttft_seconds,
    "total_seconds": lambda trial: trial.total_seconds,
}


@dataclass
class Run:
    """All trials of one shape.

    Attributes:
        shape: tokens of prompt and generation, batch.
        reference: the arm that others are compared with.
        trials: in the order of time.
        deterministic: by arm, whether every trial generated the same tokens.
        equivalence: by arm, how close its text is to the reference's.
    """

    shape: Shape
    reference: str
    trials: list[Trial] = field(default_factory=list)
    deterministic: dict[str, bool] = field(default_factory=dict)
    equivalence: dict[str, Equivalence] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Names of the arms that ran, as the report lists them."""
        return list(self.deterministic)

    def of(self, arm: str) -> list[Trial]:
        """An arm's trials in the order of time."""
        return [trial for trial in self.trials if trial.arm == arm]

    def samples(self, arm: str, metric: str) -> list[float]:
        """One number a trial, in the order of time; of ``itl_seconds``, all gaps of all trials."""
        trials = self.of(arm)
        if metric == "itl_seconds":
            return [gap for trial in trials for gap in trial.itl_seconds]
        if metric == "prompt_tokens_per_second":
            tokens = self.shape.prompt_tokens * self.shape.batch_size
            return [tokens / trial.ttft_seconds for trial in trials]
        if metric == "generation_tokens_per_second":
            gaps = [trial.tpot_seconds for trial in trials]
            return [self.shape.batch_size / gap for gap in gaps if gap]
        values = [TIMES[metric](trial) for trial in trials]
        return [value for value in values if value is not None]

    def median(self, arm: str, metric: str) -> float | None:
        """The median of the samples; None without any."""
        summary = Summary.of(self.samples(arm, metric))
        return summary.median if summary else None

    def speedups(self, metric: str, seed: int) -> dict[str, Ratio]:
        """How many times as fast as the reference each other arm is, by the rounds both finished.

        Args:
            metric: a key of :data:`TIMES`.
            seed: of the intervals.
        """
        found = {}
        times = {
            arm: {
                trial.round: value
                for trial in self.of(arm)
                if (value := TIMES[metric](trial)) is not None
            }
            for arm in self.arms
        }
        for arm in self.arms:
            own, reference = times[arm], times[self.reference]
            both = [number for number in own if number in reference]
            if arm != self.reference and both:
                found[arm] = speedup(
                    [reference[number] for number in both],
                    [own[number] for number in both],
                    seed=derived_seed(seed, f"{self.shape}/{arm}/{metric}"),
                )
        return found

    @property
    def drift(self) -> float | None:
        """See :func:`mlx_fusekit.bench.statistics.drift`."""
        return drift([self.samples(arm, "total_seconds") for arm in self.arms])

    def outliers(self, arm: str) -> list[Trial]:
        """Trials whose total time lies far from the arm's others."""
        trials = self.of(arm)
        return [trials[place] for place in outliers([trial.total_seconds for trial in trials])]


#: What is summarized of every arm.
METRICS = (
    "ttft_seconds",
    "tpot_seconds",
    "itl_seconds",
    "prompt_tokens_per_second",
    "generation_tokens_per_second",
    "total_seconds",
)


@dataclass(frozen=True)
class ArmReport:
    """What is known of an arm beside its times.

    Attributes:
        model: Hub id, or the path the user gave.
        adapter: Hub id or path of the adapter it ran with.
        adapter_kind: ``lora``, ``dora`` or ``full``.
        disk_bytes: of its weight files, the adapter's included.
        adapter_disk_bytes: the adapter's.
        bits_per_weight: in memory, adapter included.
        weight_bytes: in memory.
        read_bytes_per_token: of the weights that generating a token reads.
        load_seconds: one sample a process.
        adapter_load_seconds: the adapter's share of each.
        peak_memory_bytes: most that MLX held in a process that loaded and generated.
        peak_rss_bytes: most main memory of that process.
    """

    model: str
    adapter: str | None
    adapter_kind: str | None
    disk_bytes: int
    adapter_disk_bytes: int
    bits_per_weight: float
    weight_bytes: int
    read_bytes_per_token: int
    load_seconds: tuple[float, ...] = ()
    adapter_load_seconds: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None
    peak_rss_bytes: int | None = None


@dataclass(frozen=True)
class BreakEven:
    """When the time that fusing took is won back.

    Attributes:
        saved_seconds_per_token: the reference's median time a token less the fused model's.
        fuse_seconds: what fusing took, where the user said it.
        tokens: generated tokens until that is won back; None where it never is, or not known.
    """

    arm: str
    saved_seconds_per_token: float
    fuse_seconds: float | None
    tokens: int | None


@dataclass
class BenchReport:
    """The result of :func:`mlx_fusekit.benchmark`.

    Attributes:
        arms: in the order of the tables.
        runs: one a shape.
        settings: what was asked for, so that the run can be repeated.
        environment: machine and software.
        bandwidth_bytes_per_second: at which this machine reads memory, as measured; None if the
            run was interrupted before.
        fuse_seconds: what fusing took, where the user said it.
        seed: of prompts, order and intervals.
        complete: whether all trials ran.
        warnings: one line each.
    """

    arms: dict[str, ArmReport]
    runs: list[Run]
    settings: dict[str, Any]
    environment: Environment
    bandwidth_bytes_per_second: float | None = None
    fuse_seconds: float | None = None
    seed: int = 0
    complete: bool = True
    warnings: list[str] = field(default_factory=list)

    @property
    def reference(self) -> str:
        """The arm that others are compared with."""
        return self.runs[0].reference

    @property
    def fused(self) -> list[str]:
        """Arms that are neither the base nor the reference."""
        return [name for name in self.arms if name not in ("base", self.reference)]

    @property
    def speedup(self) -> Ratio | None:
        """Of the first fused model over the reference, by time per output token, first shape.

        Where only one token was generated: by time to first token.
        """
        if not self.fused:
            return None
        metric = self.speedup_metric
        return self.runs[0].speedups(metric, self.seed).get(self.fused[0])

    @property
    def speedup_metric(self) -> str:
        """What :attr:`speedup` compares."""
        return "tpot_seconds" if self.runs[0].shape.generation_tokens > 1 else "ttft_seconds"

    def limit_share(self, run: Run, arm: str) -> float | None:
        """Weight bytes an arm read a second while generating, by what the memory can deliver."""
        gap = run.median(arm, "tpot_seconds")
        if gap is None or self.bandwidth_bytes_per_second is None:
            return None
        read = self.arms[arm].read_bytes_per_token / gap
        return read / self.bandwidth_bytes_per_second

    def break_even(self, arm: str) -> BreakEven | None:
        """When a fused model has won back what fusing took, by the first shape."""
        run = self.runs[0]
        before, after = (run.median(name, "tpot_seconds") for name in (run.reference, arm))
        if before is None or after is None or run.reference == "base":
            return None
        saved = (before - after) / run.shape.batch_size
        tokens = None
        if self.fuse_seconds is not None and saved > 0:
            tokens = round(self.fuse_seconds / saved)
        return BreakEven(arm, saved, self.fuse_seconds, tokens)

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object; :func:`read_report` reads it back."""
        return {
            "format": FORMAT,
            "complete": self.complete,
            "seed": self.seed,
            "settings": self.settings,
            "reference": self.reference,
            "speedup": self._speedup_json(),
            "arms": {name: self._arm_json(name) for name in self.arms},
            "runs": [self._run_json(run) for run in self.runs],
            "bandwidth_bytes_per_second": self.bandwidth_bytes_per_second,
            "fuse_seconds": self.fuse_seconds,
            "break_even": {
                arm: asdict(found)
                for arm in self.fused
                if (found := self.break_even(arm)) is not None
            },
            "environment": asdict(self.environment),
            "warnings": self.warnings,
        }

    def _speedup_json(self) -> dict[str, Any] | None:
        found = self.speedup
        if found is None:
            return None
        return {
            **_ratio_json(found),
            "arm": self.fused[0],
            "over": self.reference,
            "metric": self.speedup_metric,
            "shape": str(self.runs[0].shape),
        }

    def _arm_json(self, name: str) -> dict[str, Any]:
        arm, run = self.arms[name], self.runs[0]
        facts = asdict(arm)
        facts["load_seconds"] = _summary_json(arm.load_seconds)
        facts["adapter_load_seconds"] = _summary_json(arm.adapter_load_seconds)
        facts["share_of_memory_limit"] = self.limit_share(run, name)
        return facts | {metric: _summary_json(run.samples(name, metric)) for metric in METRICS}

    def _run_json(self, run: Run) -> dict[str, Any]:
        return {
            "shape": asdict(run.shape),
            "reference": run.reference,
            "arms": run.arms,
            "statistics": {
                arm: {m: _statistics_json(run.samples(arm, m)) for m in METRICS} for arm in run.arms
            },
            "speedups": {
                metric: {arm: _ratio_json(r) for arm, r in run.speedups(metric, self.seed).items()}
                for metric in TIMES
            },
            "drift": run.drift,
            "outliers": {arm: [trial.round for trial in run.outliers(arm)] for arm in run.arms},
            "deterministic": run.deterministic,
            "equivalence": {arm: asdict(found) for arm, found in run.equivalence.items()},
            "trials": [asdict(trial) for trial in run.trials],
        }

    def as_csv(self) -> str:
        """One line a trial, with a header."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = ("prompt_tokens", "generation_tokens", "batch_size", "round", "position", "arm")
        times = ("started_seconds", "ttft_seconds", "tpot_seconds", "total_seconds")
        writer.writerow((*columns, *times))
        for run in self.runs:
            shape = (
                run.shape.prompt_tokens,
                run.shape.generation_tokens,
                run.shape.batch_size,
            )
            for t in run.trials:
                seconds = (t.started_seconds, t.ttft_seconds, t.tpot_seconds, t.total_seconds)
                writer.writerow((*shape, t.round, t.position, t.arm, *seconds))
        return text.getvalue()


def read_report(value: Mapping[str, Any], name: str) -> BenchReport:
    """A report from its JSON object.

    Only what was measured is read; statistics are computed again.

    Args:
        value: as :meth:`BenchReport.as_json` made it.
        name: of the file, for messages.

    Raises:
        ConfigurationError: when it is none.
    """
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise ConfigurationError(
            f"{name}: not a report of `mlx-fusekit bench --json` (its format is not {FORMAT!r})"
        )
    try:
        facts = {name: value[name] for name in BenchReport.__dataclass_fields__}
        facts["arms"] = {arm: _read_arm(entry) for arm, entry in value["arms"].items()}
        facts["runs"] = [_read_run(entry) for entry in value["runs"]]
        facts["environment"] = typed(Environment, value["environment"])
        report: BenchReport = typed(BenchReport, facts)
        _check_whole(report)
        return report
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"{name}: a damaged report of `mlx-fusekit bench --json` ({error!r})"
        ) from error


def _check_whole(report: BenchReport) -> None:
    """Refuse what says something of arms that are not there, or of no time.

    Raises:
        ValueError: saying what.
    """
    if not report.runs:
        raise ValueError("no runs")
    for run in report.runs:
        named = {run.reference, report.reference, *run.equivalence, *(t.arm for t in run.trials)}
        if unknown := {*named, *run.arms} - {*report.arms} or named - {*run.arms}:
            raise ValueError(f"nothing is said of the arm {min(unknown)!r}")
        for trial in run.trials:
            if not all(
                0 < seconds < math.inf for seconds in (trial.ttft_seconds, *trial.itl_seconds)
            ):
                raise ValueError("a trial that took no time")
        if min(run.shape.prompt_tokens, run.shape.generation_tokens, run.shape.batch_size) < 1:
            raise ValueError("a shape without tokens")
    if report.bandwidth_bytes_per_second is not None and not report.bandwidth_bytes_per_second > 0:
        raise ValueError("a memory that reads nothing")


def _read_arm(entry: Mapping[str, Any]) -> ArmReport:
    facts = {key: entry[key] for key in ArmReport.__dataclass_fields__}
    for key in ("load_seconds", "adapter_load_seconds"):
        facts[key] = tuple(facts[key]["samples"]) if facts[key] else ()
    return typed(ArmReport, facts)


def _read_run(entry: Mapping[str, Any]) -> Run:
    if not entry["trials"]:
        raise ValueError("a run without trials")
    facts = {
        "shape": typed(Shape, entry["shape"]),
        "reference": entry["reference"],
        "trials": [
            typed(Trial, t | {"itl_seconds": tuple(t["itl_seconds"])}) for t in entry["trials"]
        ],
        "deterministic": {arm: entry["deterministic"][arm] for arm in entry["arms"]},
        "equivalence": {arm: typed(Equivalence, e) for arm, e in entry["equivalence"].items()},
    }
    return typed(Run, facts)


def _ratio_json(ratio: Ratio) -> dict[str, Any]:
    return {
        "ratio": ratio.ratio,
        "ci95": list(ratio.ci95) if ratio.ci95 else None,
        "pairs": ratio.pairs,
        "verdict": ratio.verdict,
    }


def _statistics_json(samples: Sequence[float]) -> dict[str, Any] | None:
    summary = Summary.of(samples)
    return asdict(summary) if summary else None


def _summary_json(samples: Sequence[float]) -> dict[str, Any] | None:
    statistics = _statistics_json(samples)
    return {"samples": list(samples), **statistics} if statistics else None
