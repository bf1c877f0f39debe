"""What becomes of adapters on SmolLM2-135M-Instruct at 4 bits: combined, taken out again, of PEFT.

    LD_PRELOAD=$(sh scripts/fast_blas.sh) python benchmarks/adapters.py combine
    LD_PRELOAD=$(sh scripts/fast_blas.sh) python benchmarks/adapters.py extract
    LD_PRELOAD=$(sh scripts/fast_blas.sh) python benchmarks/adapters.py peft

``combine`` fuses the adapters of the cases ``sql`` and ``style`` of preserve.py, calibrated, by
each way to combine them, and tells what each task lost against its adapter alone. ``extract``
fuses the ``sql`` one, and the embedded sample's, takes an adapter out of the result again, and
compares base and that with base and the first. ``peft`` compares with the 16-bit model that the
adapter of the case ``peft`` was trained on, and that adapter. All on items that no adapter was
trained on.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from preserve import trained_by_peft

from mlx_fusekit import extract, fuse, samples, verify
from mlx_fusekit.cli.output import print_blocks
from mlx_fusekit.figures import nats, number, share
from mlx_fusekit.tables import Table
from mlx_fusekit.verifying.report import ParityReport

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from fetch_smollm2 import fetch
from train_adapter import AdapterFolders, Recipe, ensure_adapter

WAYS = ("sum", "ties", "dare-ties")
DENSITY = 0.5
#: Of the adapters that are taken out again.
RANK = 8
#: Base and update as they are, without rounding.
EXACT = {"dequantize": True, "dtype": "float32"}


def combined(work: Path) -> Iterator[list[str]]:
    """A row for each way and task: exact answers and KL from that task's adapter alone."""
    base, tasks = fetch().four_bit, {task: _adapter(task) for task in ("sql", "style")}
    adapters = [folders.adapter for folders in tasks.values()]
    data = [folders.data / "test.jsonl" for folders in tasks.values()]
    for way in WAYS:
        how = {"combine": way} if way == "sum" else {"combine": way, "density": DENSITY}
        fuse(base, adapters, work / way, **how)
        found = _judged(base, adapters, work / way, data)
        for name, task in zip(tasks, found.tasks, strict=True):
            yield [
                way,
                name,
                nats(task.kl_base_mean),
                nats(task.kl_mean),
                share(task.top1_agreement),
                share(task.exact_match_alone),
                share(task.exact_match_fused),
                nats(found.kl_mean),
            ]


def extracted(work: Path) -> Iterator[list[str]]:
    """A row for each fuse and rank: what of the difference is kept, and what it is worth."""
    sql = _adapter("sql")
    sample = samples.model_path(), samples.adapter_path(), samples.evaluation_data_path()
    smollm2 = fetch().four_bit, sql.adapter, sql.data / "test.jsonl"
    ways = (
        ("float32", EXACT, (RANK,)),
        ("4 bits, nearest", {"requantize": "nearest"}, (RANK, 2 * RANK)),
        ("4 bits, calibrated", {"requantize": "calibrated"}, (RANK, 2 * RANK, 8 * RANK)),
    )
    for model, (base, adapter, data) in {"sample": sample, "SmolLM2": smollm2}.items():
        for name, how, ranks in ways:
            fused = work / f"{model} {name}"
            fuse(base, adapter, fused, **how)
            direct = _judged(base, adapter, fused, data)
            itself = nats(direct.kl_mean), share(direct.exact_match_fused)
            yield [model, name, "the model itself", "", "", *itself]
            for rank in ranks:
                found = work / f"{fused.name} {rank}"
                report = extract(base, fused, found, rank=rank)
                wide = found.with_name(f"{found.name} wide")
                fuse(base, found, wide, **EXACT)
                parity = _judged(base, adapter, wide, data)
                yield [
                    model,
                    name,
                    f"base + rank {rank}",
                    share(report.energy),
                    number(_distance(adapter, found)),
                    nats(parity.kl_mean),
                    share(parity.exact_match_fused),
                ]


