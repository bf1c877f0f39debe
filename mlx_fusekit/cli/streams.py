"""What reaches a terminal: nothing that others wrote can steer it, and no line gets lost unsaid.

While a command runs, ``sys.stdout`` and ``sys.stderr`` are streams of this module, so that what
libraries print goes through it as well.
"""

import contextlib
import errno
import io
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

#: What libraries send to a terminal to draw bars and to color lines.
_DRAWING = re.compile(r"(\r|\x1b\[[0-9;]*m|\x1b\[A)")
#: Letters of scripts and emoji are joined or parted with these, which have no shape.
_JOINERS = "\u200c\u200d"
_BREAKS = re.compile(r"\s*[\r\n]+\s*")


class StdoutError(Exception):
    """Standard output takes no more: its reader has gone, or its disk is full."""

    @property
    def reader_gone(self) -> bool:
        """Whether it was a pipe, to head say, that is closed."""
        cause = self.__cause__
        return isinstance(cause, OSError) and cause.errno == errno.EPIPE


def visible(text: str, keep: str = "") -> str:
    r"""Text as a terminal may show it: control characters and what has no shape as ``\x1b``.

    That is C0, C1 and DEL, marks of direction, separators of lines and paragraphs, bytes of a file
    name that are no text; not spaces of any width.

    Args:
        text: what others may have written.
        keep: control characters that are meant.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) or c in keep else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """The same on one line: where it breaks, it goes on."""
    return visible(_BREAKS.sub(" ", text.strip()))


def json_text(text: str, stream: TextIO) -> str:
    r"""JSON as a terminal may show it: the same value, with ``\u001b`` for control characters."""
    try:
        text.encode(stream.encoding or "utf-8")
        plain = False
    except (UnicodeEncodeError, LookupError):
        plain = True
    return "".join(
        c if c == "\n" or (_is_shown(c) and (c.isascii() or not plain)) else _json_escaped(c)
        for c in text
    )


def styled(stream: TextIO) -> TextIO:
    """The stream below, for who escapes what others wrote and adds colors to it."""
    return stream.styled if isinstance(stream, _Escaping) else stream  # type: ignore[return-value]


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Standard output and error as streams of this module, while the block runs.

    What is closed is taken for ``/dev/null``: no file that is opened later gets its number.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _escaping(sys.stdout, lossy=False), _escaping(sys.stderr, lossy=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def give_up(stream: TextIO) -> None:
    """Send what is left to nowhere, of which Python would complain at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Checked:
    """A text stream whose failures are told apart from those of files.

    Args:
        stream: what is written to.
        lossy: whether what cannot be written is dropped, as of warnings, whose loss must not end
            the work; otherwise it is raised as :class:`StdoutError`.
    """

    def __init__(self, stream: TextIO, *, lossy: bool) -> None:
        self._stream, self._lossy = stream, lossy

    def write(self, text: str) -> int:
        with self._checked():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._checked():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            give_up(self._stream)
            if not self._lossy:
                raise StdoutError(error.strerror) from error


class _Escaping(_Checked):
    """The same, on which libraries may draw bars and colors, if it is a terminal, and no more."""

    @property
    def styled(self) -> _Checked:
        return _Checked(self._stream, lossy=self._lossy)

    def write(self, text: str) -> int:
        if not text.isprintable():
            pieces = _DRAWING.split(text) if self._stream.isatty() else [text]
            text = "".join(
                piece if place % 2 else visible(piece, "\n\t") for place, piece in enumerate(pieces)
            )
        return super().write(text)


def _escaping(stream: TextIO | None, *, lossy: bool) -> Any:
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return _Escaping(stream, lossy=lossy)


def _is_shown(c: str) -> bool:
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")


def _json_escaped(c: str) -> str:
    units = c.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
