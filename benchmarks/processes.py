"""Timing commands, each in a process of its own: its time, its memory, the delay of the disk."""

import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_CHUNK = 16 << 20
#: ru_maxrss is in bytes on macOS and in KiB elsewhere.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Cost:
    """What one run of a command took.

    Attributes:
        wall_seconds: from starting the process to its end.
        cpu_seconds: of all its threads, user and system.
        sync_seconds: what ``os.sync()`` took afterwards.
        peak_bytes: largest resident memory.
        read_bytes: what it asked the system to read or to copy of files; 0 where Linux does not
            tell.
        load_average: of the machine over the minute before the run.
    """

    wall_seconds: float
    cpu_seconds: float
    sync_seconds: float
    peak_bytes: int
    read_bytes: int
    load_average: float

    def __str__(self) -> str:
        return (
            f"{self.wall_seconds:7.1f} s wall {self.cpu_seconds:7.1f} s CPU"
            f" {self.sync_seconds:6.1f} s to sync {self.peak_bytes / 1e6:7.0f} MB"
            f"   load {self.load_average:.1f}"
        )


def measure(command: list[str], sources: Sequence[Path], log: Path) -> Cost:
    """Run a command to its end.

    What the run before left behind is written out first, and the sources are read once, so that
    every command finds them in the page cache.

    Args:
        command: a program and its arguments.
        sources: files and folders that it reads.
        log: a file for what it prints, removed when it succeeds.
    """
    os.sync()
    for source in sources:
        _read_all(source)
    load = os.getloadavg()[0]
    wall, cpu, peak, read = _run(command, log)
    start = time.perf_counter()
    os.sync()
    return Cost(wall, cpu, time.perf_counter() - start, peak, read, load)


def _run(command: list[str], log: Path) -> tuple[float, float, int, int]:
    """Run a command to its end: wall seconds, CPU seconds, peak resident bytes, bytes read.

    On Linux a child's peak counts what its parent held before the exec, so this process imports
    and holds little: whatever needs NumPy or MLX is done :func:`apart`.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        # It has ended, and the system still knows what it read.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wall = time.perf_counter() - start
        read = _bytes_read(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text("utf-8", "replace")[-4000:]
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    log.unlink()
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _RSS_UNIT, read


def _bytes_read(pid: int) -> int:
    """Of all its calls, whether a disk or the page cache answered; 0 where Linux does not tell."""
    try:
        facts = Path(f"/proc/{pid}/io").read_text("ascii")
    except OSError:
        return 0
    return int(facts.split("rchar:")[1].split()[0])


def apart(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def _read_all(source: Path) -> None:
    """Bring a file, or the files of a folder, into the page cache."""
    buffer = bytearray(_CHUNK)
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


@contextmanager
def work_folder(chosen: Path | None, *, keep: bool) -> Iterator[Path]:
    """The user's folder, which is kept, or a temporary one, which is not unless asked."""
    work = chosen or Path(tempfile.mkdtemp(prefix="fusekit-speed-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work.resolve()
    finally:
        if chosen is None and keep:
            print(f"kept {work}", file=sys.stderr)
        elif chosen is None:
            shutil.rmtree(work, ignore_errors=True)


def program(name: str) -> str:
    """A command of the environment this script runs in."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed beside {sys.executable}")
    return found


def median(costs: Sequence[Cost], field: str) -> float:
    """The median of one field."""
    return float(statistics.median(getattr(cost, field) for cost in costs))


def environment(*packages: str) -> dict[str, object]:
    """The machine and the versions of packages."""
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "page_cache": "warm: what is read is read once before each run",
    }
