"""Pictures of a benchmark: every trial's time a token by arm, and the gaps along a generation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

from mlx_fusekit import figures
from mlx_fusekit.bench.report import BenchReport, Run
from mlx_fusekit.pictures import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#7f7f7f", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_ROW_INCHES = 3.4
_WIDTH_INCHES = 10.0


def picture(reports: Sequence[BenchReport], suffix: str) -> bytes:
    """The bytes of a picture with two panels for each shape of each report.

    Left: one dot a trial, a bar at each arm's median, and its speed-up. Right: the median gap at
    each place of the generation, over trials, with the span of the middle 80 %.

    Args:
        reports: one or several, one below the other.
        suffix: ".png", ".svg" or ".pdf", which tells the format.
    """
    # A figure without pyplot has no window, and leaves no state behind.
    from matplotlib.figure import Figure

    rows = [(report, run) for report in reports for run in report.runs]
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "mlx-fusekit",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH_INCHES, _ROW_INCHES * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(2, 3))
        for (report, run), (left, right) in zip(rows, axes, strict=True):
            _distributions(left, report, run)
            _along(right, report, run)
        return drawn(figure, suffix)


def _colour(report: BenchReport, arm: str) -> str:
    return _COLOURS[list(report.arms).index(arm) % len(_COLOURS)]


def _distributions(axes: "Axes", report: BenchReport, run: Run) -> None:
    metric = "tpot_seconds" if run.shape.generation_tokens > 1 else "ttft_seconds"
    speedups = run.speedups(metric, report.seed)
    for place, arm in enumerate(run.arms):
        times = 1000 * np.asarray(run.samples(arm, metric))
        colour = _colour(report, arm)
        # Side by side where many are alike; in the order of time, so that drift shows as a slope.
        spread = np.linspace(-0.28, 0.28, len(times)) if len(times) > 1 else np.zeros(1)
        axes.plot(place + spread, times, "o", color=colour, alpha=0.6, markersize=4)
        axes.hlines(np.median(times), place - 0.36, place + 0.36, color=colour, linewidth=2.5)
    labels = [
        f"{arm}\n{figures.ratio(speedups[arm].ratio, 2)} times as fast" if arm in speedups else arm
        for arm in run.arms
    ]
    axes.set_xticks(range(len(run.arms)), labels)
    axes.set_xlim(-0.6, len(run.arms) - 0.4)
    axes.margins(y=0.15)
    what = "time per token" if metric == "tpot_seconds" else "time to first token"
    axes.set_ylabel(f"{what} (ms)")
    incomplete = ", incomplete" if not report.complete else ""
    axes.set_title(f"{run.shape}, one dot a trial{incomplete}", loc="left")


def _along(axes: "Axes", report: BenchReport, run: Run) -> None:
    for arm in run.arms:
        gaps = 1000 * np.asarray([trial.itl_seconds for trial in run.of(arm)])
        if gaps.size == 0:
            continue
        low, middle, high = np.quantile(gaps, [0.1, 0.5, 0.9], axis=0)
        tokens, colour = np.arange(2, gaps.shape[1] + 2), _colour(report, arm)
        axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(tokens, middle, color=colour, linewidth=1.4, label=arm)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("token of the generation")
    axes.set_ylabel("gap before it (ms)")
    where = report.environment
    axes.set_title(f"{where.chip}, MLX on the {where.device}", loc="left")
    if run.shape.generation_tokens > 1:
        axes.legend(frameon=False, loc="best")
