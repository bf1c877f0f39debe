"""Write the commands' help into docs/cli.md.

python scripts/cli_docs.py
"""

from collections.abc import Iterator
from pathlib import Path

import click

from mlx_fusekit.cli import group

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
START, END = "<!-- help: scripts/cli_docs.py -->\n", "<!-- end of help -->\n"
PROGRAM = "mlx-fusekit"
#: As wide as click writes on a terminal of 80 columns: it leaves two free.
WIDTH = 78


def main() -> None:
    """Replace the help in the document."""
    DOCUMENT.write_text(updated(DOCUMENT.read_text("utf-8")), "utf-8")


def updated(document: str) -> str:
    """The document with the commands' help as it is now."""
    before, start, rest = document.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{DOCUMENT}: the lines {START!r} and {END!r} are missing")
    sections = [f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in helps()]
    return before + START + "".join(sections) + "\n" + END + after


def helps() -> Iterator[tuple[str, str]]:
    """Each command's full name and help: the program, its commands, and theirs."""
    yield from _helps(group, PROGRAM, None)


def _helps(
    command: click.Command, name: str, parent: click.Context | None
) -> Iterator[tuple[str, str]]:
    # What the group sets for all commands, such as -h, is inherited from the parent.
    context = click.Context(
        command,
        parent=parent,
        info_name=name,
        terminal_width=WIDTH,
        **({} if parent else command.context_settings),
    )
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                yield from _helps(found, child, context)


if __name__ == "__main__":
    main()
