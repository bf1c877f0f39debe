"""The one place that prints: data on stdout, progress and warnings on stderr."""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import rich.table
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from mlx_fusekit.progress import StepProgress
from mlx_fusekit.tables import Table


def print_json(value: Any) -> None:
    """Exactly one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(table: Table) -> None:
    """A table without a frame, on stdout."""
    drawn = rich.table.Table(
        title=table.title,
        title_justify="left",
        box=None,
        show_header=bool(table.header),
        padding=(0, 2, 0, 0),
    )
    if table.header:
        for place, name in enumerate(table.header):
            text = place < table.text_columns
            drawn.add_column(name, justify="left" if text else "right", overflow="fold")
    else:
        drawn.add_column(style="bold", no_wrap=True)
        drawn.add_column(overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    _stdout().print(drawn)


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """A title, and a table of names and values."""
    print_table(Table.of_facts(title, facts))


def print_blocks(blocks: Iterable[Table | str]) -> None:
    """Tables, and lines between them."""
    for block in blocks:
        if isinstance(block, Table):
            print_table(block)
        else:
            sys.stdout.write(block + "\n")


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
