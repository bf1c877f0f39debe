"""The machine and the software that a timing holds for."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_fusekit import launched, processes
from mlx_fusekit.checkpoint import recipe
from mlx_fusekit.machine import memory_bytes

_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Environment:
    """What may have a part in how long something takes.

    Attributes:
        chip: the processor's name.
        device: MLX's default device: ``gpu`` or ``cpu``.
        device_name: that device's name, where MLX knows it.
        ranks: how many processes run the model together, under ``mlx.launch``; what is counted in
            bytes is then the share of the first.
        backend: that connects them: ``ring``, ``jaccl``, ``nccl`` or ``mpi``; None without one.
        power: where the system tells: ``ac``, ``battery``, and whether it saves power.
        load_average: processes that were running in the last minute, before the first trial.
    """

    chip: str
    cores: int
    memory_bytes: int
    os: str
    device: str
    device_name: str | None
    ranks: int
    backend: str | None
    power: str | None
    load_average: float | None
    python: str
    versions: dict[str, str]

    @classmethod
    def read(cls) -> "Environment":
        """This machine, now."""
        device = "gpu" if mx.default_device().type == mx.gpu else "cpu"
        _, ranks = launched.ranks()
        try:
            load: float | None = os.getloadavg()[0]
        except OSError:
            load = None
        return cls(
            chip=_chip(),
            cores=os.cpu_count() or 1,
            memory_bytes=memory_bytes(),
            os=_system(),
            device=device,
            device_name=str(name) if (name := mx.device_info().get("device_name")) else None,
            ranks=ranks,
            backend=launched.backend() if ranks > 1 else None,
            power=_power(),
            load_average=load,
            python=platform.python_version(),
            versions=recipe.versions(),
        )

    @property
    def busy(self) -> bool:
        """Whether so much else was running that timings suffer."""
        return self.load_average is not None and self.load_average > 0.5 * self.cores


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _chip() -> str:
    if platform.system() == "Darwin":
        return _output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string") or "unknown"
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _power() -> str | None:
    if platform.system() == "Darwin":
        drawn = _output("/usr/bin/pmset", "-g", "batt")
        if drawn is None:
            return None
        saving = re.search(r"lowpowermode\s+1", _output("/usr/bin/pmset", "-g") or "")
        source = "battery" if "Battery Power" in drawn else "ac"
        return f"{source}, low power mode" if saving else source
    for supply in sorted(Path("/sys/class/power_supply").glob("*")):
        try:
            if (supply / "type").read_text("ascii").strip() == "Mains":
                online = (supply / "online").read_text("ascii").strip() == "1"
                return "ac" if online else "battery"
        except OSError:
            continue
    return None


def _output(program: str, *arguments: str) -> str | None:
    """What a system's program prints; None where it is missing or fails."""
    try:
        done = processes.run([program, *arguments], timeout=_TIMEOUT_SECONDS)
    except (OSError, processes.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
