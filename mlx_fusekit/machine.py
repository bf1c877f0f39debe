"""What this machine has, cores, memory and disk; and work spread over its cores."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

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
