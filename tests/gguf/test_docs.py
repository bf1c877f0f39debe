"""docs/gguf.md lists what can be exported."""

from pathlib import Path

from mlx_fusekit.gguf.models.architectures import supported

DOCUMENT = Path(__file__).parents[2] / "docs" / "gguf.md"


def test_the_table_is_the_codes() -> None:
    """After a change: python scripts/gguf_support.py."""
    rows = [line.split(" | ") for line in DOCUMENT.read_text("utf-8").splitlines()]
    listed = [
        (row[0].strip("|` "), row[1].strip("`"), row[4].strip("| "))
        for row in rows
        if len(row) == 5 and row[0].startswith("| `")
    ]
    assert listed == [(s.model_type, s.architecture, s.notes) for s in supported()]


def test_every_row_was_measured() -> None:
    lines = [line for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith("| `")]
    for line in lines:
        exact, repacked = (float(cell) for cell in line.split(" | ")[2:4])
        assert exact >= 0.999999, line
        assert 0.995 <= repacked < 1, line
