"""What ``preserve.py`` measured, and its tables."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit.tables import Table

TEACHER, BASE, PEER = "base + adapter", "base, no adapter", "mlx_lm.fuse"
_ON_TASK = ("KL mean", "median", "p99", "closer", "top-1", "exact", "kept", "ppl")
_COSTS = ("size", "seconds", "peak MB")


@dataclass(frozen=True)
class Case:
    """A base, an adapter, and the text to measure on.

    Attributes:
        train: what the adapter was trained on.
        test: unseen items of its task.
        off_task: text that has nothing to do with the adapter, by name.
        converted: the adapter in mlx-lm's form, where it has another.
    """

    name: str
    base: Path
    adapter: Path
    train: Path
    test: Path
    off_task: dict[str, Path]
    converted: Path | None = None


@dataclass(frozen=True)
class Cost:
    """What a fuse took.

    Attributes:
        reached: whether ``--max-kl``, if given, was reached.
        load_average: of the machine over the minute before.
        report: what the command printed as JSON.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    reached: bool
    load_average: float
    report: dict[str, Any] | None


@dataclass(frozen=True)
class Measures:
    """How far a model is from base and adapter on one text, over its scored tokens.

    Attributes:
        kl_mean: of KL(base+adapter || model) in nats a token.
        top1_agreement: share of the tokens where both have the same arg-max.
        perplexity: of the actual tokens.
        exact_match: share of the answers whose every token is the arg-max; None without answers.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    exact_match: float | None
    tokens: int


@dataclass(frozen=True)
class Row:
    """A contender's result.

    Attributes:
        measures: by name of the text, "task" first.
        size: of its weight files, relative to the base's.
        cost: None for what is not fused.
    """

    name: str
    measures: dict[str, Measures]
    size: float
    cost: Cost | None = None


def report(case: Case, rows: Sequence[Row]) -> Iterator[Table | str]:
    """What was measured, in two tables: on the task, and off it with the costs."""
    by_name = {row.name: row for row in rows}
    teacher, peer = by_name[TEACHER], by_name[PEER]
    on_task, off_task = [], []
    for row in rows:
        name = row.name if row.cost is None or row.cost.reached else f"{row.name} *"
        task = row.measures["task"]
        on_task.append(
            (
                name,
                *(_number(kl) for kl in (task.kl_mean, task.kl_median, task.kl_p99)),
                _ratio(peer, row, "task"),
                _share(task.top1_agreement),
                _share(task.exact_match),
                _share(_quotient(task.exact_match, teacher.measures["task"].exact_match)),
                _number(task.perplexity),
            )
        )
        cells = [name]
        for text in case.off_task:
            cells += [_number(row.measures[text].kl_mean), _ratio(peer, row, text)]
        off_task.append((*cells, f"{row.size:.4f}", *_costs(row.cost)))
    missed = any(row.cost is not None and not row.cost.reached for row in rows)
    tokens = ", ".join(f"{name} {m.tokens}" for name, m in teacher.measures.items())
    yield "\n".join(
        [
            f"{case.name}: {case.adapter.name} on {case.base.name}.",
            f"Scored tokens: {tokens}.",
            "KL(base+adapter || model) in nats a token; closer: KL(mlx_lm.fuse) / KL(this);",
            "kept: exact match relative to base+adapter's; size: weight files, the base's being 1.",
            *(["* did not reach --max-kl"] if missed else []),
        ]
    )
    yield Table("", ("", *_ON_TASK), on_task)
    texts = [column for name in case.off_task for column in (f"{name} KL", "closer")]
    yield Table("", ("", *texts, *_COSTS), off_task)


def _costs(cost: Cost | None) -> tuple[str, str]:
    if cost is None:
        return "", ""
    return f"{cost.wall_seconds:.1f}", f"{cost.peak_bytes / 1e6:.0f}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _quotient(value: float | None, whole: float | None) -> float | None:
    return value / whole if value is not None and whole else None


def _ratio(peer: Row, row: Row, text: str) -> str:
    """How many times closer than ``mlx_lm.fuse`` a model is to base and adapter."""
    ours, theirs = row.measures[text].kl_mean, peer.measures[text].kl_mean
    if row.name in (TEACHER, PEER) or not ours or not math.isfinite(theirs / ours):
        return ""
    ratio = theirs / ours
    if ratio < 0.01:
        return "<0.01x"
    decimals = 2 if ratio < 10 else 1 if ratio < 100 else 0
    return f"{ratio:.{decimals}f}x"
