"""Write the table of model classes in docs/models.md, from fusing an adapter into each.

    python scripts/models_table.py

Takes two minutes. Ends with an error where a class fails.
"""

import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from mlx_lm.utils import MODEL_REMAPPING  # noqa: E402
from support.every_class import NOT_RUN, names  # noqa: E402
from support.raw_forms import UNDONE  # noqa: E402
from support.sweep import ADAPTERS, BASES, EXACT, FAILING, ModelClass, Outcome  # noqa: E402

DOCUMENT = ROOT / "docs" / "models.md"
START, END = "<!-- table: scripts/models_table.py -->\n", "<!-- end of table -->\n"


def main() -> None:
    """Run every class, and replace the table."""
    found: dict[str, list[list[Outcome]]] = {}
    for name in names():
        if name not in NOT_RUN:
            with tempfile.TemporaryDirectory() as folder:
                model = ModelClass(Path(folder), name)
                found[name] = [[model.outcome(b, a) for a in ADAPTERS] for b in BASES]
            sys.stderr.write(f"{name}\n")
    before, _, rest = DOCUMENT.read_text("utf-8").partition(START)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(before + START + "\n".join(table(found)) + "\n" + END + after, "utf-8")
    failing = [n for n, rows in found.items() for row in rows for o in row if o.kind == FAILING]
    if failing:
        sys.exit(f"failing: {', '.join(dict.fromkeys(failing))}")


def table(found: dict[str, list[list[Outcome]]]) -> list[str]:
    """The lines of the table, and of what is said below it."""
    every = [outcome for rows in found.values() for row in rows for outcome in row]
    kinds = Counter(outcome.kind for outcome in every)
    classes = sum(all(o.kind == EXACT for row in rows for o in row) for rows in found.values())
    largest = max(outcome.difference for outcome in every if outcome.kind == EXACT)
    notes = list(dict.fromkeys((o.kind, o.why) for o in every if o.kind != EXACT))
    lines = [
        f"mlx-lm {version('mlx-lm')} (mlx {version('mlx')}) has {len(found) + len(NOT_RUN)} "
        f"classes. {len(found)} were run, {classes} are exact throughout. Of {len(every)} fuses, "
        + ", ".join(f"{count} are {kind}" for kind, count in kinds.most_common())
        + f". The largest difference of an exact one is {largest:.0e}.",
        "",
        "| model type | converted | quantized | raw | raw form |",
        "|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        cells = [" ".join(mark(outcome, notes) for outcome in row) for row in rows]
        form = "; ".join(UNDONE.get(name, ("names as converted",)))
        lines.append(f"| {title(name)} | {' | '.join(cells)} | {form} |")
    lines += ["", *(f"{n}. {kind}: {why}" for n, (kind, why) in enumerate(notes, start=1)), ""]
    return [*lines, "Not run:", "", *(f"- `{name}`: {why}" for name, why in NOT_RUN.items())]


def mark(outcome: Outcome, notes: list[tuple[str, str]]) -> str:
    """Of one fuse: a check, or the number of a note."""
    if outcome.kind == EXACT:
        return "✓"
    return str(notes.index((outcome.kind, outcome.why)) + 1)


def title(name: str) -> str:
    """A class's name, and the model types that mlx-lm runs with it."""
    others = sorted(f"`{alias}`" for alias, of in MODEL_REMAPPING.items() if of == name)
    return f"`{name}`" + (f" (also {', '.join(others)})" if others else "")


if __name__ == "__main__":
    main()
