"""The tables of ``mlx-fusekit bench``, each at most 80 columns wide."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import output

if TYPE_CHECKING:
    from mlx_fusekit.bench.report import BenchReport, Run
    from mlx_fusekit.bench.statistics import Ratio

#: How many adapters the decision table asks about.
_ADAPTERS = (1, 3, 10)


def show(report: "BenchReport") -> None:
    """Everything a reader needs to judge a run."""
    for run in report.runs:
        _times(report, run)
        _speedups(report, run)
        _same_text(run)
    _costs(report)
    if report.fused and report.reference == "base+adapter":
        _decision(report)
    _machine(report)


def compare(reports: Mapping[str, "BenchReport"]) -> None:
    """Speed-ups of several runs, a line each."""
    rows = []
    for name, report in reports.items():
        first, found = report.runs[0], report.speedup
        arm = report.fused[0] if report.fused else report.reference
        rows.append(
            (
                f"{name}\n  {report.environment.chip}",
                str(first.shape),
                figures.milliseconds(first.median(report.reference, "tpot_seconds")),
                figures.milliseconds(first.median(arm, "tpot_seconds")),
                _ratio(found),
            )
        )
    header = ("run", "shape", "unfused", "fused", "times as fast")
    output.print_rows("Time a token, unfused and fused", header, rows)


def _times(report: "BenchReport", run: "Run") -> None:
    shape = run.shape
    batch = f", {shape.batch_size} at once" if shape.batch_size > 1 else ""
    trials = max(len(run.of(arm)) for arm in run.arms)
    title = (
        f"{shape.prompt_tokens} prompt tokens, {shape.generation_tokens} generated{batch}; "
        f"medians of {trials} trials"
    )
    if not report.complete:
        title += " (INCOMPLETE)"
    header = ("", "first token", "per token", "p99 gap", "prompt/s", "tokens/s", "total")
    rows = []
    for arm in run.arms:
        gaps = run.samples(arm, "itl_seconds")
        rows.append(
            (
                _with_outliers(run, arm),
                figures.milliseconds(run.median(arm, "ttft_seconds")),
                figures.milliseconds(run.median(arm, "tpot_seconds")),
                figures.milliseconds(_p99(gaps)),
                figures.number(run.median(arm, "prompt_tokens_per_second")),
                figures.number(run.median(arm, "generation_tokens_per_second")),
                figures.in_seconds(run.median(arm, "total_seconds")),
            )
        )
    output.print_rows(title, header, rows)
    for arm in run.arms:
        far = run.outliers(arm)
        if far:
            times = ", ".join(f"{trial.total_seconds:.3g} s" for trial in far)
            click.echo(f"* {arm}: {len(far)} far from the others ({times}); counted all the same")
    click.echo()


def _with_outliers(run: "Run", arm: str) -> str:
    return f"{arm} *" if run.outliers(arm) else arm


def _speedups(report: "BenchReport", run: "Run") -> None:
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
            rows.append((name, label, f"{ratio.ratio:.3f}", _interval(ratio), ratio.verdict))
    header = ("", "time", "times as fast", "95 % interval", "verdict")
    output.print_rows(f"Against {run.reference}", header, rows, text_columns=2)
    click.echo()


def _same_text(run: "Run") -> None:
    rows = [
        (
            arm,
            f"{found.same_tokens:.0%}",
            f"{found.top1_agreement:.1%}",
            f"{found.kl_mean:.2g}",
        )
        for arm, found in run.equivalence.items()
        if arm != run.reference
    ]
    if rows:
        header = ("", "same text until", "top-1 agreement", "KL mean")
        output.print_rows(f"Do they say what {run.reference} says?", header, rows)
        click.echo()


def _costs(report: "BenchReport") -> None:
    from mlx_fusekit.bench.statistics import Summary

    run, rows = report.runs[0], []
    for name, arm in report.arms.items():
        load, share = Summary.of(arm.load_seconds), report.limit_share(run, name)
        rows.append(
            (
                name,
                f"{arm.bits_per_weight:.2f}",
                figures.size(arm.disk_bytes),
                figures.size(arm.read_bytes_per_token),
                "" if share is None else f"{share:.1%}",
                "" if load is None else figures.in_seconds(load.median),
                "" if arm.peak_memory_bytes is None else figures.size(arm.peak_memory_bytes),
            )
        )
    header = ("", "bits/weight", "disk", "read/token", "of limit", "load", "memory")
    output.print_rows("What they cost", header, rows)
    limit = report.bandwidth_bytes_per_second
    if limit is not None:
        click.echo(f"of limit: weights read a second, by the memory's {figures.size(int(limit))}/s")
    click.echo()


def _decision(report: "BenchReport") -> None:
    """Is it worth losing the adapter's swappability?"""
    arm, run = report.fused[0], report.runs[0]
    found, speed = report.break_even(arm), report.speedup
    if found is None or speed is None:
        return
    facts = [("speed", _sentence(speed, arm))]
    saved = found.saved_seconds_per_token
    if speed.verdict in ("faster", "slower"):
        word = "saves" if saved > 0 else "loses"
        facts.append(
            ("time", f"each 1,000 tokens it {word} {figures.in_seconds(abs(saved) * 1000)}")
        )
    if found.tokens is not None and speed.verdict == "faster":
        facts.append(
            (
                "break-even",
                f"fusing took {figures.in_seconds(found.fuse_seconds)}: {found.tokens:,} tokens",
            )
        )
    elif found.fuse_seconds is None:
        facts.append(("break-even", "give --fuse-seconds to see when fusing has paid"))
    elif speed.verdict == "slower":
        facts.append(("break-even", "never: it is slower"))
    else:
        facts.append(("break-even", "cannot be told, as the speed cannot"))
    unfused, fused = report.arms[run.reference], report.arms[arm].disk_bytes
    adapter = unfused.adapter_disk_bytes
    base = unfused.disk_bytes - adapter
    for count in _ADAPTERS:
        swapped, separate = map(figures.size, (base + count * adapter, count * fused))
        label = "disk" if count == _ADAPTERS[0] else ""
        word = "adapter" if count == 1 else "adapters"
        facts.append(
            (
                label,
                f"{count} {word}: {swapped} swappable, {separate} fused",
            )
        )
    facts.append(("lost", "one base in memory can serve many adapters; fused, each is a model"))
    output.print_facts(f"Is fusing worth it? ({arm} for {run.reference})", facts)
    click.echo()


