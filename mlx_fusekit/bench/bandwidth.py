"""How fast this machine reads memory: the limit that generating one token at a time runs into."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import numpy.typing as npt

_BYTES = 256 << 20
_REPEATS = 5


def memory_bandwidth() -> float:
    """Bytes a second read from memory, the best of a few passes over 256 MB.

    MLX's default device sums an array; where that is a CPU, of which MLX uses one core for a sum,
    NumPy's threads read it too, and the better of both counts.
    """
    rates = [_rate(_device_pass())]
    if mx.default_device().type == mx.cpu:
        threads = os.cpu_count() or 1
        values = np.ones(_BYTES // 8, np.uint64)
        with ThreadPoolExecutor(threads) as pool:
            rates.append(_rate(_threaded_pass(values, pool, threads)))
    return max(rates)


def _device_pass() -> Callable[[], None]:
    array = mx.ones((_BYTES // 4,), mx.float32)
    mx.eval(array)

    def read() -> None:
        mx.eval(mx.sum(array))

    return read


def _threaded_pass(
    values: npt.NDArray[np.uint64], pool: ThreadPoolExecutor, threads: int
) -> Callable[[], None]:
    parts = np.array_split(values, threads)

    def read() -> None:
        list(pool.map(np.bitwise_or.reduce, parts))

    return read


def _rate(read: Callable[[], None]) -> float:
    read()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return _BYTES / min(seconds)
