"""Commands under a real ``mlx.launch``, several ranks on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

_MAIN = "from mlx._distributed_utils.launch import main; main()"


def launch(
    *command: str, cwd: Path, ranks: int = 2, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command of this Python in several ranks that MLX's ring connects.

    ``mlx.launch`` itself ends with 0 also where a rank fails; it says so on standard error.
    """
    launcher = (sys.executable, "-c", _MAIN, "--backend", "ring", "-n", str(ranks))
    return subprocess.run(
        [*launcher, "--starting-port", str(free_ports(ranks)), "--", sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80"},
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=timeout,
    )


def free_ports(count: int) -> int:
    """The first of some ports in a row that nobody listens on."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            start = int(one.getsockname()[1])
        if start + count < 65536 and all(_is_free(start + place) for place in range(count)):
            return start


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0
