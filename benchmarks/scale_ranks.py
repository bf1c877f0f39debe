"""One fuse shared by several processes under ``mlx.launch``, each with one thread."""

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from contenders import Contender, fuse_apart, progress, remove
from processes import program
from scale_cases import Subject
from scale_kills import digest
from scale_rows import Facts, Rows
from yardsticks import measured, texts_of

from mlx_fusekit import figures
from mlx_fusekit.tables import Table

PART = "ranks"
#: One thread for OpenBLAS, and for the Accelerate framework of macOS.
_ONE_THREAD = (("OPENBLAS_NUM_THREADS", "1"), ("VECLIB_MAXIMUM_THREADS", "1"))


def measure(rows: Rows, subject: Subject, ranks: int, options: argparse.Namespace) -> None:
    """Fuse with so many ranks, and measure; nothing where there is a row."""
    name = f"{subject.name}-{ranks}"
    if rows.has(PART, name):
        return
    case = subject.case()
    rows.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=rows.folder) as scratch:
        work = Path(scratch).resolve()
        target, way = work / "fused", contender(ranks, case.train, options.calibration_tokens)
        cost = fuse_apart(way, case.base, case.adapter, target)
        found = measured(target, texts_of(case, options.items, work / "texts"))["task"]
        facts = {
            "cost": asdict(cost),
            "measures": asdict(found),
            "digest": digest(target, "*.safetensors"),
        }
        remove(target)
    progress(f"{name}: {cost.wall_seconds:.1f} s, KL {found.kl_mean:.3g}")
    rows.keep(PART, name, {"subject": subject.name, "ranks": ranks, **facts})


def contender(ranks: int, train: Path, tokens: int | None) -> Contender:
    """A calibrated fuse on so many ranks; one is a plain process."""
    ours = (program("mlx-fusekit"), "fuse", "--requantize", "calibrated")
    given = ("--calibration-tokens", str(tokens)) if tokens else ()
    command = (*ours, *given, "--calibration", str(train))
    if ranks > 1:
        variables = [part for name, value in _ONE_THREAD for part in ("--env", f"{name}={value}")]
        launch = (program("mlx.launch"), "-n", str(ranks), "--backend", "ring", *variables)
        command = (*launch, "--", *command)
    return Contender(f"{ranks} ranks", command, data=True, variables=_ONE_THREAD)


def table(rows: Iterable[Facts]) -> Table:
    """By subject, from one rank on."""
    found = sorted(rows, key=lambda row: (row["subject"], row["ranks"]))
    alone = {row["subject"]: row for row in found if row["ranks"] == 1}
    cells = []
    for row in found:
        cost, one = row["cost"], alone.get(row["subject"])
        seconds = cost["wall_seconds"]
        cells.append(
            (
                row["subject"],
                str(row["ranks"]),
                f"{seconds:.1f}",
                f"{one['cost']['wall_seconds'] / seconds:.2f}x" if one else "",
                f"{cost['cpu_seconds']:.1f}",
                f"{cost['peak_bytes'] / 1e6:.0f}",
                figures.nats(row["measures"]["kl_mean"]),
                ("yes" if row["digest"] == one["digest"] else "no") if one else "",
            )
        )
    header = ("", "ranks", "seconds", "times as fast", "CPU seconds", "peak MB of one process")
    return Table("", (*header, "KL mean", "weights as one rank's"), cells)
