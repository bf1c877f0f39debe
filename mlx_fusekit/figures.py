"""Numbers for people: three figures, and a unit."""


def number(value: float | None) -> str:
    """Three figures, and no fewer than are before the point; a dash for what is not known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def about(count: int) -> str:
    """A count that was estimated, rounded to three figures."""
    return f"{float(f'{count:.3g}'):,.0f}"


def milliseconds(seconds: float | None) -> str:
    """A time in milliseconds."""
    return "-" if seconds is None else f"{number(1000 * seconds)} ms"


def in_seconds(seconds: float | None) -> str:
    """A time in seconds."""
    return "-" if seconds is None else f"{number(seconds)} s"


def nats(value: float | None) -> str:
    """A KL divergence."""
    return "-" if value is None else f"{value:.3g}"


def share(value: float | None) -> str:
    """A share (0 to 1) in per cent."""
    return "-" if value is None else f"{value:.1%}"


def size(nbytes: int) -> str:
    """Bytes in decimal units."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
