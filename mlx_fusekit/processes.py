"""The one place that starts other programs, none of which is looked for in the current folder.

A Python imports no module that lies there (``-P``). ``PYTHONPATH`` and the environment that it runs
in hold as they do for the program itself: whoever set them said where modules come from.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import TimeoutExpired as TimeoutExpired


def python_module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module in a Python like this one."""
    return [sys.executable, "-P", "-m", name, *arguments]


def program(name: str) -> str | None:
    """Where a program lies, by the absolute folders of ``PATH``; None where it is in none."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return shutil.which(name, path=os.pathsep.join(filter(os.path.isabs, folders)))


def run(
    command: Sequence[str],
    *,
    text: str | None = None,
    shown: bool = False,
    merged: bool = False,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, without a shell; ended with this one when a signal comes.

    Args:
        command: its path, and its arguments.
        text: what it reads; nothing by default.
        shown: both its output and its errors go to standard error; by default they are returned.
        merged: its errors are returned as part of its output.
        timeout: seconds after which it is ended.

    Raises:
        OSError: when it cannot be started.
        TimeoutExpired: when it took too long.
    """
    assert Path(command[0]).is_absolute(), command
    return subprocess.run(  # noqa: S603 - no shell, and nothing is looked for
        command,
        input="" if text is None else text,
        stdout=2 if shown else subprocess.PIPE,
        stderr=None if shown else subprocess.STDOUT if merged else subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=timeout,
        check=False,
    )


def start(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start a program to talk with, without a shell; whoever does so ends it.

    Its input and output are pipes, and its errors are not shown.

    Raises:
        OSError: when it cannot be started.
    """
    assert Path(command[0]).is_absolute(), command
    return subprocess.Popen(  # noqa: S603 - no shell, and nothing is looked for
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def resident_bytes(pid: int) -> int:
    """Main memory that a process of this machine holds; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]
        return int(pages) * resource.getpagesize()
    with contextlib.suppress(OSError, ValueError, TimeoutExpired):
        if (ps := program("ps")) is not None:  # of macOS, in kilobytes
            return int(run([ps, "-o", "rss=", "-p", str(pid)], timeout=5).stdout) << 10
    return 0
