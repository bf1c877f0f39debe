"""``mlx_lm.fuse`` as anybody would run it: in a process of its own."""

import time
from pathlib import Path

from mlx_fusekit import processes
from mlx_fusekit.exercise.findings import Fusing


def fuse_by_rounding(
    model: Path, adapter: Path, target: Path, *, trust_remote_code: bool = False
) -> Fusing | str:
    """Fuse with mlx-lm's own command.

    Args:
        model: folder of the base.
        adapter: folder of the adapter.
        target: folder to make.
        trust_remote_code: let the model's own code run.

    Returns:
        What came of it; where the command failed, the last line it printed.
    """
    folders = {"--model": model, "--adapter-path": adapter, "--save-path": target}
    options = [text for flag, path in folders.items() for text in (flag, str(path))]
    if trust_remote_code:
        options.append("--trust-remote-code")
    start = time.perf_counter()
    done = processes.run(processes.python_module("mlx_lm", "fuse", *options), merged=True)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        return (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Fusing(target.name, seconds, weight_bytes(target))


def weight_bytes(folder: Path) -> int:
    """Size of a model's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
