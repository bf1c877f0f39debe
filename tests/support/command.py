"""The command line, in a process of its own and in this one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_fusekit.cli import main


def run(
    *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``mlx-fusekit`` with these arguments, on a terminal of 80 columns."""
    return subprocess.run(
        [sys.executable, "-m", "mlx_fusekit", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80", **environment},
        check=False,
        timeout=120,
    )


def exit_code(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run ``mlx-fusekit`` here, where nothing has to be imported again, to where it exits."""
    patch.setattr(sys, "argv", ["mlx-fusekit", *arguments])
    patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    hook = sys.unraisablehook
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(ended.value.code, int)
    return ended.value.code
