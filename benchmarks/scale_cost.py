"""A model of what calibrating costs: fitted to some rows, held against others, and used on a Mac.

Work by a machine's rates (:mod:`mlx_fusekit.requantize.effort`) gives ideal seconds, and

    seconds = a * running + b * solving + c * elementwise + d * reading + e * layers

where a to d tell how many times the ideal each takes, and e is in seconds. The rates of this
machine are measured: float32 products in MLX and in NumPy, copies in memory (an element is 8 bytes,
read and written), and SHA-256. Those of another are stated by the user.

As many constants are fitted as the rows carry: one fewer than there are different rows, and at
least one. With fewer than five, kinds share a constant (``GROUPINGS``), and with fewer than four
there is none for layers. All are non-negative, and the squares of relative errors are least.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scale_models import OURS
from scale_rows import Facts

from mlx_fusekit import figures
from mlx_fusekit.requantize.effort import Effort, Rates, work_of
from mlx_fusekit.requantize.options import CALIBRATION_TOKENS
from mlx_fusekit.tables import Table
from mlx_fusekit.texts.calibration import PACKAGED

KINDS = ("running", "solving", "elementwise", "reading", "layers")
#: Which kinds share a constant, by how many constants there are.
GROUPINGS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((0, 1, 2, 3),),
    ((0, 3), (1, 2)),
    ((0, 3), (1,), (2,)),
    ((0, 3), (1,), (2,), (4,)),
    ((0,), (1,), (2,), (3,), (4,)),
)
#: Rows whose ideal seconds differ by less than this share count as one.
_ALIKE = 0.01
#: Layers of the models that single layers are of.
_WHOLE = {"8b": 32, "70b": 80, "30b-a3b": 48}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A fuse that was measured.

    Attributes:
        name: of its row.
        work: it had to do.
        seconds: it took.
        fitted: whether the constants are fitted to it.
    """

    name: str
    work: Effort
    seconds: float
    fitted: bool


@dataclass(frozen=True)
class Fit:
    """Constants, and how well they are known.

    Attributes:
        constants: of each of the five kinds; 0 for layers where there is no constant for them.
        grouping: which kinds share one.
        rows: that were fitted to.
        different: of these, as far as their work differs.
    """

    constants: Floats
    grouping: tuple[tuple[int, ...], ...]
    rows: int
    different: int

    @property
    def freedom(self) -> int:
        """Degrees of freedom left: different rows that no constant is spent on."""
        return self.different - len(self.grouping)

    def seconds(self, ideal: Floats) -> float:
        """What a fuse takes."""
        return float(ideal @ self.constants)


def repeated(shapes: dict[str, Any], layers: int) -> dict[str, Any]:
    """Shapes of a model of so many layers like the last of this one, all of them solved."""
    last = len(shapes["layers"]) - 1
    one: Sequence[Any] = [group for group in shapes["solved"] if group[0] == last]
    share = shapes["layers"][last] / (sum(shapes["layers"]) + shapes["trunk"])
    count = len({layer for layer, *_ in shapes["solved"]})
    return {
        "solved": [[layer, *group[1:]] for layer in range(layers) for group in one],
        "used": shapes["used"],
        "layers": [shapes["layers"][last]] * layers,
        "trunk": shapes["trunk"],
        "bytes": round(shapes["bytes"] * (1 + share * (layers - last - 1))),
        "merged_bytes": shapes["merged_bytes"] // count * layers,
    }


def points(rows: Iterable[Facts], fitted: Sequence[str]) -> list[Point]:
    """The calibrated fuses among rows; to be fitted to where their base's size is named."""
    found = []
    for row in rows:
        calibrated = row.get("contender", OURS) == OURS and (row.get("cost") or {}).get("report")
        if calibrated:
            size = row["subject"]["size"] if "subject" in row else f"{row['shape']} layers"
            work = _work(row)
            found.append(Point(row["name"], work, row["cost"]["wall_seconds"], size in fitted))
    return found


def _work(row: Facts) -> Effort:
    text = row["cost"]["report"]["calibration"]
    written = 0 if text["general_source"] == PACKAGED else text["general_tokens"]
    return work_of(row["shapes"], text["tokens"], written=written)


