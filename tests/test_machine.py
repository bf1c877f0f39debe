"""What this machine has, and work spread over its cores."""

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_fusekit.machine import (
    Task,
    default_workers,
    free_disk_bytes,
    memory_bytes,
    run_tasks,
)


def test_the_machine_has_something_of_everything() -> None:
    assert 1 <= default_workers() <= 8
    assert 1 << 20 < memory_bytes() < 1 << 50


def test_the_disk_of_a_path_that_does_not_exist(tmp_path: Path, monkeypatch) -> None:
    here = free_disk_bytes(tmp_path)
    assert here > 0
    assert free_disk_bytes(tmp_path / "not" / "yet" / "there") == pytest.approx(here, rel=0.1)
    monkeypatch.chdir(tmp_path)
    assert free_disk_bytes(Path("new/folder")) == pytest.approx(here, rel=0.1)


@pytest.mark.parametrize(("workers", "in_flight"), [(1, 1), (4, 2), (2, 5)])
def test_what_is_in_flight_is_bounded(workers: int, in_flight: int) -> None:
    taken, done, most = 0, 0, 0
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal done
        time.sleep(0.001)
        with lock:
            done += 1
        return number

    def tasks() -> Iterator[Task]:
        nonlocal taken, most
        for number in range(20):
            taken += 1
            with lock:
                most = max(most, taken - done)
            yield lambda number=number: work(number)

    told: list[int] = []
    with ThreadPoolExecutor(workers) as pool:
        run_tasks(pool, tasks(), in_flight, told.append)
    # The next task is taken before its place is free.
    assert most <= in_flight + 1
    assert most > 1
    assert sorted(told) == list(range(20))


def test_progress_comes_from_the_calling_thread_and_no_task_is_none() -> None:
    threads: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        run_tasks(pool, [], 2, threads.append)
        assert threads == []
        run_tasks(pool, [lambda: 1] * 5, 2, lambda _: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()] * 5


def test_a_task_that_fails_ends_the_work() -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        if number == 3:
            raise OSError("the disk is full")
        return number

    tasks = (lambda number=number: work(number) for number in range(100))
    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="disk is full"):
        run_tasks(pool, tasks, 2, lambda _: None)
    assert len(started) < 10


_FREEING = """
from pathlib import Path
from mlx_fusekit.machine import give_back_memory

def resident():
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * 4096

blocks = [bytearray(b"x" * 60_000) for _ in range(4000)]
used = blocks[::20]
del blocks
kept = resident()
give_back_memory()
print(kept - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Blocks between others that are in use stay with the process otherwise."""
    done = subprocess.run([sys.executable, "-c", _FREEING], check=True, capture_output=True)
    assert int(done.stdout) > 100_000_000