def other_base(work: Path) -> Iterator[list[str]]:
    """A row for each way from an adapter of the 16-bit model to a model of 4 bits."""
    from mlx_lm import convert

    folders, data = fetch(), _adapter("sql").data
    adapter, wide, narrow = trained_by_peft(data), folders.bf16, folders.four_bit

    def converted(target: Path) -> None:
        fuse(wide, adapter, work / "16 bits")
        with contextlib.redirect_stdout(sys.stderr):
            convert(str(work / "16 bits"), str(target), quantize=True, q_bits=4, q_group_size=64)

    ways: dict[str, Callable[[Path], Any]] = {
        "16 bits, fused": lambda target: fuse(wide, adapter, target),
        "16 bits, fused, then `mlx_lm.convert -q`": converted,
        "4 bits + adapter, not rounded": lambda target: fuse(narrow, adapter, target, **EXACT),
        "4 bits, fused, nearest": lambda t: fuse(narrow, adapter, t, requantize="nearest"),
        "4 bits, fused, calibrated": lambda t: fuse(
            narrow, adapter, t, requantize="calibrated", calibration=data / "train.jsonl"
        ),
    }
    for place, (name, make) in enumerate(ways.items()):
        target = work / str(place)
        make(target)
        found = _judged(wide, adapter, target, data / "test.jsonl")
        if place == 0:
            exact, perplexity = found.exact_match_reference, found.perplexity_reference
            yield ["16 bits + adapter", "0", "100.0%", share(exact), number(perplexity)]
        yield [
            name,
            nats(found.kl_mean),
            share(found.top1_agreement),
            share(found.exact_match_fused),
            number(found.perplexity_fused),
        ]


def _adapter(task: str) -> AdapterFolders:
    return ensure_adapter(Recipe(task=task))


def _judged(base: Path, adapters: Any, fused: Path, data: Any) -> ParityReport:
    """On all of the data."""
    return verify(base, adapters, fused, data=data, max_tokens=1 << 20)


def _distance(first: Path, second: Path) -> float:
    """Frobenius norm of the difference of two adapters' updates, relative to the first's."""
    ours, theirs = _updates(first), _updates(second)
    squares = [
        (np.square(update - theirs.get(module, 0)).sum(), np.square(update).sum())
        for module, update in ours.items()
    ]
    others = sum(np.square(theirs[module]).sum() for module in theirs.keys() - ours.keys())
    difference, whole = np.sum(squares, axis=0)
    return float(np.sqrt((difference + others) / whole))


def _updates(adapter: Path) -> dict[str, Any]:
    """Each module's update ``[in, out]`` in float64, of an adapter in mlx-lm's form."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    tensors = {
        name: np.array(value.astype(mx.float32), np.float64)
        for name, value in mx.load(str(adapter / "adapters.safetensors")).items()
    }
    modules = {name.rpartition(".")[0] for name in tensors}
    scale = config["lora_parameters"]["scale"]
    return {m: scale * tensors[f"{m}.lora_a"] @ tensors[f"{m}.lora_b"] for m in modules}


TABLES: dict[str, tuple[Callable[[Path], Iterator[list[str]]], tuple[str, ...], int]] = {
    "combine": (
        combined,
        (
            "combined by",
            "task",
            "KL base",
            "KL fused",
            "top-1",
            "exact: adapter alone",
            "exact: fused",
            "KL from base + both",
        ),
        2,
    ),
    "extract": (
        extracted,
        ("", "fused", "judged", "energy", "off by", "KL", "exact"),
        3,
    ),
    "peft": (other_base, ("", "KL", "top-1", "exact", "ppl"), 1),
}


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=TABLES)
    make, header, text_columns = TABLES[parser.parse_args().what]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in make(Path(scratch)):
            print("; ".join(row), file=sys.stderr, flush=True)
            rows.append(row)
    print_blocks([Table("", header, rows, text_columns).markdown()])


if __name__ == "__main__":
    main()
