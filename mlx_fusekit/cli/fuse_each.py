"""What ``mlx-fusekit fuse --each`` prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_fusekit import figures
from mlx_fusekit.cli import output
from mlx_fusekit.cli.failures import BELOW_THRESHOLD, FAILED, say
from mlx_fusekit.requantize.strategy import in_words
from mlx_fusekit.tables import Table

if TYPE_CHECKING:
    from mlx_fusekit.fusing.each import EachReport
    from mlx_fusekit.fusing.report import FuseReport


def run(named: Sequence[Any], asked: dict[str, Any], *, dry_run: bool, as_json: bool) -> int:
    """Fuse each adapter by itself, and tell what came of it; the exit code."""
    from mlx_fusekit.fusing.each import prepare_each

    prepared = prepare_each(*named, **asked)
    report = before = prepared.report()
    _warn(before, frozenset())
    if not dry_run:
        with output.steps_bar() as progress:
            report = prepared.run(progress=progress)
        told = {line for one in before.reports.values() for line in one.warnings}
        _warn(report, frozenset(told))
    if as_json:
        output.print_json(report.as_json())
    else:
        output.print_table(_table(report))
    if report.failed:
        count = len(report.failed)
        others = "the others are not concerned" if report.reports else "no model was made"
        say(f"{count} of {count + len(report.reports)} adapters failed; {others}")
        return FAILED
    return 0 if report.passed else BELOW_THRESHOLD


def _warn(report: "EachReport", told: frozenset[str]) -> None:
    """Each warning once, with the names of the models where not all have it."""
    warned: dict[str, list[str]] = {}
    for name, one in report.reports.items():
        for line in one.warnings:
            warned.setdefault(line, []).append(name)
    for line, names in warned.items():
        if line not in told:
            whose = f"{', '.join(names)}: " if len(names) < len(report.reports) else ""
            output.warn(whose + line)


def _table(report: "EachReport") -> Table:
    total = len(report.reports) + len(report.failed)
    title = f"Fused {len(report.reports)} of {total} adapters into {report.save_path}"
    if report.dry_run:
        title = "Plan (nothing was written)"
    elif report.reports:
        title += f", in {figures.in_seconds(report.seconds)}"
    rows = [_row(name, one) for name, one in report.reports.items()]
    rows += [(name, f"failed: {line}", "", "") for name, line in report.failed.items()]
    return Table(title, ("adapter", "result", "size", "KL"), rows, text_columns=2)


def _row(name: str, report: "FuseReport") -> tuple[str, str, str, str]:
    how, _, _ = (in_words(report.requantize) or "not re-quantized").partition(",")
    result = how if report.passed else f"{how}; --max-kl is not shown to hold"
    growth = figures.growth(report.output_bytes / report.base_bytes - 1)
    size = f"{figures.size(report.output_bytes)} ({growth})"
    kl = figures.nats(report.calibration.kl_mean) if report.calibration else ""
    return name, result, size, kl
