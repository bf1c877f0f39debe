"""Load time and peak memory of an arm, measured in a process of its own.

Run as ``python -m mlx_fusekit.bench.isolated`` it reads what to do from stdin and answers on
stdout, both as JSON.
"""

import json
import re
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fusekit import launched, processes
from mlx_fusekit.bench.arms import ArmSource, load_arm
from mlx_fusekit.bench.timing import time_generation
from mlx_fusekit.errors import FusekitError

#: Backends under which a process and one that it starts can each be in a group: a ring's ports are
#: free again once its ranks have met, while MPI lets no rank start another. None is without ranks.
MEASURED_ALONE = (None, "ring")
#: By when the processes of all ranks have met.
_CONNECT_SECONDS = 120


@dataclass(frozen=True)
class Isolated:
    """What one process needed for one arm.

    Attributes:
        load_seconds: until the weights were in memory, the adapter's share included.
        adapter_load_seconds: the adapter's share; None without one.
        peak_memory_bytes: most that MLX held at once, loading and generating; None if it only
            loaded.
        peak_rss_bytes: most that the process held of main memory; None if it only loaded.
    """

    load_seconds: float
    adapter_load_seconds: float | None
    peak_memory_bytes: int | None
    peak_rss_bytes: int | None


def measure_isolated(
    source: ArmSource, prompts: Sequence[Sequence[int]], generation_tokens: int
) -> Isolated:
    """Load an arm, and generate with it, in a fresh process; under ``mlx.launch``, one a rank.

    Args:
        source: the arm.
        prompts: token ids; none to load only.
        generation_tokens: of each prompt.

    Raises:
        FusekitError: when the process fails; its last line says why.
    """
    request = {
        "source": asdict(source)
        | {"folder": str(source.folder), "adapter": source.adapter and str(source.adapter)},
        "prompts": [list(prompt) for prompt in prompts],
        "generation_tokens": generation_tokens,
    }
    command = processes.python_module("mlx_fusekit.bench.isolated")
    done = processes.run(command, text=json.dumps(request))
    if done.returncode == -signal.SIGALRM:
        raise FusekitError(
            f"{source.name}: the ranks' own processes for it did not meet within "
            f"{_CONNECT_SECONDS} s; try again with --load-trials 0"
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise FusekitError(f"{source.name}: measuring it in its own process failed ({last})")
    return Isolated(**json.loads(done.stdout.splitlines()[-1]))


def _connect() -> None:
    """Meet the processes of the other ranks, where this one's parent is a rank, or be ended.

    MLX waits for them without end.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_CONNECT_SECONDS)
    launched.group()
    signal.alarm(0)


def _answer(request: dict[str, Any]) -> Isolated:
    entry = request["source"]
    adapter = entry["adapter"] and Path(entry["adapter"])
    own = {"folder": Path(entry["folder"]), "adapter": adapter, "ignore": tuple(entry["ignore"])}
    source = ArmSource(**entry | own)
    _connect()
    mx.reset_peak_memory()
    arm = load_arm(source)
    if not request["prompts"]:
        return Isolated(arm.load_seconds, arm.adapter_load_seconds, None, None)
    time_generation(arm.model, request["prompts"], request["generation_tokens"])
    return Isolated(
        arm.load_seconds, arm.adapter_load_seconds, mx.get_peak_memory(), _peak_rss_bytes()
    )


def _peak_rss_bytes() -> int:
    # Of a process that was started by another, Linux's ru_maxrss can be the other's.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found.group(1)) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_answer(json.load(sys.stdin)))) + "\n")
