"""The picture of what differs between two models: layers by modules."""

import math
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import numpy as np

from mlx_fusekit.differing.diff import DiffReport, ModuleChange, kind_of, layer_of
from mlx_fusekit.pictures import drawn

_CELL_INCHES = 0.26


def picture(report: DiffReport, suffix: str) -> bytes:
    """The bytes of a heat map of relative change, on a logarithmic scale.

    Args:
        report: of two models that differ.
        suffix: ".png", ".svg" or ".pdf", which tells the format.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    kinds, layers, values = _grid(report.changed)
    style: dict[Any, Any] = {"font.size": 9, "svg.hashsalt": "mlx-fusekit"}
    with mpl.rc_context(style):
        size = 2.6 + 0.6 * len(kinds), 1.9 + _CELL_INCHES * len(layers)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor("#e8e8e8")
        known = values[np.isfinite(values)]
        low, high = (known.min(), known.max()) if known.size else (1e-6, 1e-6)
        norm = LogNorm(low / 1.001, high * 1.001)
        image = axes.imshow(values, aspect="auto", norm=norm, cmap="viridis")
        axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", rotation_mode="anchor")
        step = max(1, math.ceil(len(layers) / 40))
        axes.set_yticks(range(0, len(layers), step), layers[::step])
        axes.set_ylabel("layer")
        bar = figure.colorbar(image, ax=axes, format="%.2g")
        bar.ax.yaxis.set_minor_formatter("{x:.2g}")
        bar.set_label("relative change (Frobenius)")
        axes.set_title(f"{report.first} to {report.second}; grey: unchanged", loc="left")
        return drawn(figure, suffix)


def _grid(changed: Iterable[ModuleChange]) -> tuple[list[str], list[str], Any]:
    """Columns, rows, and the relative change of each cell, NaN where there is none."""
    changes = [c for c in changed if c.relative is not None]
    kinds = list(dict.fromkeys(kind_of(change.module) for change in changes))
    numbers = [layer for c in changes if (layer := layer_of(c.module)) is not None]
    layers: list[int | None] = list(range(max(numbers) + 1)) if numbers else []
    if any(layer_of(change.module) is None for change in changes):
        layers.append(None)
    values = np.full((len(layers), len(kinds)), np.nan)
    for change in changes:
        place = layers.index(layer_of(change.module)), kinds.index(kind_of(change.module))
        values[place] = change.relative
    return kinds, ["none" if layer is None else str(layer) for layer in layers], values
