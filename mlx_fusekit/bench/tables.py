"""What a benchmark found, in tables of at most 80 columns and lines between them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mlx_fusekit import figures
from mlx_fusekit.bench.statistics import Summary
from mlx_fusekit.tables import Table

if TYPE_CHECKING:
    from mlx_fusekit.bench.environment import Environment
    from mlx_fusekit.bench.report import BenchReport, BreakEven, Run
    from mlx_fusekit.bench.statistics import Ratio

#: What most readers want to know of an arm.
TIMES = ("ttft_seconds", "tpot_seconds", "generation_tokens_per_second")
_FIGURES = {
    "ttft_seconds": figures.milliseconds,
    "tpot_seconds": figures.milliseconds,
    "prompt_tokens_per_second": figures.number,
    "generation_tokens_per_second": figures.number,
    "total_seconds": figures.in_seconds,
}
#: Why a speed-up is not one median by the other.
PAIRED = "times as fast: the median of the rounds' ratios, not the ratio of the medians"
#: How many adapters the decision table asks about.
_ADAPTERS = (1, 3, 10)


def all_tables(report: "BenchReport") -> Iterator[Table | str]:
    """Everything a reader needs to judge a run, in order: tables and lines."""
    for run in report.runs:
        yield from _times(report, run)
        yield from _speedups(report, run)
        yield from _same_text(run)
    yield from _costs(report)
    if report.fused and report.reference == "base+adapter":
        yield from _decision(report)
    yield from _machine(report)


def comparison(reports: Mapping[str, "BenchReport"]) -> Table:
    """Speed-ups of several runs, a line each."""
    rows = []
    for name, report in reports.items():
        first, found = report.runs[0], report.speedup
        arm = report.fused[0] if report.fused else report.reference
        unfused, fused = (
            figures.milliseconds(first.median(timed, "tpot_seconds"))
            for timed in (report.reference, arm)
        )
        where = f"{name} ({report.environment.chip})"
        rows.append((where, str(first.shape), unfused, fused, _ratio(found)))
    header = ("run", "shape", "unfused", "fused", "times as fast")
    return Table("Time a token, unfused and fused", header, rows)


def medians(run: "Run", arm: str, metrics: Sequence[str] = TIMES) -> tuple[str, ...]:
    """The medians of an arm; ``metrics`` as :meth:`Run.samples` takes them."""
    return tuple(_FIGURES[metric](run.median(arm, metric)) for metric in metrics)


def median_load(samples: Sequence[float]) -> str:
    """The median of load times, which not every run takes."""
    summary = Summary.of(samples)
    return figures.in_seconds(summary.median if summary else None)


def what_is_timed(run: "Run") -> str:
    """The shape of a run and how often it ran."""
    shape = run.shape
    batch = f", {shape.batch_size} at once" if shape.batch_size > 1 else ""
    trials = max(len(run.of(arm)) for arm in run.arms)
    return (
        f"{shape.prompt_tokens} prompt tokens, {shape.generation_tokens} generated{batch}; "
        f"medians of {trials} trials"
    )


def machine(found: "Environment") -> str:
    """What a run ran on."""
    memory = figures.size(found.memory_bytes)
    return f"{found.chip}, {found.cores} cores, {memory}, {found.os}"


def _times(report: "BenchReport", run: "Run") -> Iterator[Table | str]:
    header = ("", "first token", "per token", "p99 gap", "prompt/s", "tokens/s", "total")
    rows, far = [], {arm: run.outliers(arm) for arm in run.arms}
    for arm in run.arms:
        gaps = Summary.of(run.samples(arm, "itl_seconds"))
        first, per_token, rate = medians(run, arm)
        prompt_rate, total = medians(run, arm, ("prompt_tokens_per_second", "total_seconds"))
        slow = figures.milliseconds(gaps.p99 if gaps else None)
        name = f"{arm} *" if far[arm] else arm
        rows.append((name, first, per_token, slow, prompt_rate, rate, total))
    incomplete = "" if report.complete else " (INCOMPLETE)"
    yield Table(what_is_timed(run) + incomplete, header, rows)
    for arm, trials in far.items():
        if trials:
            times = ", ".join(figures.in_seconds(trial.total_seconds) for trial in trials)
            yield f"* {arm}: {len(trials)} far from the others ({times}); counted all the same"
    yield ""


def _speedups(report: "BenchReport", run: "Run") -> Iterator[Table | str]:
    metrics = {
        "per token": "tpot_seconds",
        "to the first token": "ttft_seconds",
        "in total": "total_seconds",
    }
    found = {label: run.speedups(metric, report.seed) for label, metric in metrics.items()}
    rows = []
    for arm in run.arms:
        ratios = {label: ratios[arm] for label, ratios in found.items() if arm in ratios}
        for place, (label, ratio) in enumerate(ratios.items()):
            name = arm if place == 0 else ""
            rows.append((name, label, figures.ratio(ratio.ratio), _interval(ratio), ratio.verdict))
    header = ("", "time", "times as fast", "95 % interval", "verdict")
    yield Table(f"Against {run.reference}", header, rows, text_columns=2)
    if rows:
        yield PAIRED
    yield ""


def _same_text(run: "Run") -> Iterator[Table | str]:
    rows = [
        (
            arm,
            figures.share(found.same_tokens, 0),
            figures.share(found.top1_agreement),
            figures.nats(found.kl_mean),
        )
        for arm, found in run.equivalence.items()
        if arm != run.reference
    ]
    if rows:
        header = ("", "same text until", "top-1 agreement", "KL mean")
        yield Table(f"Do they say what {run.reference} says?", header, rows)
        yield ""


def _costs(report: "BenchReport") -> Iterator[Table | str]:
    header = ("", "bits/weight", "disk", "read/token", "of limit", "load", "memory")
    rows = [
        (
            name,
            figures.bits(arm.bits_per_weight),
            figures.size(arm.disk_bytes),
            figures.size(arm.read_bytes_per_token),
            figures.share(report.limit_share(report.runs[0], name)),
            median_load(arm.load_seconds),
            figures.size(arm.peak_memory_bytes),
        )
        for name, arm in report.arms.items()
    ]
    yield Table("What they cost", header, rows)
    limit = report.bandwidth_bytes_per_second
    if limit is not None:
        yield f"of limit: weights read a second, by the memory's {figures.size(int(limit))}/s"
    yield ""


def _decision(report: "BenchReport") -> Iterator[Table | str]:
    """Is it worth losing the adapter's swappability?"""
    arm, reference = report.fused[0], report.reference
    found, speed = report.break_even(arm), report.speedup
    if found is None or speed is None:
        return
    facts = [("speed", _sentence(speed, arm))]
    if speed.verdict in ("faster", "slower"):
        word = "saves" if found.saved_seconds_per_token > 0 else "loses"
        saved = figures.in_seconds(abs(found.saved_seconds_per_token) * 1000)
        facts.append(("time", f"each 1,000 tokens it {word} {saved}"))
    facts.append(("break-even", _break_even(found, speed)))
    facts += _disk(report, arm)
    facts.append(("lost", "one base in memory can serve many adapters; fused, each is a model"))
    yield Table.of_facts(f"Is fusing worth it? ({arm} for {reference})", facts)
    yield ""


