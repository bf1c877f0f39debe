"""docs/cli.md shows the help that the program prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
if str(SCRIPTS) not in sys.path:
    sys.path.insert(0, str(SCRIPTS))

import cli_docs  # noqa: E402


def test_the_document_is_current() -> None:
    """After a change: python scripts/cli_docs.py."""
    document = cli_docs.DOCUMENT.read_text("utf-8")
    assert document == cli_docs.updated(document)


def test_every_command_has_its_section() -> None:
    sections = [
        line.removeprefix("## ")
        for line in cli_docs.DOCUMENT.read_text("utf-8").splitlines()
        if line.startswith("## mlx-fusekit")
    ]
    overview = next(cli_docs.helps())[1].partition("Commands:")[2]
    # Names stand two columns in, and lines that go on further right.
    names = [line.split()[0] for line in overview.splitlines() if line[:3].strip()]
    assert names
    assert "mlx-fusekit bench report" in sections
    assert {f"mlx-fusekit {name}" for name in names} <= set(sections)


@pytest.mark.parametrize("command", ["", "fuse", "bench report"])
def test_it_is_what_a_terminal_of_80_columns_shows(command: str) -> None:
    arguments = [*command.split(), "--help"]
    program = "from mlx_fusekit.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = 'mlx-fusekit'; {program}", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
        check=True,
    )
    document = cli_docs.DOCUMENT.read_text("utf-8")
    name = f"mlx-fusekit {command}".strip()
    assert f"\n## {name}\n\n```text\n{shown.stdout.rstrip()}\n```\n" in document


def test_only_the_help_is_replaced() -> None:
    document = f"before\n{cli_docs.START}old\n{cli_docs.END}after\n"
    changed = cli_docs.updated(document)
    assert changed.startswith(f"before\n{cli_docs.START}\n## mlx-fusekit\n")
    assert changed.endswith(f"\n{cli_docs.END}after\n")
    assert "old" not in changed.splitlines()
    assert cli_docs.updated(changed) == changed
    with pytest.raises(ValueError, match="are missing"):
        cli_docs.updated("no marks")
