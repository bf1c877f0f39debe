"""The command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


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
