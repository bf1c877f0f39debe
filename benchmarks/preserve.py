"""What fusing leaves of a fine-tune: ``mlx_lm.fuse`` and ``mlx-fusekit fuse`` side by side.

    LD_PRELOAD=$(sh scripts/fast_blas.sh) python benchmarks/preserve.py --case sample
    python benchmarks/preserve.py --case sql --base-bits 3 --max-kl 0.001 --json preserve.json

Each contender fuses the same adapter into the same base, in a process of its own, whose time and
peak memory are taken. What it wrote is then read back from disk, run, and compared with base and
adapter unmerged, on items of the adapter's task that no contender saw, and off the task.

Cases: ``sample`` is the model embedded in the package. ``sql`` (a crisp task) and ``style`` are
adapters for SmolLM2-135M-Instruct, trained here at the first run at a learning rate of 1e-4
(mlx-lm's default is 1e-5); their updates are smaller than a quantization step. Their off-task texts
are each other's test items, and "prose": the contents of ``samples.general_data_path()``, simple
English conversations and stories, as plain text without any template. That of ``sample`` is
"general": the same conversations as such, which are of its base's domain.

``peft`` is an adapter of rank 16 for all linears of SmolLM2, of the same questions, that
transformers and PEFT trained on the 16-bit model; `mlx_lm.fuse` gets it in mlx-lm's form.

With ``--base-bits 3`` or ``--mode`` the base is made from SmolLM2's bfloat16 weights, and the
adapter, though trained on the 4-bit base, is applied to it: base and adapter remain what all are
compared with, but may do worse at the task themselves.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
from contenders import Contender, fuse_apart, progress, remove, without_data
from preserve_results import BASE, PEER, TEACHER, Case, Cost, Row, report
from processes import program
from yardsticks import measured, texts_of

import mlx_fusekit
from mlx_fusekit import convert_adapter, samples
from mlx_fusekit.cli.output import print_blocks
from mlx_fusekit.tables import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from fetch_smollm2 import MODEL_NAME, fetch
from packages import build_once, default_cache, locked
from train_adapter import Recipe, ensure_adapter

CASES = ("sample", "sql", "style", "peft")
#: Tasks that mlx-lm trains adapters of.
TASKS = ("sql", "style")


def _print(blocks: Iterable[Table | str], *, markdown: bool) -> None:
    if markdown:
        blocks = (b if isinstance(b, str) else f"\n{b.markdown()}" for b in blocks)
    print_blocks(blocks)
    print(flush=True)


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    other_base = options.base_bits or options.mode
    if other_base and "sample" in (options.case or ()):
        parser.error("the embedded sample has one base: --base-bits and --mode are for SmolLM2's")
    names = options.case or [*TASKS, *(() if other_base else ("sample",))]
    results: list[dict[str, Any]] = []
    environment = _environment(options)
    with _work_folder(options.out) as work:
        cases = [_case(name, options, work) for name in dict.fromkeys(names)]
        for case in cases:
            rows = list(_rows(case, options, work / case.name))
            _print(report(case, rows), markdown=options.markdown)
            results.append(
                {
                    "case": case.name,
                    "base": case.base.name,
                    "adapter": case.adapter.name,
                    "rows": [asdict(row) for row in rows],
                }
            )
            if options.json:
                found = {"environment": environment, "cases": results}
                options.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    if environment["source_sha256"] != _source_digest():
        progress("warning: the source of mlx_fusekit changed meanwhile; its rows may not agree")


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", choices=CASES, action="append", help="repeatable; default: all but peft"
    )
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base-bits", type=int, choices=[3, 4], help="SmolLM2 at so many bits")
    base.add_argument("--mode", choices=["mxfp4"], help="SmolLM2 in this format")
    parser.add_argument("--max-kl", type=float, metavar="X", help="add a row: auto --max-kl X")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a row besides mlx_lm.fuse; repeatable"
    )
    parser.add_argument("--items", type=int, metavar="N", help="test items; default: all")
    parser.add_argument("--calibration-tokens", type=int, metavar="N", help="default: the tool's")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the fused models there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser


@contextmanager
def _work_folder(chosen: Path | None) -> Iterator[Path]:
    """The user's folder, which is kept, or a temporary one."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="preserve-") as scratch:
        yield Path(scratch)


def _case(name: str, options: argparse.Namespace, work: Path) -> Case:
    if name == "sample":
        return Case(
            name,
            samples.model_path(),
            samples.adapter_path(),
            samples.train_data_path(),
            samples.evaluation_data_path(),
            {"general": samples.general_data_path()},
        )
    folders = {task: ensure_adapter(Recipe(task=task)) for task in TASKS}
    task = "sql" if name == "peft" else name
    (other,) = folders.keys() - {task}
    prose = work / "prose.txt"
    prose.write_text(_prose(), "utf-8")
    base = _smollm2(options.base_bits or 4, options.mode or "affine")
    adapter, data = folders[task].adapter, folders[task].data
    converted = None
    if name == "peft":
        adapter = trained_by_peft(data)
        converted = work / "converted"
        remove(converted)
        convert_adapter(base, adapter, converted, "mlx")
    return Case(
        name,
        base,
        adapter,
        data / "train.jsonl",
        data / "test.jsonl",
        {other: folders[other].data / "test.jsonl", "prose": prose},
        converted,
    )


