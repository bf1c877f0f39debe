"""Train the sample's LoRA adapter with mlx-lm's own trainer, and measure exact match."""

import json
import subprocess
import sys
import types
from pathlib import Path
from random import Random

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm import load
from mlx_lm.lora import CONFIG_DEFAULTS, train_model
from mlx_lm.tuner.datasets import load_local_dataset

from mlx_fusekit.texts.data import read_sequences
from mlx_fusekit.verifying.parity import compare
from sample.queries import Split, random_query_of

BASE_NAME = "mlx-fusekit/sample-4bit"
KEYS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
SPLIT_SIZES: dict[Split, int] = {"train": 1500, "valid": 64, "test": 256}


def write_task(folder: Path, rng: Random) -> None:
    """Write the text-to-SQL data as mlx-lm reads it, each question once."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in SPLIT_SIZES.items():
        answers: dict[str, str] = {}
        while len(answers) < size:
            query = random_query_of(split, rng)
            answers.setdefault(query.question(rng), query.sql())
        chats = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in answers.items()
        ]
        write_chats(folder / f"{split}.jsonl", chats)


def write_chats(path: Path, chats: list[list[dict[str, str]]]) -> None:
    """Write one ``{"messages": [...]}`` a line."""
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    path.write_text("".join(lines), encoding="utf-8")


def train_adapter(
    model_folder: Path, data: Path, adapter: Path, iterations: int, learning_rate: float, seed: int
) -> None:
    """Run mlx-lm's LoRA training on the 4-bit model, prompt masked.

    The model trained on is a float32 copy of exactly the 4-bit weights, because MLX's CPU
    backend multiplies quantized matrices tens of times slower than float32 ones.
    """
    model, tokenizer = load(str(model_folder))
    _to_float32(model)
    settings = {
        **CONFIG_DEFAULTS,
        "adapter_path": str(adapter),
        "batch_size": 8,
        "data": str(data),
        "iters": iterations,
        "learning_rate": learning_rate,
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": KEYS},
        "lr_schedule": {
            "name": "cosine_decay",
            "arguments": [learning_rate, iterations, learning_rate / 50],
            "warmup": iterations // 20,
        },
        "mask_prompt": True,
        "model": BASE_NAME,
        "num_layers": len(model.layers),
        "save_every": iterations + 1,
        "seed": seed,
        "steps_per_report": 50,
        "steps_per_eval": iterations,
        "train": True,
    }
    arguments = types.SimpleNamespace(**settings)
    np.random.seed(seed)
    train, valid, _ = load_local_dataset(data, tokenizer, arguments)
    train_model(arguments, model, train, valid)
    _forget_folders(adapter / "adapter_config.json")


def measure(model: Path, adapter: Path | None, data: Path, as_loaded: bool = False) -> float:
    """Exact match of what plain ``mlx_lm.load`` gives.

    Unless ``as_loaded``, the same weights compute in float32, which is much faster on a CPU.
    """
    loaded, tokenizer = load(str(model), adapter_path=str(adapter) if adapter else None)
    if not as_loaded:
        _to_float32(loaded)
    # Of a model beside itself: only the share of exact answers is asked for.
    found = compare(loaded, {"itself": loaded}, read_sequences(data, tokenizer))
    return found["itself"].exact_match or 0.0


def fuse_with_mlx_lm(model: Path, adapter: Path, fused: Path) -> None:
    """Fuse with mlx-lm's command, which re-quantizes to 4 bits by rounding to nearest."""
    paths = ["--model", model, "--adapter-path", adapter, "--save-path", fused]
    command = [sys.executable, "-P", "-m", "mlx_lm", "fuse", *map(str, paths)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _to_float32(model: nn.Module) -> None:
    """Replace quantized layers by float32 ones holding float32(scale) * code + float32(bias)."""
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            continue
        weight = mx.dequantize(
            module.weight,
            module.scales.astype(mx.float32),
            module.biases.astype(mx.float32),
            group_size=module.group_size,
            bits=module.bits,
        )
        rows, columns = weight.shape
        if isinstance(module, nn.QuantizedEmbedding):
            layer: nn.Module = nn.Embedding(rows, columns)
        else:
            layer = nn.Linear(columns, rows, bias=False)
        layer.weight = weight
        layers.append((name, layer))
    model.update_modules(tree_unflatten(layers))
    model.set_dtype(mx.float32)


def _forget_folders(config_file: Path) -> None:
    """Replace this machine's folders, which mlx-lm notes down, by their names in the sample."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.update(adapter_path="adapter", data="sql")
    config_file.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
