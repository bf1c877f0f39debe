"""Ways to fuse, each run as a command in a process of its own, whose time and memory are taken."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from preserve_results import Cost

#: ``fuse`` ends with it where ``--max-kl`` was not reached; the model is there.
BELOW_THRESHOLD = 3
#: ru_maxrss is in bytes on macOS and in KiB elsewhere.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
#: Runs a command and notes what it took. On Linux a child's peak counts what its parent held before
#: the exec, so the parent must not be this process, which holds models.
_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[2:])
seconds = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([code, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss], file)
"""


@dataclass(frozen=True)
class Contender:
    """A way to fuse.

    Attributes:
        command: all but the model, the adapter and the target; none for the base itself.
        data: whether it may use the adapter's training data.
        variables: of the environment, beside those of this process.
    """

    name: str
    command: tuple[str, ...] = ()
    data: bool = False
    variables: tuple[tuple[str, str], ...] = ()


def fuse_command(contender: Contender, base: Path, adapter: Path, target: Path) -> list[str]:
    """A contender's command, whole."""
    command = [*contender.command, "--model", str(base), "--adapter-path", str(adapter)]
    return [*command, "--save-path", str(target)]


def fuse_apart(contender: Contender, base: Path, adapter: Path, target: Path) -> Cost:
    """Run a contender's command in a process of its own, where no target is before."""
    remove(target)
    command = fuse_command(contender, base, adapter, target)
    usage, output, log = (target.with_suffix(suffix) for suffix in (".usage", ".out", ".log"))
    load = os.getloadavg()[0]
    with open(output, "wb") as out, open(log, "wb") as errors:
        subprocess.run(
            [sys.executable, "-P", "-c", _LAUNCHER, str(usage), *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(contender.variables),
            check=True,
        )
    code, wall, cpu, peak = json.loads(usage.read_text("utf-8"))
    printed = output.read_text("utf-8", "replace")
    if code not in (0, BELOW_THRESHOLD) or not target.is_dir():
        tail = (printed + log.read_text("utf-8", "replace"))[-4000:]
        raise SystemExit(f"{' '.join(command)}\nended with {code}:\n{tail}")
    report = _report_in(printed) if "--json" in contender.command else None
    return Cost(wall, cpu, peak * _RSS_UNIT, code == 0, load, report)


def _report_in(printed: str) -> dict[str, object]:
    """The JSON object that a fuse printed; mlx.launch may print lines of its own around it."""
    start = printed.index("{")
    found: dict[str, object] = json.JSONDecoder().raw_decode(printed[start:])[0]
    return found


def without_data(adapter: Path, target: Path) -> Path:
    """A copy of an adapter whose config names a data folder that does not exist."""
    remove(target)
    shutil.copytree(adapter, target)
    config = json.loads((target / "adapter_config.json").read_text("utf-8"))
    config["data"] = "no-such-folder"
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return target


def remove(*folders: Path) -> None:
    """Remove what is there of some folders."""
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def progress(line: str) -> None:
    """Tell on stderr what goes on."""
    print(line, file=sys.stderr, flush=True)