def trained_by_peft(data: Path) -> Path:
    """An adapter of PEFT's, trained on the 16-bit model, made on first use."""
    cache = default_cache()
    target = cache / f"{MODEL_NAME}-sql-peft"
    python = Path(f"{sys.prefix}-peft") / "bin" / "python"
    script = Path(__file__).resolve().parents[1] / "scripts" / "train_peft.py"

    def build(staging: Path) -> None:
        if not python.exists():
            raise SystemExit("the case peft needs PEFT and PyTorch: make .venv-peft/.installed")
        command = [str(python), str(script), str(fetch(cache).bf16), str(data), str(staging)]
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment)

    with locked(cache, target.name):
        build_once(target, build)
    return target


def _smollm2(bits: int, mode: str) -> Path:
    """SmolLM2 in a format of MLX, made on first use."""
    cache = default_cache()
    folders = fetch(cache)
    if (bits, mode) == (4, "affine"):
        return folders.four_bit
    name = f"{MODEL_NAME}-{f'{bits}bit' if mode == 'affine' else mode}"
    settings = {"q_bits": bits, "q_group_size": 64} if mode == "affine" else {"q_mode": mode}

    def build(staging: Path) -> None:
        from mlx_lm import convert

        with contextlib.redirect_stdout(sys.stderr):
            convert(str(folders.bf16), str(staging), quantize=True, dtype="bfloat16", **settings)

    with locked(cache, name):
        build_once(cache / name, build)
    return cache / name


def _prose() -> str:
    """What is said in the package's general text, one item a paragraph."""
    lines = samples.general_data_path().read_text("utf-8").splitlines()
    items = [json.loads(line)["messages"] for line in lines]
    return "\n\n".join(" ".join(said["content"] for said in item) for item in items)


def _rows(case: Case, options: argparse.Namespace, work: Path) -> Iterator[Row]:
    """Fuse everything, then measure one model after the other."""
    work.mkdir(exist_ok=True)
    contenders = [Contender(BASE), *_contenders(case, options)]
    if options.only:
        wanted = {BASE, PEER, *options.only}
        if unknown := wanted - {contender.name for contender in contenders}:
            raise SystemExit(f"--only: no such row: {', '.join(sorted(unknown))}")
        contenders = [contender for contender in contenders if contender.name in wanted]
    dataless = without_data(case.adapter, work / "adapter-without-data")
    costs: dict[str, Cost | None] = {BASE: None}
    fused = {BASE: case.base}
    for place, contender in enumerate(contenders):
        if contender.command:
            adapter = case.adapter if contender.data else dataless
            if contender.name == PEER:
                adapter = case.converted or adapter
            fused[contender.name] = work / f"fused-{place}"
            costs[contender.name] = cost = fuse_apart(
                contender, case.base, adapter, fused[contender.name]
            )
            progress(
                f"{case.name}: {contender.name}: {cost.wall_seconds:.1f} s,"
                f" {cost.peak_bytes / 1e6:.0f} MB, load {cost.load_average:.1f}"
            )
    with tempfile.TemporaryDirectory(prefix="teacher-", dir=work) as scratch:
        texts = texts_of(case, options.items, Path(scratch))
        yield Row(TEACHER, {name: text.teacher for name, text in texts.items()}, 1.0)
        for name, folder in fused.items():
            start = time.perf_counter()
            measures = measured(folder, texts)
            progress(f"{case.name}: {name}: measured in {time.perf_counter() - start:.1f} s")
            size = _weight_bytes(folder) / _weight_bytes(case.base)
            yield Row(name, measures, size, costs[name])


def _contenders(case: Case, options: argparse.Namespace) -> Iterator[Contender]:
    """The ways to fuse; ``mlx_lm.fuse`` first."""
    ours = (program("mlx-fusekit"), "fuse", "--json", "--seed", str(options.seed))
    tokens: tuple[str, ...] = ()
    if options.calibration_tokens:
        tokens = ("--calibration-tokens", str(options.calibration_tokens))
    calibrated = (*ours, *tokens, "--requantize", "calibrated")
    data = ("--calibration", str(case.train))
    yield Contender(PEER, (program("mlx_lm.fuse"),))
    yield Contender("nearest", (*ours, "--requantize", "nearest"))
    yield Contender("calibrated", (*calibrated, *data), data=True)
    yield Contender("calibrated, no data", calibrated)
    yield Contender("8 bits, nearest", (*ours, "--requantize", "nearest", "--bits", "8"))
    if options.max_kl is not None:
        bound = ("--max-kl", str(options.max_kl))
        auto = (*ours, *tokens, "--requantize", "auto", *bound, *data)
        yield Contender(f"auto, KL {options.max_kl:g}", auto, data=True)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _environment(options: argparse.Namespace) -> dict[str, object]:
    packages = ("mlx-fusekit", "mlx", "mlx-lm", "numpy")
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": str(mx.default_device()),
        "preload": os.environ.get("LD_PRELOAD", ""),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "source_sha256": _source_digest(),
        "seed": options.seed,
        "only": options.only,
        "items": options.items,
        "calibration_tokens": options.calibration_tokens,
    }


def _source_digest() -> str:
    """Of the package's modules, which each fuse imports anew."""
    package = Path(mlx_fusekit.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
