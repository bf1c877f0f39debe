"""One fuse shared by several processes as under ``mlx.launch``, each with one thread.

``mlx.launch`` itself keeps a core busy (``start_ranks.py`` tells why), so that ranks are started
without it too.
"""

import argparse
import sys
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


#: What starts the ranks; one is a plain process.
STARTERS = BY_HAND, LAUNCHER = "by hand", "mlx.launch"


def measure(
    rows: Rows, subject: Subject, ranks: int, starter: str, options: argparse.Namespace
) -> None:
    """Fuse with so many ranks, and measure; nothing where there is a row."""
    name = f"{subject.name}-{ranks}" + ("-launched" if starter == LAUNCHER else "")
    if rows.has(PART, name):
        return
    case = subject.case()
    rows.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=rows.folder) as scratch:
        work = Path(scratch).resolve()
        target = work / "fused"
        way = contender(ranks, starter, case.train, options.calibration_tokens)
        cost = fuse_apart(way, case.base, case.adapter, target)
        found = measured(target, texts_of(case, options.items, work / "texts"))["task"]
        facts = {
            "cost": asdict(cost),
            "measures": asdict(found),
            "digest": digest(target, "*.safetensors"),
        }
        remove(target)
    progress(f"{name}: {cost.wall_seconds:.1f} s, KL {found.kl_mean:.3g}")
    how = {"subject": subject.name, "ranks": ranks, "starter": starter}
    rows.keep(PART, name, how | facts)


def contender(ranks: int, starter: str, train: Path, tokens: int | None) -> Contender:
    """A calibrated fuse on so many ranks; one is a plain process."""
    ours = (program("mlx-fusekit"), "fuse", "--requantize", "calibrated")
    given = ("--calibration-tokens", str(tokens)) if tokens else ()
    command = (*ours, *given, "--calibration", str(train))
    if ranks > 1:
        start = (sys.executable, str(Path(__file__).with_name("start_ranks.py")), str(ranks))
        if starter == LAUNCHER:
            variables = (("--env", f"{name}={value}") for name, value in _ONE_THREAD)
            options = (part for pair in variables for part in pair)
            launch = (program("mlx.launch"), "-n", str(ranks), "--backend", "ring")
            start = (*launch, *options, "--")
        command = (*start, *command)
    return Contender(f"{ranks} ranks", command, data=True, variables=_ONE_THREAD)


def table(rows: Iterable[Facts]) -> Table:
    """By subject, from one rank on."""
    found = sorted(rows, key=lambda row: (row["subject"], row["ranks"], row["starter"]))
    alone = {row["subject"]: row for row in found if row["ranks"] == 1}
    cells = []
    for row in found:
        cost, one = row["cost"], alone.get(row["subject"])
        seconds = cost["wall_seconds"]
        cells.append(
            (
                row["subject"],
                str(row["ranks"]),
                row["starter"] if row["ranks"] > 1 else "",
                f"{seconds:.1f}",
                f"{one['cost']['wall_seconds'] / seconds:.2f}x" if one else "",
                f"{cost['cpu_seconds']:.1f}",
                f"{cost['peak_bytes'] / 1e6:.0f}",
                figures.nats(row["measures"]["kl_mean"]),
                ("yes" if row["digest"] == one["digest"] else "no") if one else "",
            )
        )
    header = ("", "ranks", "started", "seconds", "times as fast", "CPU seconds")
    rest = ("peak MB of one process", "KL mean", "weights as one rank's")
    return Table("", (*header, *rest), cells)
