"""Tables: one description, drawn by rich and written as Markdown."""

import subprocess
import sys

import pytest

from mlx_fusekit.cli import output
from mlx_fusekit.tables import Table

NUMBERS = Table("Title", ("", "time", "faster"), [("base", "per token", "1.06")], text_columns=2)
FACTS = Table.of_facts("Facts", [("size", "1.7 MB"), ("licence", "mit")])


def test_markdown() -> None:
    assert NUMBERS.markdown() == (
        "|  | time | faster |\n| --- | --- | ---: |\n| base | per token | 1.06 |"
    )
    assert FACTS.markdown() == "|  |  |\n| --- | --- |\n| size | 1.7 MB |\n| licence | mit |"


def test_no_cell_ends_before_its_end() -> None:
    table = Table("", ("a|b", "n"), [("one\ntwo | three", "`x`")])
    _, _, row = table.markdown().splitlines()
    assert row == "| one two \\| three | `x` |"
    assert table.markdown().startswith("| a\\|b | n |\n")


def test_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output.print_table(NUMBERS)
    output.print_table(FACTS)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "Title",
        "      time       faster",
        "base  per token    1.06",
        "Facts",
        "size     1.7 MB",
        "licence  mit",
    ]


def test_long_facts_fold_and_markup_is_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    output.print_table(Table.of_facts("", [("[bold]", "word " * 10), ("b", "x" * 40)]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[0].startswith("[bold]  word")
    assert sum(line.count("x") for line in lines) == 40


def test_building_one_imports_no_rich() -> None:
    code = "import sys, mlx_fusekit.tables; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
