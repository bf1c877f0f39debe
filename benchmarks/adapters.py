"""Two adapters in one model, and an adapter back out of one, on SmolLM2-135M-Instruct at 4 bits.

    LD_PRELOAD=$(sh scripts/fast_blas.sh) python benchmarks/adapters.py combine
    LD_PRELOAD=$(sh scripts/fast_blas.sh) python benchmarks/adapters.py extract

``combine`` fuses the adapters of the cases ``sql`` and ``style`` of preserve.py, calibrated, by
each way to combine them, and tells what each task lost against its adapter alone. ``extract``
fuses the ``sql`` one, takes an adapter out of the result again, and compares base and that with
base and the first. Both on items that no adapter was trained on.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlx_fusekit import extract, fuse, verify
from mlx_fusekit.cli.output import print_blocks
from mlx_fusekit.figures import nats, share
from mlx_fusekit.tables import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from fetch_smollm2 import fetch
from train_adapter import AdapterFolders, Recipe, ensure_adapter

WAYS = ("sum", "ties", "dare", "dare-ties")
DENSITY = 0.5
RANK = 8


def combined(base: Path, tasks: dict[str, AdapterFolders], work: Path) -> Iterator[list[str]]:
    """A row for each way and task: exact answers and KL from that task's adapter alone."""
    adapters = [folders.adapter for folders in tasks.values()]
    data = [folders.data / "test.jsonl" for folders in tasks.values()]
    for way in WAYS:
        how = {} if way == "sum" else {"density": DENSITY}
        report = fuse(base, adapters, work / way, combine=way, **how)
        found = verify(base, adapters, work / way, data=data, max_tokens=1 << 20)
        assert report.calibration is not None
        for name, task in zip(tasks, found.tasks, strict=True):
            yield [
                way,
                name,
                nats(task.kl_base_mean),
                nats(task.kl_mean),
                share(task.top1_agreement),
                *(share(v) for v in (task.exact_match_base, task.exact_match_fused)),
                share(task.exact_match_alone),
                nats(found.kl_mean),
            ]


def extracted(base: Path, task: AdapterFolders, work: Path) -> Iterator[list[str]]:
    """A row for each fuse and rank: the energy kept, and what base and adapter are worth."""
    data = task.data / "test.jsonl"
    wide = {"dequantize": True, "dtype": "float32"}
    for name, how, ranks in (
        ("float32", wide, (RANK,)),
        ("nearest", {"requantize": "nearest"}, (RANK, 8 * RANK)),
        ("calibrated", {"requantize": "calibrated"}, (RANK, 2 * RANK, 8 * RANK)),
    ):
        fuse(base, task.adapter, work / name, **how)
        direct = verify(base, task.adapter, work / name, data=data, max_tokens=1 << 20)
        yield [name, "the model itself", "", nats(direct.kl_mean), share(direct.exact_match_fused)]
        for rank in ranks:
            target = work / f"{name}-{rank}"
            report = extract(base, work / name, target, rank=rank)
            fuse(base, target, work / f"{target.name}-wide", **wide)
            found = verify(
                base, task.adapter, work / f"{target.name}-wide", data=data, max_tokens=1 << 20
            )
            exact = share(found.exact_match_fused)
            yield [name, f"base + rank {rank}", share(report.energy, 3), nats(found.kl_mean), exact]


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("combine", "extract"))
    asked = parser.parse_args()
    base = fetch().four_bit
    tasks = {task: ensure_adapter(Recipe(task=task)) for task in ("sql", "style")}
    with tempfile.TemporaryDirectory() as scratch:
        if asked.what == "combine":
            header = ("combined by", "task", "KL base", "KL fused", "top-1", "exact: base", "fused")
            header += ("adapter alone", "KL of both from base+both")
            rows = list(combined(base, tasks, Path(scratch)))
            print_blocks([Table("", header, rows, text_columns=2).markdown()])
        else:
            header = ("fused", "judged", "energy", "KL", "exact")
            rows = list(extracted(base, tasks["sql"], Path(scratch)))
            print_blocks([Table("", header, rows, text_columns=2).markdown()])


if __name__ == "__main__":
    main()
