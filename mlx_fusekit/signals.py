"""Signals that end the program: one exception for all, and clean-up that none of them cuts short.

Imports next to nothing: :func:`install` has to run before what takes long to import.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

#: What each of them says of a run.
_WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal was closed",
}
#: How long a signal waits that came where Python drops exceptions.
_AGAIN_SECONDS = 0.02


class Ended(KeyboardInterrupt):
    """A signal asks the program to end: what an interrupt cleans up, this does too.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(_WORDS[signal.Signals(signum)])
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status, as a shell reports a program that a signal ended."""
        return 128 + self.signum


_first: Ended | None = None


def install() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP raise :class:`Ended`, in the main thread.

    What is ignored stays so: SIGINT of a job in the background, SIGHUP under ``nohup``.
    """
    global _first  # noqa: PLW0603 - a process has one fate
    _first = None
    for number in _WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)
    sys.unraisablehook = _unraisable


def ignore() -> None:
    """Let nothing change how the program ends, once that is decided."""
    for number in _WORDS:
        signal.signal(number, signal.SIG_IGN)


def received() -> Ended | None:
    """The first signal that came; what was raised for it may have become another error."""
    return _first


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let signals that would raise wait until the block, a clean-up, is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    for number in _WORDS:
        handler = signal.getsignal(number)
        if callable(handler):
            handlers[number] = handler
            signal.signal(number, lambda signum, _frame: waiting.append(signum))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def _raise(signum: int, _frame: FrameType | None) -> None:
    global _first  # noqa: PLW0603 - a process has one fate
    # While the program cleans up after one, another must not stop that.
    handled = sys.exception()
    while handled is not None:
        if isinstance(handled, Ended):
            return
        handled = handled.__context__
    ended = Ended(signum)
    _first = _first or ended
    raise ended


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """A signal that came in a callback, where its exception is dropped, comes again."""
    if isinstance(unraisable.exc_value, Ended):
        again = (os.getpid(), unraisable.exc_value.signum)
        later = threading.Timer(_AGAIN_SECONDS, os.kill, again)
        later.daemon = True
        later.start()
    else:
        sys.__unraisablehook__(unraisable)
