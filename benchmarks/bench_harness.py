"""How far the figures of ``mlx-fusekit bench`` can be trusted, on the embedded sample.

    python benchmarks/bench_harness.py [--case same|slowed|peer|dora] [--runs 20]

same    the same model in two arms: how often the 95 % interval holds 1
slowed  an arm made slower by a known time a token: how often its interval holds the true ratio
peer    prompt and generation speed beside mlx_lm.benchmark's, run in turn
dora    base+LoRA, base+DoRA and a fused model in one run

Prints Markdown.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_fusekit import fuse, samples
from mlx_fusekit.bench.arms import ArmSource
from mlx_fusekit.bench.harness import benchmark_arms, measure
from mlx_fusekit.bench.options import Workload
from mlx_fusekit.bench.report import TIMES, Run
from mlx_fusekit.bench.workload import Shape, random_prompts
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running.loading import run_model

SHAPE = Shape(8, 8)
TRIALS = 10
#: Times added to each call of a model, as shares of what a call takes.
ADDED = (0.05, 0.25)
#: Both arms wait at least so long: in a pause MLX's threads fall asleep, and waking takes time.
PAUSE_SECONDS = 0.005
VOCABULARY = 1024


class Waiting(nn.Module):
    """A model that finishes each call before it returns, and waits a known time after that."""

    def __init__(self, model: nn.Module, seconds: float) -> None:
        super().__init__()
        self.inner = model
        self._seconds = seconds

    def make_cache(self) -> list[Any]:
        """mlx-lm asks the model for its cache."""
        return list(make_prompt_cache(self.inner))

    def __call__(self, *arguments: Any, **options: Any) -> mx.array:
        """Logits."""
        logits = self.inner(*arguments, **options)
        mx.eval(logits)
        end = time.perf_counter() + self._seconds
        while time.perf_counter() < end:
            pass
        return logits


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--runs", type=int, default=20, help="Seeds of same and slowed.")
    options = parser.parse_args()
    for case in options.case or CASES:
        CASES[case](options.runs)


def timed(models: dict[str, nn.Module], seed: int) -> Run:
    """One run, of which the first model is the reference."""
    run = Run(SHAPE, next(iter(models)))
    prompts = random_prompts(SHAPE, VOCABULARY, (), seed)
    measure(run, models, prompts, Workload(trials=TRIALS, seed=seed))
    return run


def same(runs: int) -> None:
    """The same model in two arms."""
    models = {
        name: run_model(LocalFolder(samples.model_path()), memory_share=0).model for name in "ab"
    }
    held = dict.fromkeys(TIMES, 0)
    ratios = {metric: list[float]() for metric in TIMES}
    for seed in range(runs):
        run = timed(models, seed)
        for metric in TIMES:
            found = run.speedups(metric, seed)["b"]
            low, high = found.ci95 or (0, 0)
            held[metric] += low <= 1 <= high
            ratios[metric].append(found.ratio)
    print(f"The same model in two arms, {SHAPE}, {TRIALS} trials, {runs} seeds:\n")
    print("| time | intervals that hold 1 | ratios, least to greatest |\n|---|---|---|")
    for metric in TIMES:
        span = f"{min(ratios[metric]):.4f} to {max(ratios[metric]):.4f}"
        print(f"| {metric} | {held[metric]} of {runs} | {span} |")
    print()


def slowed(runs: int) -> None:
    """An arm that is slower by a known time."""
    model = run_model(LocalFolder(samples.model_path()), memory_share=0).model
    plain = Waiting(model, PAUSE_SECONDS)
    once = timed({"plain": plain}, 0).median("plain", "tpot_seconds") or 0
    print(f"An arm slowed by a known time a call, {SHAPE}, {TRIALS} trials, {runs} seeds:\n")
    print("| added a token | true ratio | median of the ratios found | intervals that hold it |")
    print("|---|---|---|---|")
    for share in ADDED:
        added, held, found, truths = share * once, 0, list[float](), list[float]()
        for seed in range(runs):
            run = timed({"plain": plain, "slowed": Waiting(model, PAUSE_SECONDS + added)}, seed)
            without = run.median("plain", "tpot_seconds") or 0
            truths.append(without / (without + added))
            ratio = run.speedups("tpot_seconds", seed)["slowed"]
            low, high = ratio.ci95 or (0, 0)
            held += low <= truths[-1] <= high
            found.append(ratio.ratio)
        print(
            f"| {1000 * added:.2f} ms | {statistics.median(truths):.4f} | "
            f"{statistics.median(found):.4f} | {held} of {runs} |"
        )
    print()


def peer(runs: int) -> None:
    """mlx_lm.benchmark and ours, in turn."""
    prompt, generation, turns = 64, 64, max(3, runs // 4)
    theirs, ours = list[tuple[float, float]](), list[tuple[float, float]]()
    source = ArmSource("base", "sample", samples.model_path())
    work = Workload((prompt,), (generation,), trials=5, load_trials=0)
    for _ in range(turns):
        done = subprocess.run(
            [
                *(sys.executable, "-P", "-m", "mlx_lm", "benchmark", "--model", str(source.folder)),
                *("-p", str(prompt), "-g", str(generation), "-n", "5"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        line = done.stdout.strip().splitlines()[-1]
        rates = {key: float(value) for key, value in re.findall(r"(\w+)=([\d.]+)", line)}
        # Its clock for generating starts behind the first token, which it counts all the same.
        theirs.append(
            (rates["prompt_tps"], rates["generation_tps"] * (generation - 1) / generation)
        )
        [run] = benchmark_arms([source], work).runs
        ours.append(
            (
                run.median("base", "prompt_tokens_per_second") or 0,
                run.median("base", "generation_tokens_per_second") or 0,
            )
        )
    print(f"Beside mlx_lm.benchmark, -p {prompt} -g {generation} -n 5, {turns} times in turn:\n")
    print(
        "| tokens a second | mlx_lm.benchmark | mlx-fusekit bench | quotient |\n|---|---|---|---|"
    )
    for place, name in enumerate(("prompt", "generation")):
        columns = [[rates[place] for rates in measured] for measured in (theirs, ours)]
        cells = [f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns]
        quotient = statistics.median(columns[1]) / statistics.median(columns[0])
        print(f"| {name} | {cells[0]} | {cells[1]} | {quotient:.3f} |")
    print("\nGeneration of mlx_lm.benchmark is corrected by (g - 1) / g: it divides g tokens by")
    print("the time of the g - 1 that follow the first.\n")


def dora(_: int) -> None:
    """LoRA, DoRA and fused."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = samples.model_path()
        dora_path = dora_adapter(folder / "dora")
        fuse(base, samples.adapter_path(), folder / "fused", requantize="nearest")
        sources = [
            ArmSource("base", "sample", base),
            ArmSource("base+LoRA", "sample", base, samples.adapter_path()),
            ArmSource("base+DoRA", "sample", base, dora_path),
            ArmSource("fused", "fused", folder / "fused"),
        ]
        work = Workload((64,), (32,), trials=TRIALS, load_trials=0)
        report = benchmark_arms(sources, work, reference="base+LoRA")
    run = report.runs[0]
    print(f"LoRA, DoRA and fused, {run.shape}, {TRIALS} trials:\n")
    print("| arm | first token | per token | times as fast as base+LoRA, per token |")
    print("|---|---|---|---|")
    speedups = run.speedups("tpot_seconds", 0)
    for arm in run.arms:
        first, gap = (1000 * (run.median(arm, m) or 0) for m in ("ttft_seconds", "tpot_seconds"))
        ratio = speedups.get(arm)
        low, high = (ratio.ci95 if ratio else None) or (1, 1)
        cell = f"{ratio.ratio:.3f} [{low:.3f}, {high:.3f}]" if ratio else "1"
        print(f"| {arm} | {first:.1f} ms | {gap:.2f} ms | {cell} |")
    print()


def dora_adapter(folder: Path) -> Path:
    """The sample's adapter as a DoRA adapter that computes the same."""
    source = samples.adapter_path()
    folder.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    config["fine_tune_type"] = "dora"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = dict(mx.load(str(source / "adapters.safetensors")))
    model = run_model(LocalFolder(samples.model_path()), memory_share=1).model
    scale = config["lora_parameters"]["scale"]
    for path, module in model.named_modules():
        up, down = tensors.get(f"{path}.lora_b"), tensors.get(f"{path}.lora_a")
        if up is not None and down is not None:
            adapted = module.weight + scale * (down @ up).T
            tensors[f"{path}.m"] = mx.linalg.norm(adapted, axis=1)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    for extra in source.iterdir():
        if not (folder / extra.name).exists():
            shutil.copy(extra, folder)
    return folder


CASES: dict[str, Callable[[int], None]] = {
    "same": same,
    "slowed": slowed,
    "peer": peer,
    "dora": dora,
}

if __name__ == "__main__":
    main()
