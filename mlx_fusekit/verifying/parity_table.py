"""The table of a verification: base, fused model and base+adapter, a line each."""

from collections.abc import Mapping
from typing import Any

from mlx_fusekit.figures import UNKNOWN, nats, perplexity, share
from mlx_fusekit.tables import Table

_HEADER = ("", "KL mean", "KL median", "KL p99", "top-1", "perplexity", "exact match")


def reference_name(report: Mapping[str, Any]) -> str:
    """What KL is measured from, in a word."""
    return "base+adapter" if report["adapters"] else "reference"


def parity_table(
    report: Mapping[str, Any], title: str = "", *, base: str = "base", fused: str = "fused"
) -> Table:
    """How close a model is to its reference.

    Args:
        report: as :meth:`mlx_fusekit.ParityReport.as_json` made it; all but the adapters may miss.
        title: of the table.
        base: what the base without its adapter is called.
        fused: what the model is called that was judged.
    """
    rows = [(fused, *_distances(report, "", ""), *_own(report, "fused"))]
    if report["adapters"]:
        rows.insert(0, (base, *_distances(report, "base_", "_base"), *_own(report, "base")))
    nothing = (UNKNOWN,) * 4
    rows.append((reference_name(report), *nothing, *_own(report, "reference")))
    return Table(title, _HEADER, rows)


def _distances(report: Mapping[str, Any], before: str, after: str) -> tuple[str, ...]:
    """How far a model is from the reference."""
    kl = (nats(report.get(f"kl_{before}{name}")) for name in ("mean", "median", "p99"))
    return (*kl, share(report.get(f"top1_agreement{after}")))


def _own(report: Mapping[str, Any], model: str) -> tuple[str, ...]:
    """What a model is worth by itself."""
    return (
        perplexity(report.get(f"perplexity_{model}")),
        share(report.get(f"exact_match_{model}")),
    )
