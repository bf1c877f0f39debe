"""What a reader of a stranger's file may take."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Of this process's work, which other processes do not lengthen; loaded machines are slower.
MOST_SECONDS = 2.0
MOST_BYTES = 300_000_000


@contextmanager
def in_little(seconds: float = MOST_SECONDS, most_bytes: int = MOST_BYTES) -> Iterator[None]:
    """For what must take little time, and little memory beyond what was in use at most before."""
    held, start = _most_held(), time.process_time()
    yield
    took, grown = time.process_time() - start, _most_held() - held
    assert took < seconds, f"{took:.1f} s"
    assert grown < most_bytes, f"{grown / 1e6:.0f} MB"


def _most_held() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
