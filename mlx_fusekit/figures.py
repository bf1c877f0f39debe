"""Numbers for people: the only place where a number becomes text.

A dash stands for what is not known, or does not apply.
"""

import math
from collections.abc import Mapping
from typing import Any

UNKNOWN = "-"


def for_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold: numbers that are not finite become None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def number(value: float | None) -> str:
    """Three figures, and no fewer than are before the point."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def count(value: int) -> str:
    """How many there are."""
    return f"{value:,}"


def about(value: int) -> str:
    """A count that was estimated, rounded to three figures."""
    return f"{float(f'{value:.3g}'):,.0f}"


def setting(value: float | None) -> str:
    """A number that somebody chose, as they would write it."""
    return UNKNOWN if value is None else f"{value:g}"


def weighted(name: str, weight: float) -> str:
    """What is added up, and how much of it where that is not all."""
    return name if weight == 1 else f"{name} (weight {setting(weight)})"


def combination(how: Mapping[str, Any]) -> str:
    """By what several adapters were combined, as reports tell it."""
    seed = "" if how.get("seed") is None else f", seed {how['seed']}"
    return f"{how['method']}, density {setting(how['density'])}{seed}"


def milliseconds(seconds: float | None) -> str:
    """A time in milliseconds."""
    return UNKNOWN if seconds is None else f"{number(1000 * seconds)} ms"


def in_seconds(seconds: float | None) -> str:
    """A time in seconds."""
    return UNKNOWN if seconds is None else f"{number(seconds)} s"


def size(nbytes: int | None) -> str:
    """Bytes in decimal units."""
    if nbytes is None:
        return UNKNOWN
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def bits(value: float) -> str:
    """Bits a weight."""
    return f"{value:.2f}"


def share(value: float | None, decimals: int = 1) -> str:
    """A share (0 to 1) in per cent."""
    return UNKNOWN if value is None else f"{value:.{decimals}%}"


def growth(value: float) -> str:
    """A share in per cent by which something is larger or, below 0, smaller."""
    return f"{value:+.1%}"


def ratio(value: float | None, decimals: int = 3) -> str:
    """One quantity by another of its kind."""
    return UNKNOWN if value is None else f"{value:.{decimals}f}"


def nats(value: float | None) -> str:
    """A KL divergence."""
    return UNKNOWN if value is None else f"{value:.3g}"


def perplexity(value: float | None) -> str:
    """A perplexity, of which models differ in the last figures."""
    return UNKNOWN if value is None else f"{value:.4g}"


def error(value: float | None) -> str:
    """An error of weights, of which the order of magnitude matters."""
    return UNKNOWN if value is None else f"{value:.2g}"


def rms(value: float | None) -> str:
    """A root mean square of weights, comparable in its column by the exponent."""
    return UNKNOWN if value is None else f"{value:.2e}"
