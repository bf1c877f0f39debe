"""Draw the README's picture from the table of measurements in docs/benchmarks.md.

    python scripts/plot_preservation.py [--out docs/images/preservation.svg]

KL from base+adapter, and exact answers, of SmolLM2 at 4 bits with the text-to-SQL adapter.
"""

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs" / "benchmarks.md"
#: The words before the table that is drawn.
ABOVE = "text-to-SQL adapter of rank 8"
#: Its rows, and what the picture calls them.
ROWS = {
    "base, no adapter": "base, without the adapter",
    "mlx_lm.fuse": "mlx_lm.fuse",
    "calibrated, no data": "mlx-fusekit fuse, no data",
    "calibrated": "mlx-fusekit fuse, training data",
}
COLOURS = {"base, no adapter": "#7f7f7f", "mlx_lm.fuse": "#d55e00"}
OURS = "#0072b2"


def main() -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(description="Draw the README's picture.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "preservation.svg")
    out = parser.parse_args().out
    cells = table()
    with mpl.rc_context({"font.size": 10, "svg.hashsalt": "mlx-fusekit"}):
        figure = Figure(figsize=(8, 2.5), layout="constrained")
        axes = figure.subplots()
        for place, (row, label) in enumerate(reversed(ROWS.items())):
            divergence, exact = float(cells[row]["KL mean"]), cells[row]["exact"]
            axes.barh(place, divergence, color=COLOURS.get(row, OURS), height=0.62)
            text = f" {divergence:#.2g} nats, {float(exact.rstrip('%')):.0f} % exact answers"
            axes.text(divergence, place, text, va="center")
            axes.text(1e-4, place, f"{label}  ", va="center", ha="right")
        axes.set_xscale("log")
        axes.set_xlim(1e-4, 3e3)
        axes.set_xticks([1e-4, 1e-3, 1e-2, 1e-1, 1])
        axes.minorticks_off()
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel("distance from base + adapter (KL, nats a token, logarithmic)", loc="left")
        axes.set_title("The same adapter, the same 4-bit size", loc="left")
        figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)


def table() -> dict[str, dict[str, str]]:
    """The cells of the table, by row and column."""
    text = SOURCE.read_text("utf-8")
    lines = text[text.index(ABOVE) :].partition("\n|")[2].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header = rows[0]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows[2:]}


if __name__ == "__main__":
    main()