def _break_even(found: "BreakEven", speed: "Ratio") -> str:
    if found.tokens is not None and speed.verdict == "faster":
        took = figures.in_seconds(found.fuse_seconds)
        return f"fusing took {took}: {figures.count(found.tokens)} tokens"
    if found.fuse_seconds is None:
        return "give --fuse-seconds to see when fusing has paid"
    if speed.verdict == "slower":
        return "never: it is slower"
    return "cannot be told, as the speed cannot"


def _disk(report: "BenchReport", arm: str) -> Iterator[tuple[str, str]]:
    """What some numbers of adapters take, swappable and fused."""
    unfused, fused = report.arms[report.reference], report.arms[arm].disk_bytes
    adapter = unfused.adapter_disk_bytes
    base = unfused.disk_bytes - adapter
    for count in _ADAPTERS:
        swapped, separate = map(figures.size, (base + count * adapter, count * fused))
        word = "adapter" if count == 1 else "adapters"
        label = "disk" if count == _ADAPTERS[0] else ""
        yield label, f"{count} {word}: {swapped} swappable, {separate} fused"


def _sentence(speed: "Ratio", arm: str) -> str:
    if speed.verdict == "too few trials":
        rough = figures.ratio(speed.ratio, 2)
        return f"{arm} is about {rough} times as fast; too few trials to be sure (-n)"
    if speed.verdict == "no difference":
        return f"no difference that can be told ({_ratio(speed)})"
    return f"{arm} is {speed.verdict}: {_ratio(speed)} times as fast a token"


def _machine(report: "BenchReport") -> Iterator[str]:
    found = report.environment
    versions = " ".join(f"{name} {version}" for name, version in found.versions.items())
    power = f", power: {found.power}" if found.power else ""
    yield f"{machine(found)}{power}"
    if found.ranks > 1:
        yield f"one of {found.ranks} ranks ({found.backend}), of which bytes are the share"
    yield f"MLX on the {found.device}; {versions}; seed {report.seed}"


def _ratio(ratio: "Ratio | None") -> str:
    if ratio is None or ratio.ci95 is None:
        return figures.ratio(ratio.ratio if ratio else None)
    return f"{figures.ratio(ratio.ratio)} {_interval(ratio)}"


def _interval(ratio: "Ratio") -> str:
    if ratio.ci95 is None:
        return figures.UNKNOWN
    low, high = map(figures.ratio, ratio.ci95)
    return f"[{low}, {high}]"
