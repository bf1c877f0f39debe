"""What a re-quantization strategy is, and the table of them.

It imports nothing heavy: the command line reads the table to say what there is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mlx_fusekit.adapters.sources import Sources
    from mlx_fusekit.formats.floats import Float32
    from mlx_fusekit.formats.quantization import QuantizedRows
    from mlx_fusekit.merging.arithmetic import RowRange
    from mlx_fusekit.merging.plan import FusePlan, WeightStep
    from mlx_fusekit.progress import StepProgress
    from mlx_fusekit.requantize.options import CalibrationOptions, CalibrationReport


class RequantizedWeight(Protocol):
    """One module's merged weight in its target format; read by rows, from several threads."""

    @property
    def global_scales(self) -> "Float32 | None":
        """nvfp4's, as they will be written; None of other formats."""

    def rows(self, rows: "RowRange") -> "QuantizedRows":
        """Some rows in the target format; the base's where the update changes nothing."""


class Requantizer(Protocol):
    """A strategy that is ready to be used."""

    def __call__(self, step: "WeightStep") -> RequantizedWeight:
        """The re-quantized weight of a step whose target is quantized."""


@dataclass(frozen=True)
class Request:
    """What a strategy is made ready from.

    Attributes:
        plan: the fuse.
        sources: base and adapters.
        options: of calibrating.
        progress: told of each step that takes long.
    """

    plan: "FusePlan"
    sources: "Sources"
    options: "CalibrationOptions"
    progress: "StepProgress | None" = None


@dataclass(frozen=True)
class Prepared:
    """A strategy made ready.

    Attributes:
        plan: as it was asked for, or with other widths.
        requantizer: gives the rows.
        report: of calibrating, where there was any.
    """

    plan: "FusePlan"
    requantizer: Requantizer
    report: "CalibrationReport | None" = None


@dataclass(frozen=True)
class Strategy:
    """A way from merged float32 weights back to the base's format.

    Attributes:
        name: in reports and in ``fusekit.json``.
        words: for people, of what was done.
        prepare: makes it ready; may run the base and take long.
        calibrates: whether it runs the base on text, so that options about that make sense.
        widens: whether it gives modules more bits to keep a bound.
        otherwise: what is done instead where it is not possible or gains nothing, unless the user
            asked for what only this one does.
    """

    name: str
    words: str
    prepare: Callable[[Request], Prepared]
    calibrates: bool = False
    widens: bool = False
    otherwise: "Strategy | None" = None


def _rounding(request: Request) -> Prepared:
    from mlx_fusekit.requantize.nearest import nearest

    return Prepared(request.plan, nearest)


def _calibrating(request: Request) -> Prepared:
    from mlx_fusekit.requantize.auto import calibrate

    return calibrate(request)


_NEAREST = Strategy("nearest", "rounded to nearest", _rounding)
_CALIBRATED = Strategy(
    "calibrated",
    "calibrated, so that the layers' outputs change least",
    _calibrating,
    calibrates=True,
)

#: By what ``--requantize`` takes.
STRATEGIES = {
    "auto": replace(_CALIBRATED, widens=True, otherwise=_NEAREST),
    "calibrated": _CALIBRATED,
    "nearest": _NEAREST,
}


def in_words(name: str | None) -> str | None:
    """What the strategy of a report did, for people; None of one that is not known."""
    return next((s.words for s in STRATEGIES.values() if s.name == name), None)
