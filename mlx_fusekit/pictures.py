"""Figures of matplotlib, the ``plot`` extra, as the bytes of pictures."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_fusekit.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The endings of pictures' names, which tell the format.
SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(name: str, flag: str = "--plot") -> None:
    """Refuse a name that is no picture's, and a machine that cannot draw.

    Raises:
        ConfigurationError: naming the flag.
    """
    if Path(name).suffix.lower() not in SUFFIXES:
        raise ConfigurationError(f"{flag} {name}: name a {', '.join(SUFFIXES)} file")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"{flag} needs matplotlib: pip install 'mlx-fusekit[plot]'"
        ) from error


def drawn(figure: "Figure", suffix: str) -> bytes:
    """A figure as the bytes of a picture; the same figure gives the same bytes."""
    kind = suffix.lower().removeprefix(".")
    # Without the time of day.
    key = {"svg": "Date", "pdf": "CreationDate"}.get(kind)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={key: None} if key else {})
    return buffer.getvalue()
