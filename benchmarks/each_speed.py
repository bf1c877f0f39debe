"""Many adapters on one base: ``fuse --each`` against a run of ``fuse`` for each of them.

    python benchmarks/each_speed.py --repeat 3
    python benchmarks/each_speed.py --work /big/disk --json each.json

A random Llama-3.2-1B-shaped 4-bit checkpoint, and adapters of rank 16 on the seven linears of all
layers ("all"), or on their q_proj and v_proj ("qv"): eight of the first, two of the first, eight of
the second. Everything is rounded to nearest. Each command is a process of its own; ``--each`` and
the single runs take turns, and what they wrote is compared byte by byte. With a warm page cache the
base's files were read once before; with a cold one they were dropped from it, before each command.

What is read of the base is what the process asked the system for (``rchar``), less what it asks
for in a run with ``--dry-run``, which reads all but the base's weights, and less the adapters'
files once more, which are hashed. Needs 13 GB of free disk.
"""

import argparse
import filecmp
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_checkpoints as checkpoints
from processes import Cost, apart, environment, measure, median, program, work_folder

from mlx_fusekit.tables import Table

SIZE, RANK = "1b", 16
#: Adapter and how many of them.
CASES = (("all", 8), ("all", 2), ("qv", 8))
SINGLE, EACH = "fuse, one after the other", "fuse --each"


@dataclass(frozen=True)
class Sample(Cost):
    """One command; of the single runs all together, and the largest peak."""

    adapter: str
    count: int
    cache: str
    contender: str


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder to work in; checkpoints there are reused")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each contender")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to a file")
    chosen = parser.parse_args()
    samples = []
    with work_folder(chosen.work, keep=False) as work:
        apart(checkpoints.make_all, SIZE, work)
        for adapter, count in CASES:
            apart(checkpoints.make_adapters, SIZE, work, adapter, count, RANK)
        for _ in range(chosen.repeat):
            for cache in ("warm", "cold"):
                for adapter, count in CASES:
                    samples += _measure(work, adapter, count, cache)
    print(_table(samples).markdown())
    if chosen.json:
        report = {
            "environment": environment("mlx-fusekit", "numpy"),
            "samples": [asdict(sample) for sample in samples],
        }
        chosen.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def _measure(work: Path, adapter: str, count: int, cache: str) -> Iterator[Sample]:
    base = checkpoints.model_folder(work, SIZE)
    numbers = range(count)
    adapters = [checkpoints.numbered_folder(work, SIZE, adapter, number) for number in numbers]
    each, single = work / "each", work / "single"
    _remove(each, single)
    single.mkdir()
    try:
        together = _cost(base, adapters, each, ["--each"], cache)
        alone = [_cost(base, [one], single / one.name, [], cache) for one in adapters]
        for one in adapters:
            _compare(each / one.name, single / one.name)
    finally:
        _remove(each, single)
    for contender, cost in ((EACH, together), (SINGLE, _sum(alone))):
        print(f"{count} {adapter:4} {cache} {contender:26} {cost}", file=sys.stderr, flush=True)
        yield Sample(**asdict(cost), adapter=adapter, count=count, cache=cache, contender=contender)


def _cost(base: Path, adapters: Sequence[Path], target: Path, more: list[str], cache: str) -> Cost:
    """What a command takes; of bytes read, those of the base alone."""
    given = [part for adapter in adapters for part in ("--adapter-path", str(adapter))]
    fuse = [program("mlx-fusekit"), "fuse", "--requantize", "nearest", "--model", str(base), *given]
    command = [*fuse, "--save-path", str(target), *more]
    log = base.with_name("run.log")
    planned = measure([*command, "--dry-run"], (base, *adapters), log)
    if cache == "cold":
        for path in base.iterdir():
            _drop(path)
    cost = measure(command, adapters if cache == "cold" else (base, *adapters), log)
    hashed = sum(path.stat().st_size for adapter in adapters for path in adapter.iterdir())
    read = cost.read_bytes - planned.read_bytes - hashed
    return Cost(**{**asdict(cost), "read_bytes": read})


def _drop(path: Path) -> None:
    """Drop a file from the page cache; macOS has no call for that."""
    if hasattr(os, "posix_fadvise"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def _sum(costs: Sequence[Cost]) -> Cost:
    fields = ("wall_seconds", "cpu_seconds", "sync_seconds", "read_bytes")
    sums = {field: sum(getattr(cost, field) for cost in costs) for field in fields}
    peak = max(cost.peak_bytes for cost in costs)
    return Cost(**sums, peak_bytes=peak, load_average=max(cost.load_average for cost in costs))


def _compare(first: Path, second: Path) -> None:
    names = {path.name for folder in (first, second) for path in folder.iterdir()}
    _, different, missing = filecmp.cmpfiles(first, second, names, shallow=False)
    if different or missing:
        raise SystemExit(f"{first} and {second} differ: {[*different, *missing]}")


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _table(samples: Sequence[Sample]) -> Table:
    """Medians of each contender, and their ratios."""
    rows = []
    for cache in ("warm", "cold"):
        for adapter, count in CASES:
            case = (adapter, count, cache)
            found = [s for s in samples if (s.adapter, s.count, s.cache) == case]
            groups = {c: [s for s in found if s.contender == c] for c in (SINGLE, EACH)}
            fields = ("wall_seconds", "cpu_seconds")
            times = {c: [median(g, field) for field in fields] for c, g in groups.items()}
            for contender, group in groups.items():
                wall, cpu = times[contender]
                rows.append(
                    (
                        f"{count} on {'seven linears' if adapter == 'all' else 'q, v'}, {cache}",
                        contender,
                        f"{wall:.1f}",
                        f"{cpu:.1f}",
                        f"{median(group, 'sync_seconds'):.1f}",
                        f"{median(group, 'peak_bytes') / 1e6:.0f}",
                        f"{median(group, 'read_bytes') / 1e9:.2f}",
                        *(
                            f"{of_each / of_single:.2f}" if contender == EACH else ""
                            for of_each, of_single in zip(times[EACH], times[SINGLE], strict=True)
                        ),
                    )
                )
    header = (
        "adapters, page cache",
        "",
        "wall s",
        "CPU s",
        "sync after s",
        "peak MB",
        "of the base read, GB",
        "wall, --each : single",
        "CPU, --each : single",
    )
    return Table("", header, rows, text_columns=2)


if __name__ == "__main__":
    main()
