"""Real models fused and measured: ``mlx_lm.fuse`` beside ``mlx-fusekit fuse``, by base and adapter.

The rows are those of two parts of ``scale.py``: ``models`` compares sizes, ``steps`` draws the same
distance against the size of the update.
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from contenders import Contender, fuse_apart, progress, remove, without_data
from preserve_results import BASE, PEER, TEACHER, Case
from processes import program
from scale_cases import RANK, Subject, facts_of, planned
from scale_rows import Facts, Rows
from yardsticks import Text, measured, texts_of

from mlx_fusekit import figures
from mlx_fusekit.requantize.needs import memory_needs
from mlx_fusekit.requantize.options import CALIBRATION_TOKENS
from mlx_fusekit.tables import Table

PART = "fuses"
OURS, NO_DATA = "calibrated", "calibrated, no data"
#: ``--memory`` by size, where the whole model takes more.
MEMORY = {"0.5b": 2_000_000_000, "1.5b": 3_000_000_000}
#: Where text is written by the model too.
WITHOUT_DATA = ("sample", "135m", "0.5b")
#: What base and adapter are compared with, and how rows of it are called.
_ROWS = {
    TEACHER: "teacher",
    BASE: "base",
    PEER: "mlx_lm",
    OURS: "calibrated",
    NO_DATA: "no-data",
}


def measure(
    rows: Rows, subject: Subject, names: Sequence[str], options: argparse.Namespace
) -> None:
    """Fuse and measure what of a subject has no row yet.

    Args:
        rows: where they are kept.
        subject: base and adapter.
        names: of the rows that are wanted.
        options: ``items`` to measure on, ``calibration_tokens`` to calibrate on, ``memory`` for it.
    """
    missing = [name for name in names if not rows.has(PART, _row_name(subject, name))]
    if not missing:
        return
    case = subject.case()
    known = {"subject": _told(subject), **facts_of(case, options.calibration_tokens)}
    ways = {way.name: way for way in contenders(case, subject, options)}
    rows.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=rows.folder) as scratch:
        work = Path(scratch).resolve()
        texts = texts_of(case, options.items, work / "texts")
        for name in missing:
            facts = _measured(name, ways.get(name), case, texts, work)
            rows.keep(PART, _row_name(subject, name), {"contender": name, **facts, **known})


def _row_name(subject: Subject, contender: str) -> str:
    return f"{subject.name}-{_ROWS[contender]}"


def _told(subject: Subject) -> Facts:
    rate = None if subject.size == "sample" else subject.recipe.learning_rate
    return {**asdict(subject), "rate": rate, "name": subject.name}


def _measured(
    name: str, way: Contender | None, case: Case, texts: dict[str, Text], work: Path
) -> Facts:
    """Fuse, if there is something to fuse, and measure; the fused model is gone afterwards."""
    if name == TEACHER:
        return {"measures": asdict(texts["task"].teacher), "cost": None}
    folder, cost = case.base, None
    if way is not None:
        data = way.data or way.name == PEER
        adapter = case.adapter if data else without_data(case.adapter, work / "dataless")
        folder = work / "fused"
        cost = fuse_apart(way, case.base, adapter, folder)
        progress(f"{case.name}: {name}: {cost.wall_seconds:.1f} s, {cost.peak_bytes / 1e6:.0f} MB")
    measures = measured(folder, texts)["task"]
    if way is not None:
        remove(folder)
    return {"measures": asdict(measures), "cost": asdict(cost) if cost else None}


def contenders(case: Case, subject: Subject, options: argparse.Namespace) -> Iterator[Contender]:
    """The ways to fuse."""
    yield Contender(PEER, (program("mlx_lm.fuse"),))
    ours = ours_command(options.calibration_tokens)
    memory = options.memory or _memory(case, subject, options.calibration_tokens)
    bound = ("--memory", memory) if memory else ()
    yield Contender(OURS, (*ours, *bound, "--calibration", str(case.train)), data=True)
    # Without --memory: a model that does not fit as a whole writes no text.
    yield Contender(NO_DATA, ours)


def _memory(case: Case, subject: Subject, tokens: int | None) -> str | None:
    """What a size is given, unless the whole model fits in it."""
    allowed = MEMORY.get(subject.size)
    plan = planned(case.base, case.adapter)
    needed = memory_needs(plan, tokens or CALIBRATION_TOKENS).resident
    return str(allowed) if allowed is not None and allowed < needed else None


def ours_command(tokens: int | None) -> tuple[str, ...]:
    """A calibrated fuse, but for the text."""
    command = (program("mlx-fusekit"), "fuse", "--json", "--requantize", "calibrated")
    return (*command, "--calibration-tokens", str(tokens)) if tokens else command


def names_for(subject: Subject) -> tuple[str, ...]:
    """The rows of a subject in the comparison of sizes."""
    data_only = (TEACHER, BASE, PEER, OURS)
    return (*data_only, NO_DATA) if subject.size in WITHOUT_DATA else data_only


def table(rows: Iterable[Facts]) -> Table:
    """Distance, answers and cost, by base and adapter of the size's own recipe."""
    cells = []
    for row in rows:
        subject, task = row["subject"], row["measures"]
        plain = Subject(subject["size"], subject["task"]).name
        if subject["name"] == plain and subject["rank"] == RANK:
            cells.append((*_names(row), *_distance(task), *_costs(row["cost"])))
    order = {name: place for place, name in enumerate(_ROWS)}
    cells.sort(key=lambda row: (row[:2], order[row[2]]))
    header = ("base", "adapter", "", "KL mean", "top-1", "exact", "tokens")
    return Table("", (*header, "seconds", "peak MB", "a layer at a time"), cells, text_columns=3)


def _names(row: Facts) -> tuple[str, str, str]:
    return row["subject"]["size"], row["subject"]["task"], row["contender"]


def _distance(task: Facts) -> tuple[str, ...]:
    exact = figures.share(task["exact_match"])
    top1 = figures.share(task["top1_agreement"])
    return figures.nats(task["kl_mean"]), top1, exact, figures.count(task["tokens"])


def _costs(cost: Facts | None) -> tuple[str, str, str]:
    if cost is None:
        return "", "", ""
    calibration = (cost["report"] or {}).get("calibration") or {}
    streamed = {True: "yes", False: "no"}.get(calibration.get("streamed"), "")
    return f"{cost['wall_seconds']:.1f}", f"{cost['peak_bytes'] / 1e6:.0f}", streamed
