"""What a disk or a kill can do to any call that writes, and the counting of those calls."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlx_fusekit.writing import calls

#: Does something at a call in place of it, or around it.
Fault = Callable[[Callable[..., Any], tuple[Any, ...]], Any]


def failing(number: int) -> Fault:
    """The call is refused."""

    def fault(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if call is os.close:  # it is closed all the same
            call(*arguments)
        raise OSError(number, os.strerror(number))

    return fault


def short(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Of several bytes only half are written."""
    if call is os.pwrite and len(arguments[1]) > 1:
        file, data, offset = arguments
        return call(file, data[: len(data) // 2], offset)
    if call is getattr(os, "copy_file_range", None) and arguments[2] > 1:
        source, target, length, *offsets = arguments
        return call(source, target, length // 2, *offsets)
    return call(*arguments)


def killed_before(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The process dies before the call."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The process dies after the call, whatever came of it."""
    try:
        call(*arguments)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


#: By name; all but the last two can happen within this process.
FAULTS: dict[str, Fault] = {
    "disk full": failing(errno.ENOSPC),
    "input/output error": failing(errno.EIO),
    "quota": failing(errno.EDQUOT),
    "interrupted": failing(errno.EINTR),
    "short": short,
    "killed before": killed_before,
    "killed after": killed_after,
}


class Calls:
    """Counts the calls that write; at one of them there is a fault.

    Args:
        at: number of the call, from 1; 0 for none.
        fault: what happens there.
        lasting: whether all later calls have the fault too.
    """

    def __init__(self, at: int = 0, fault: Fault | None = None, *, lasting: bool = False) -> None:
        self.made: list[str] = []
        self._at, self._fault, self._lasting = at, fault, lasting
        self._lock = threading.Lock()

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            self.made.append(getattr(call, "__name__", "call").lstrip("_"))
            here = len(self.made)
        due = here >= self._at if self._lasting else here == self._at
        if self._fault is not None and self._at and due:
            return self._fault(call, arguments)
        return call(*arguments)


@contextmanager
def counting(made: Calls) -> Iterator[Calls]:
    """Let all calls go through a counter within the block."""
    real = calls._once
    calls._once = made
    try:
        yield made
    finally:
        calls._once = real
