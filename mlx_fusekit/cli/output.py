"""The one place that prints: data on stdout, progress and warnings on stderr."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mlx_fusekit.progress import StepProgress


def print_json(value: Any) -> None:
    """Exactly one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """A title, and a table of names and values without a frame."""
    table = Table(
        title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0)
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    _stdout().print(table)


def print_rows(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1
) -> None:
    """A table whose first columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < text_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _stdout().print(table)


def warn(message: str) -> None:
    """A warning on stderr."""
    Console(stderr=True, highlight=False).print(
        f"[yellow]warning:[/] {_plain(message)}", soft_wrap=True
    )


@contextlib.contextmanager
def steps_bar(*, animated: bool = True) -> Iterator[StepProgress | None]:
    """A bar a step on stderr with the time left; None where stderr is no terminal.

    What is yielded takes the step's name, how much of it is done, and how much there is in all.

    Args:
        animated: draw the bars all the time, from a thread; else only when something is reported.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, auto_refresh=animated) as bar:
        tasks: dict[str, TaskID] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
            bar.update(tasks[step], completed=done, total=total, refresh=not animated)

        yield report


def _stdout() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=False)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
