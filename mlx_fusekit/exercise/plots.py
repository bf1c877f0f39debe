"""The pictures of the exercise."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_fusekit.bench.report import BenchReport
from mlx_fusekit.exercise.findings import ADAPTED, BASE, CALIBRATED, ROUNDED, Closeness
from mlx_fusekit.figures import nats, share
from mlx_fusekit.pictures import drawn
from mlx_fusekit.writing.files import write_new

PARITY, TIMING = "parity.png", "timing.png"
#: Okabe and Ito's grey, vermilion and blue; the fused model is blue in the other picture too.
_COLOURS = {BASE: "#7f7f7f", ROUNDED: "#d55e00", CALIBRATED: "#0072b2"}
#: Of the axis's length in decades, how much is added on the right.
_ROOM_FOR_LABELS = 0.5
_STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def available() -> bool:
    """Whether matplotlib, the ``plot`` extra, is installed."""
    return find_spec("matplotlib") is not None


def draw(folder: Path, parity: Mapping[str, Closeness], bench: BenchReport) -> tuple[str, ...]:
    """Draw both into a folder.

    Args:
        folder: to write to.
        parity: as :class:`Findings` has it.
        bench: the benchmark's report.

    Returns:
        Their names, none without matplotlib.
    """
    if not available():
        return ()
    from mlx_fusekit.bench import plots

    write_new(folder / PARITY, _parity_picture(parity))
    write_new(folder / TIMING, plots.picture([bench], ".png"))
    return (PARITY, TIMING)


def _parity_picture(parity: Mapping[str, Closeness]) -> bytes:
    """How far each model is from base+adapter: one dot each, on a logarithmic axis."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    models = [name for name in (BASE, ROUNDED, CALIBRATED) if name in parity]
    distances = {name: parity[name].kl_mean or 0.0 for name in models}
    positive = [value for value in distances.values() if value > 0]
    # What does not differ at all has no place on the axis, and gets none but its label.
    low, most = (min(positive) / 3, max(positive)) if positive else (1e-6, 1e-6)
    high = most * max(most / low, 10) ** _ROOM_FOR_LABELS
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.0, 0.9 + 0.5 * len(models)), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(models):
            value = distances[name]
            axes.hlines(place, low, max(value, low), color=_COLOURS[name], linewidth=1.5)
            if value > 0:
                axes.plot(value, place, "o", color=_COLOURS[name], markersize=8)
            axes.annotate(
                _label(parity[name]),
                (max(value, low), place),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.set_yticks(range(len(models)), [_name(name) for name in models])
        axes.set_xlabel(f"KL divergence from {ADAPTED}, nats a token (left is better)")
        return drawn(figure, ".png")


def _name(model: str) -> str:
    return "base, adapter dropped" if model == BASE else model


def _label(found: Closeness) -> str:
    kl = "not finite" if found.kl_mean is None else nats(found.kl_mean)
    if found.exact_match is None:
        return kl
    return f"{kl}, {share(found.exact_match, 0)} exact answers"
