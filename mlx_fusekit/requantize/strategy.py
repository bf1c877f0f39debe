"""The table of re-quantization strategies.

It imports nothing heavy: the command line reads it to say what there is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_fusekit.requantize.requantizer import Prepared, Request


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
    prepare: "Callable[[Request], Prepared]"
    calibrates: bool = False
    widens: bool = False
    otherwise: "Strategy | None" = None


def _rounding(request: "Request") -> "Prepared":
    from mlx_fusekit.requantize.nearest import prepare

    return prepare(request)


def _calibrating(request: "Request") -> "Prepared":
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


def reported(name: str | None) -> Strategy | None:
    """The strategy that a report names; None for one that is not known."""
    return next((s for s in STRATEGIES.values() if s.name == name), None)


def in_words(name: str | None) -> str | None:
    """What the strategy of a report did, for people; None for one that is not known."""
    strategy = reported(name)
    return strategy.words if strategy else None
