"""The one place that prints: data on stdout, progress and warnings on stderr.

What others wrote, as names in files, comes out :func:`~mlx_fusekit.cli.streams.visible`.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import rich.table
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from mlx_fusekit.cli import streams
from mlx_fusekit.cli.streams import one_line, visible
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.tables import Table

#: Control characters that text of several lines has.
BREAKS = "\n\t"


def print_json(value: Any) -> None:
    """Exactly one JSON object on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    streams.styled(sys.stdout).write(streams.json_text(text, sys.stdout) + "\n")


def say(text: str = "") -> None:
    """Lines of text on stdout."""
    sys.stdout.write(f"{visible(text, BREAKS)}\n")


def print_table(table: Table) -> None:
    """A table without a frame, on stdout."""
    drawn = rich.table.Table(
        title=visible(table.title),
        title_justify="left",
        box=None,
        show_header=bool(table.header),
        padding=(0, 2, 0, 0),
    )
    if table.header:
        for place, name in enumerate(table.header):
            text = place < table.text_columns
            drawn.add_column(visible(name), justify="left" if text else "right", overflow="fold")
    else:
        drawn.add_column(style="bold", no_wrap=True)
        drawn.add_column(overflow="fold")
    for row in table.rows:
        drawn.add_row(*(visible(cell) for cell in row))
    stdout().print(drawn)


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """A title, and a table of names and values."""
    print_table(Table.of_facts(title, facts))


def print_blocks(blocks: Iterable[Table | str]) -> None:
    """Tables, and lines between them."""
    for block in blocks:
        if isinstance(block, Table):
            print_table(block)
        else:
            say(block)


def warn(message: str) -> None:
    """A warning on stderr."""
    stderr().print(f"[yellow]warning:[/] {escape(one_line(message))}", soft_wrap=True)


@contextlib.contextmanager
def steps_bar(*, animated: bool = True) -> Iterator[StepProgress | None]:
    """A bar a step on stderr with the time left; None where stderr is no terminal.

    What is yielded takes the step's name, how much of it is done, and how much there is in all.

    Args:
        animated: draw the bars all the time, from a thread; else only when something is reported.
    """
    console = stderr()
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    # rich would take what libraries print meanwhile past what makes it visible.
    with Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=animated,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(escape(visible(step)), total=total)
            bar.update(tasks[step], completed=done, total=total, refresh=not animated)

        yield report


def stdout() -> Console:
    """A console for what was made visible."""
    return Console(file=streams.styled(sys.stdout), highlight=False, markup=False, soft_wrap=False)


def stderr(*, markup: bool = True) -> Console:
    """The same of standard error."""
    return Console(file=streams.styled(sys.stderr), highlight=False, markup=markup)
