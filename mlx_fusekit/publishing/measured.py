"""What was measured of a model, as its card says it: parity and times."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mlx_fusekit.bench.tables import PAIRED, machine, medians, what_is_timed
from mlx_fusekit.figures import count, ratio, share, size
from mlx_fusekit.publishing.foreign_text import plain, public_source
from mlx_fusekit.tables import Table
from mlx_fusekit.verifying.parity_table import parity_table, reference_name

if TYPE_CHECKING:
    from mlx_fusekit.bench.report import BenchReport, Run
    from mlx_fusekit.bench.statistics import Ratio


def parity_section(report: Mapping[str, Any], model: str) -> str:
    """The table of a report of ``verify --json``, and what its numbers are.

    Args:
        report: as :meth:`mlx_fusekit.ParityReport.as_json` made it.
        model: what was verified, as the table calls it.
    """
    table = parity_table(report, base="base without the adapter", fused=model)
    return f"{table.markdown()}\n\n{' '.join(_parity_notes(report))}"


def _parity_notes(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"KL is the divergence of each from {reference_name(report)}, in nats a token."
    if (recovered := report.get("recovered")) is not None:
        yield f"{share(recovered, 2)} of the way from the base to base+adapter is kept."
    yield (
        f"Measured by `mlx-fusekit verify` on {count(report['tokens'])} tokens "
        f"({public_source(str(report.get('data')))})."
    )
    yield _verdict(report)


def _verdict(report: Mapping[str, Any]) -> str:
    said = {"kept": "The fine-tune was kept", "lost": "**The fine-tune was lost**"}
    verdict = said.get(report["verdict"], "Whether the fine-tune was kept was not judged")
    return f"{verdict}: {plain(report['verdict_reason'])}."


def latency_section(report: "BenchReport", arm: str) -> str:
    """A table and the speed-up for each shape of a benchmark, and the machine.

    Args:
        report: of ``bench``.
        arm: the published model's name in it.
    """
    blocks = [block for run in report.runs for block in _times(report, run, arm)]
    found = report.environment
    where = f"{machine(found)}, MLX on the {found.device}"
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    incomplete = "" if report.complete else " The run was interrupted before its end."
    measured = plain(f"Measured by `mlx-fusekit bench` on {where}")
    return "\n\n".join([*blocks, f"{measured} ({plain(versions)}).{incomplete}"])


def _times(report: "BenchReport", run: "Run", arm: str) -> Iterator[str]:
    # Other fused models that were timed along are not what the card is about.
    shown = [name for name in run.arms if name in ("base", report.reference, arm)]
    rows = [
        (
            "this model" if name == arm else plain(name),
            *medians(run, name),
            size(report.arms[name].disk_bytes),
            size(report.arms[name].peak_memory_bytes),
        )
        for name in shown
    ]
    yield f"{what_is_timed(run)}:"
    header = ("", "first token", "per token", "tokens/s", "disk", "memory")
    yield Table("", header, rows).markdown()
    speed = run.speedups(report.speedup_metric, report.seed).get(arm)
    if speed is not None:
        yield _speed(report, run, speed)


def _speed(report: "BenchReport", run: "Run", speed: "Ratio") -> str:
    per = "a token" if report.speedup_metric == "tpot_seconds" else "to the first token"
    measured = f"{ratio(speed.ratio)} times as fast {per} as {plain(run.reference)}"
    if speed.ci95 is not None:
        low, high = map(ratio, speed.ci95)
        measured += f", 95 % interval {low} to {high}"
    said = {
        "no difference": "No difference that can be told",
        "too few trials": "Too few trials to be sure",
    }.get(speed.verdict)
    sentence = f"{measured}." if said is None else f"{said} ({measured})."
    return f"{sentence} ({PAIRED[0].upper()}{PAIRED[1:]}.)"
