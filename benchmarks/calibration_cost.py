"""Time and memory of calibrated re-quantization, by model width and calibration tokens.

Random Llama-shaped 4-bit models of two layers, all seven linears of both touched, on random tokens.
Every case runs in a process of its own, so that its peak memory is its own.

    python benchmarks/calibration_cost.py [--widths 512,1024,2048] [--tokens 2048,8192]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LAYERS = 2
LENGTH = 256
VOCABULARY = 512


def measure(width: int, tokens: int) -> dict[str, float]:
    """Calibrate one model; seconds and bytes."""
    from mlx_fusekit.fusing.fuse import prepare_fuse
    from mlx_fusekit.running.adapted import run_adapted

    with tempfile.TemporaryDirectory() as scratch:
        folder, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        write_model_and_adapter(width, folder, adapter)
        prepared = prepare_fuse(folder, adapter, Path(scratch) / "fused", requantize="nearest")
        teacher = run_adapted(prepared.sources.model, prepared.plan.adapter)
        before = peak_bytes()
        seconds, solving = calibrate(prepared.plan, teacher, tokens)
    weights = LAYERS * (2 * width * width + 2 * width * width // 4 + 3 * width * 7 * width // 2)
    return {
        "width": width,
        "tokens": tokens,
        "weights": weights,
        "solve_seconds_per_layer": solving / LAYERS,
        "run_seconds_per_layer": (seconds - solving) / LAYERS,
        "model_bytes": before,
        "peak_bytes": peak_bytes(),
    }


def write_model_and_adapter(width: int, folder: Path, adapter: Path) -> None:
    """Write a random 4-bit model of a width, and a LoRA adapter of all its linears."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import quantize_model, save_config, save_model

    mx.random.seed(0)
    config = model_config(width)
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    model, config = quantize_model(model, config, 64, 4)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    parameters = {"rank": 8, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(model, LAYERS, parameters)
    adapter.mkdir()
    lora = {
        name: 0.05 * mx.random.normal(value.shape)
        for name, value in tree_flatten(model.parameters())
        if "lora" in name
    }
    mx.save_safetensors(str(adapter / "adapters.safetensors"), lora)
    facts = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": parameters}
    (adapter / "adapter_config.json").write_text(json.dumps(facts))


def model_config(width: int) -> dict[str, Any]:
    """As of a Llama model, with a vocabulary that counts for nothing."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 7 * width // 2,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }


def calibrate(plan: Any, teacher: Any, tokens: int) -> tuple[float, float]:
    """Calibrate on random tokens: seconds in all, and those spent solving."""
    import numpy as np

    from mlx_fusekit.requantize import calibrated, parts, solver
    from mlx_fusekit.texts.sequences import TokenSequence

    ids = np.random.default_rng(0).integers(0, VOCABULARY, (tokens // LENGTH, LENGTH))
    text = [TokenSequence(tuple(map(int, row))) for row in ids]
    spent = {"solve": 0.0}
    with (
        timed(parts, "solve", spent, "solve"),
        timed(solver.Moments, "prepared", spent, "solve"),
        timed(parts, "compensated", spent, "solve"),
    ):
        start = time.perf_counter()
        calibrated.Calibration(plan, teacher, text).run()
        return time.perf_counter() - start, spent["solve"]


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float], key: str) -> Iterator[None]:
    """Add up the time spent in a function."""
    function: Callable[..., Any] = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[key] += time.perf_counter() - start

    setattr(owner, name, run)
    try:
        yield
    finally:
        setattr(owner, name, function)


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Measure every combination and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="512,1024,2048")
    parser.add_argument("--tokens", default="2048,8192")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        width, tokens = map(int, options.case.split(","))
        print(json.dumps(measure(width, tokens)))
        return
    print("| width | tokens | solving, s a layer | running, s a layer | peak memory, MB |")
    print("|---|---|---|---|---|")
    for width in map(int, options.widths.split(",")):
        for tokens in map(int, options.tokens.split(",")):
            command = [sys.executable, __file__, "--case", f"{width},{tokens}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            facts = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {width} | {tokens} | {facts['solve_seconds_per_layer']:.1f} "
                f"| {facts['run_seconds_per_layer']:.1f} | {facts['peak_bytes'] / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
