"""How far fused models are from base and adapter, by the update's size in steps of the grid."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from preserve_results import PEER
from scale_models import OURS
from scale_rows import Facts

from mlx_fusekit import figures
from mlx_fusekit.pictures import drawn
from mlx_fusekit.tables import Table

#: Whom a point is of, by marker, and of which base, by whether it is filled.
_MARKERS = {PEER: ("o", "#d55e00"), OURS: ("^", "#0072b2")}
_LABELS = {PEER: "mlx_lm.fuse", OURS: "mlx-fusekit fuse"}
_MODELS = {"sample": "sample", "135m": "SmolLM2 135M", "0.5b": "Qwen2.5-Coder 0.5B"}
_MODELS |= {"1.5b": "Qwen2.5-Coder 1.5B"}
_FILLED = ("135m", "sample")


def pairs(rows: Iterable[Facts]) -> Iterator[tuple[Facts, dict[str, Facts]]]:
    """Every subject of which both ways were measured, and its rows by contender."""
    by_name: dict[str, dict[str, Facts]] = {}
    for row in rows:
        if row["contender"] in _MARKERS:
            by_name.setdefault(row["subject"]["name"], {})[row["contender"]] = row
    complete = [found for found in by_name.values() if len(found) == len(_MARKERS)]
    for found in sorted(complete, key=lambda found: found[OURS]["steps"]):
        yield found[OURS]["subject"], found


def table(rows: Iterable[Facts]) -> Table:
    """From the smallest update to the largest."""
    cells = []
    for subject, found in pairs(rows):
        theirs, ours = (found[name]["measures"]["kl_mean"] for name in (PEER, OURS))
        rate = "" if subject["rate"] is None else f"{subject['rate']:g}"
        cells.append(
            (
                subject["size"],
                subject["task"],
                figures.count(subject["rank"]),
                rate,
                figures.number(found[OURS]["steps"]),
                figures.nats(theirs),
                figures.nats(ours),
                f"{figures.number(theirs / ours)}x" if ours > 0 else figures.UNKNOWN,
            )
        )
    header = ("base", "adapter", "rank", "learning rate", "steps", "mlx_lm.fuse", "calibrated")
    return Table("", (*header, "closer"), cells, text_columns=2)


def picture(rows: Iterable[Facts], suffix: str) -> bytes:
    """Update in steps against KL, both logarithmic: a marker's shape tells who fused.

    Args:
        rows: measured.
        suffix: of the picture's name, which tells its format.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"font.size": 10, "svg.hashsalt": "mlx-fusekit"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        told = set()
        for subject, found in pairs(rows):
            for contender, (marker, colour) in _MARKERS.items():
                divergence = found[contender]["measures"]["kl_mean"]
                if divergence <= 0:
                    continue  # has no place on a logarithmic axis
                size = subject["size"]
                label = f"{_LABELS[contender]}: {_MODELS[size]}"
                axes.scatter(
                    found[contender]["steps"],
                    divergence,
                    marker=marker,
                    facecolors=colour if size in _FILLED else "none",
                    edgecolors=colour,
                    s=48,
                    label=None if label in told else label,
                )
                told.add(label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("size of the update, in steps of the base's grid (logarithmic)")
        axes.set_ylabel("distance from base + adapter\n(KL, nats a token, logarithmic)")
        figure.legend(loc="outside lower left", ncols=2, frameon=False)
        axes.set_title("What fusing loses, by how large the update is", loc="left")
        return drawn(figure, suffix)


def draw(rows: Iterable[Facts], out: Path) -> None:
    """Write the picture to a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(picture(rows, out.suffix))
