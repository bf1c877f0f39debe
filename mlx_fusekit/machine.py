"""What this machine has, cores, memory and disk; and work spread over its cores."""

import contextlib
import ctypes
import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
#: A piece of work that returns the number of bytes it did.
Task = Callable[[], int]


def default_workers() -> int:
    """Worker threads: the cores this process may use, at most 8 since the disk is next."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(available or 1, 8))


def memory_bytes() -> int:
    """Memory of the machine, or of the container where that has less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text("ascii")))
    return physical


def give_back_memory() -> None:
    """Give memory that is free back to the system, where the C library holds on to it.

    glibc does, for blocks of up to 32 MB; others, such as macOS's, have no such call.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def free_disk_bytes(path: Path) -> int:
    """Free bytes of the disk that a path lies on, or would if it existed."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def run_tasks(
    pool: ThreadPoolExecutor,
    tasks: Iterable[Task],
    in_flight: int,
    progress: Callable[[int], None],
) -> None:
    """Run tasks with at most ``in_flight`` of them submitted, which bounds what they hold.

    Args:
        pool: where they run.
        tasks: taken one by one, as others end.
        in_flight: at least one.
        progress: called with what each task returns, its number of bytes, from the calling thread.
    """
    finished: SimpleQueue[Future[int]] = SimpleQueue()
    running = 0
    for task in tasks:
        if running == in_flight:
            progress(finished.get().result())
            running -= 1
        pool.submit(task).add_done_callback(finished.put)
        running += 1
    for _ in range(running):
        progress(finished.get().result())


def in_lasting_thread(work: Callable[[], T]) -> T:
    """Do something in the one thread that never ends, and wait for it.

    MLX keeps Python objects with a thread that used it, and frees them when the thread ends. Where
    that is while Python itself ends, Linux aborts the process; a daemon that waits is left alone.
    """
    done: Future[T] = Future()
    _lasting_thread().put((done, work))
    return done.result()


@functools.cache
def _lasting_thread() -> "SimpleQueue[tuple[Future[Any], Callable[[], Any]]]":
    tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()

    def work() -> None:
        while True:
            done, task = tasks.get()
            try:
                done.set_result(task())
            except BaseException as error:  # noqa: BLE001 - for who asked
                done.set_exception(error)
            del done, task

    threading.Thread(target=work, daemon=True).start()
    return tasks
