"""Calibrated fuses, a layer at a time, that are killed, and the same command again.

Whatever the moment of the SIGKILL, the second run must leave the files that an undisturbed run
leaves, byte by byte.
"""

import argparse
import hashlib
import os
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from contenders import Contender, fuse_command, progress, remove
from processes import program
from scale_cases import Subject, streaming_memory
from scale_rows import Facts, Rows

from mlx_fusekit.tables import Table

PART = "kills"
#: What a fuse says on stderr when it goes on from where another one ended.
_GOES_ON = re.compile(r"\bresum|\bgo(?:es|ing) on\b", re.IGNORECASE)


@dataclass(frozen=True)
class Ended:
    """How a fuse ended.

    Attributes:
        code: -9 when it was killed.
        said: on stderr.
    """

    code: int
    seconds: float
    said: str


def measure(rows: Rows, subject: Subject, options: argparse.Namespace) -> None:
    """An undisturbed run, and so many killed ones as have no row yet."""
    rows.folder.mkdir(parents=True, exist_ok=True)
    names = [f"{subject.name}-{number:03}" for number in range(options.runs)]
    missing = [name for name in names if not rows.has(PART, name)]
    if not missing:
        return
    case = subject.case()
    tokens = options.calibration_tokens
    memory = streaming_memory(case.base, case.adapter, tokens)
    ours = (program("mlx-fusekit"), "fuse", "--requantize", "calibrated", "--memory", str(memory))
    given = ("--calibration-tokens", str(tokens)) if tokens else ()
    contender = Contender(subject.name, (*ours, *given, "--calibration", str(case.train)))
    with tempfile.TemporaryDirectory(prefix="work-", dir=rows.folder) as scratch:
        target = Path(scratch).resolve() / "out" / "fused"
        target.parent.mkdir()
        command = fuse_command(contender, case.base, case.adapter, target)
        undisturbed = _run(command)
        _check(undisturbed, command)
        wanted = digest(target)
        for name in missing:
            # With what a killed run may have left beside it.
            remove(target.parent)
            target.parent.mkdir()
            # Of its own seed each, so that a run that is cut off draws the same as one that is not.
            moment = random.Random(f"{options.seed}/{name}").uniform(0, undisturbed.seconds)
            facts = _killed(command, target, moment)
            facts["same"] = facts.pop("digest") == wanted
            rows.keep(PART, name, {"subject": subject.name, "whole": undisturbed.seconds, **facts})
            progress(f"{name}: killed after {moment:.1f} s, {facts}")


def _killed(command: Sequence[str], target: Path, moment: float) -> Facts:
    """Kill a run after so many seconds, and run it again unless it had made its folder."""
    first = _run(command, kill_after=moment)
    facts: Facts = {"moment": moment, "killed": first.code < 0, "complete_before": target.exists()}
    if not target.exists():
        again = _run(command)
        _check(again, command)
        facts |= {"again_seconds": again.seconds, "went_on": bool(_GOES_ON.search(again.said))}
    left = sorted(path.name for path in target.parent.iterdir() if path != target)
    return {**facts, "digest": digest(target), "left_behind": left}


def _run(command: Sequence[str], kill_after: float | None = None) -> Ended:
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        text=True,
    )
    try:
        _, said = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    return Ended(process.returncode, time.perf_counter() - start, said)


def _check(ended: Ended, command: Sequence[str]) -> None:
    if ended.code != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {ended.code}:\n{ended.said[-4000:]}")


def digest(folder: Path, pattern: str = "*") -> str:
    """SHA-256 of the names and contents of all files in a folder, or of those of a pattern."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        if path.is_file():
            found.update(f"{path.relative_to(folder)}\0".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def table(rows: Iterable[Facts]) -> Table:
    """How many kills there were by what came of them."""
    by_subject: dict[str, list[Facts]] = {}
    for row in rows:
        by_subject.setdefault(row["subject"], []).append(row)
    cells = []
    for name, found in by_subject.items():
        again = [row for row in found if "again_seconds" in row]
        went_on = [row for row in again if row["went_on"]]
        saved = [row["whole"] - row["again_seconds"] for row in went_on]
        counts = (
            sum(row["killed"] for row in found),
            len(again),
            len(went_on),
            sum(row["same"] for row in found),
            sum(bool(row["left_behind"]) for row in found),
        )
        mean = f"{sum(saved) / len(saved):.1f}" if saved else ""
        cells.append((name, f"{found[0]['whole']:.1f}", *map(str, counts), mean))
    header = ("", "undisturbed, s", "killed", "run again", "went on", "same bytes")
    header = (*header, "left something else", "seconds saved by going on, mean")
    return Table("", header, cells)