def fit(found: Sequence[Point], rates: Rates, constants: int | None = None) -> Fit:
    """Fit as many constants as the rows carry.

    Args:
        found: measured fuses.
        rates: of the machine that they were measured on.
        constants: how many, where the user says so.

    Raises:
        SystemExit: when there is nothing to fit to.
    """
    chosen = [point for point in found if point.fitted]
    if not chosen:
        raise SystemExit("no calibrated fuse of the sizes that are to be fitted (--fit)")
    ideal = np.array([rates.ideal(point.work) for point in chosen])
    different = _different(ideal)
    count = constants or max(1, min(different - 1, len(GROUPINGS)))
    grouping = GROUPINGS[count - 1]
    relative = ideal / np.array([point.seconds for point in chosen])[:, None]
    columns = np.stack([relative[:, list(group)].sum(axis=1) for group in grouping], axis=1)
    every = np.zeros(len(KINDS))
    for group, constant in zip(grouping, _non_negative(columns), strict=True):
        every[list(group)] = constant
    return Fit(every, grouping, len(chosen), different)


def _different(ideal: Floats) -> int:
    kept: list[Floats] = []
    for row in ideal:
        if not any(np.allclose(row, other, rtol=_ALIKE) for other in kept):
            kept.append(row)
    return len(kept)


def _non_negative(columns: Floats) -> Floats:
    """Constants of which ``columns @ constants`` is nearest to 1; none is below 0.

    Every subset of the constants is tried, which at most five allow.
    """
    count = columns.shape[1]
    best, least = np.zeros(count), np.inf
    for size in range(1, count + 1):
        for subset in itertools.combinations(range(count), size):
            some = columns[:, list(subset)]
            solved = np.linalg.lstsq(some, np.ones(len(some)), rcond=None)[0]
            error = float(np.square(some @ solved - 1).sum())
            if (solved >= 0).all() and error < least:
                best, least = np.zeros(count), error
                best[list(subset)] = solved
    return best


def fit_tables(found: Sequence[Point], fitted: Fit, rates: Rates) -> Iterable[Table | str]:
    """The constants, and measured against modelled seconds, fitted rows first."""
    yield (
        f"Fitted: {len(fitted.grouping)} constants to {fitted.rows} rows, {fitted.different} of "
        f"them different: {fitted.freedom} degrees of freedom left."
    )
    if fitted.freedom < 1:
        yield "The fitted rows' errors say nothing: only those of predicted rows do."
    stated = (rates.running / 1e9, rates.solving / 1e9, rates.memory / 1e9, rates.reading / 1e9)
    units = ("GFLOPS", "GFLOPS", "GB/s", "GB/s")
    rows = [
        (kind, f"{figures.number(rate)} {unit}", f"{figures.number(constant)} times the ideal")
        for kind, rate, unit, constant in zip(KINDS, stated, units, fitted.constants, strict=False)
    ]
    yield Table("", ("", f"rate of {rates.name}", "fitted"), rows, text_columns=3)
    if fitted.constants[-1]:
        yield f"{figures.number(float(fitted.constants[-1]))} seconds a layer besides."
    cells = []
    for point in sorted(found, key=lambda point: not point.fitted):
        modelled = fitted.seconds(rates.ideal(point.work))
        error = figures.growth(modelled / point.seconds - 1)
        how = "fitted" if point.fitted else "predicted"
        cells.append((point.name, how, f"{point.seconds:.1f}", f"{modelled:.1f}", error))
    yield Table("", ("", "", "measured, s", "modelled, s", "error"), cells, text_columns=2)


def prediction_tables(
    rows: Sequence[Facts], fitted: Fit, machines: Sequence[Rates]
) -> Iterable[Table | str]:
    """What other machines would take, if they kept the constants found on this one."""
    works = {}
    for row in rows:
        if row.get("contender") == OURS:
            works[row["name"]] = _work(row)
        elif "shape" in row and (layers := _WHOLE.get(row["shape"])):
            whole = repeated(row["shapes"], layers)
            name = f"{row['shape']}, all {layers} layers"
            works[name] = work_of(whole, CALIBRATION_TOKENS)
    cells = [
        (name, *(f"{fitted.seconds(machine.ideal(work)):,.0f}" for machine in machines))
        for name, work in works.items()
    ]
    yield (
        "Predictions, measured nowhere: seconds from stated rates, with the constants of this "
        "machine."
    )
    for machine in machines:
        yield (
            f"{machine.name}: {machine.running / 1e12:g} TFLOPS running, "
            f"{machine.solving / 1e12:g} TFLOPS solving, {machine.memory / 1e9:g} GB/s of memory, "
            f"{machine.reading / 1e9:g} GB/s of files."
        )
    yield Table("", ("prediction", *(machine.name for machine in machines)), cells)
