"""Kill many real runs at random moments, and check that nothing is lost or half-made.

python scripts/kill_runs.py --runs 1000

Each run is a whole process of the command line: a fuse into a new folder, a fuse over an older
model, an export to GGUF, or one over an older file. Half of the kills wait for the run's unfinished
files to appear, so that they fall into the writing; the other half fall anywhere. After each, the
inputs must be as they were and the target absent, complete or the old one; after a rerun it must be
complete, and nothing else may lie there.
"""

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.exportable import make_exportable
from support.tiny import LLAMA, make_adapter

#: Large enough that the writing takes a while.
MODEL = LLAMA | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
OPERATIONS = ("fuse", "fuse --overwrite", "export-gguf", "export-gguf --overwrite")


def digest(path: Path) -> str:
    """Of a file or folder; "absent" where there is none."""
    if not path.exists():
        return "absent"
    found = hashlib.sha256()
    for file in sorted([path, *path.rglob("*")]):
        found.update(str(file.relative_to(path)).encode())
        if file.is_file():
            found.update(file.read_bytes())
    return found.hexdigest()


class Ground:
    """A folder where runs are killed."""

    def __init__(self, folder: Path, operation: str) -> None:
        self.folder, self.out = folder, folder / "out"
        self.over = operation.endswith("--overwrite")
        self.fusing = operation.startswith("fuse")
        self.target = self.out / ("fused" if self.fusing else "model.gguf")
        self.old = folder / ("base" if self.fusing else "old.gguf")
        self.allowed = {digest(self.old) if self.over else "absent"}
        self.fresh()
        start = time.monotonic()
        if (status := self.start().wait()) != 0:
            raise SystemExit(f"{operation}: failed with {status} without being killed")
        self.seconds = time.monotonic() - start
        self.complete = digest(self.target)
        self.allowed.add(self.complete)

    def fresh(self) -> None:
        """No target, or an older one."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        if self.over:
            copy = shutil.copytree if self.fusing else shutil.copy
            copy(self.old, self.target)

    def start(self, *, overwrite: bool = False) -> "subprocess.Popen[bytes]":
        """Start a run."""
        base = str(self.folder / "base")
        arguments = ["export-gguf", "--model", base, "--gguf-path", str(self.target)]
        if self.fusing:
            arguments = ["fuse", "--model", base, "--adapter-path", str(self.folder / "adapter")]
            arguments += ["--save-path", str(self.target), "--requantize", "nearest"]
        if self.over or overwrite:
            arguments.append("--overwrite")
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "mlx_fusekit", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def writing(self) -> bool:
        """Whether unfinished files lie there."""
        return any(".fusekit-" in path.name for path in self.out.iterdir())

    def kill_once(self, random_moment: random.Random) -> str:
        """One run, killed; when it was, in a word."""
        self.fresh()
        process = self.start()
        if random_moment.random() < 0.5:
            while not self.writing() and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(random_moment.random() * 0.25 * self.seconds)
        else:
            time.sleep(random_moment.random() * 1.1 * self.seconds)
        process.send_signal(signal.SIGKILL)
        ended = process.wait() == 0
        when = "after its end" if ended else "while writing" if self.writing() else "else"
        if (found := digest(self.target)) not in self.allowed:
            raise SystemExit(f"{self.target}: is {found}, neither old nor complete")
        return when

    def rerun(self) -> None:
        """After a kill, all must come right."""
        if self.start(overwrite=True).wait() != 0 or digest(self.target) != self.complete:
            raise SystemExit(f"{self.target}: the rerun did not make it complete")
        if (names := [path.name for path in self.out.iterdir()]) != [self.target.name]:
            raise SystemExit(f"{self.out}: stray files {names}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, check, count."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    moments, counts = random.Random(asked.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_exportable(folder / "base", MODEL)
        make_adapter(folder / "adapter", base, num_layers=8)
        (folder / "old.gguf").write_bytes(b"GGUF of before")
        inputs = [base, folder / "adapter"]
        before = [digest(path) for path in inputs]
        grounds = [Ground(folder, operation) for operation in OPERATIONS]
        for run in range(asked.runs):
            ground = grounds[run % len(grounds)]
            counts[ground.kill_once(moments)] += 1
            ground.rerun()
            if [digest(path) for path in inputs] != before:
                raise SystemExit(f"run {run}: an input changed")
            if run % 50 == 49:
                print(f"{run + 1} kills: {dict(counts)}", flush=True)
    print(f"{asked.runs} kills: {dict(counts)}; inputs unchanged, targets absent, old or complete")


if __name__ == "__main__":
    main()