def _sentence(speed: "Ratio", arm: str) -> str:
    if speed.verdict == "too few trials":
        return f"{arm} is about {speed.ratio:.2f} times as fast; too few trials to be sure (-n)"
    if speed.verdict == "no difference":
        return f"no difference that can be told ({_ratio(speed)})"
    return f"{arm} is {speed.verdict}: {_ratio(speed)} times as fast a token"


def _machine(report: "BenchReport") -> None:
    found = report.environment
    versions = " ".join(f"{name} {version}" for name, version in found.versions.items())
    power = f", power: {found.power}" if found.power else ""
    memory = figures.size(found.memory_bytes)
    click.echo(f"{found.chip}, {found.cores} cores, {memory}, {found.os}{power}")
    if found.machines > 1:
        click.echo(f"one of {found.machines} machines, of which bytes are the share")
    click.echo(f"MLX on the {found.device}; {versions}; seed {report.seed}")


def _p99(values: list[float]) -> float | None:
    from mlx_fusekit.bench.statistics import Summary

    summary = Summary.of(values)
    return summary.p99 if summary else None


def _ratio(ratio: "Ratio | None") -> str:
    return "" if ratio is None else f"{ratio.ratio:.3f} {_interval(ratio)}".rstrip()


def _interval(ratio: "Ratio") -> str:
    if ratio.ci95 is None:
        return ""
    low, high = ratio.ci95
    return f"[{low:.3f}, {high:.3f}]"
