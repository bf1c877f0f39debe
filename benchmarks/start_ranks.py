"""Start ranks on this machine as ``mlx.launch`` does, and wait for them without taking a core.

    python benchmarks/start_ranks.py RANKS COMMAND...

The launcher of MLX 0.32.4 asks all the time whether its ranks would take input, which keeps one
core busy (``mlx/_distributed_utils/launch.py``, ``select`` on their standard input). Its ranks are
told the same here: their number, and a file with everybody's address.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    """Run them; the status of the first that fails, which ends the others."""
    count, command = int(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
        ranks = [
            subprocess.Popen(
                command, env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            )
            for rank in range(count)
        ]
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):
                for rank in ranks:
                    rank.terminate()
            time.sleep(0.1)
    return next((rank.returncode for rank in ranks if rank.returncode), 0)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    raise SystemExit(main())
