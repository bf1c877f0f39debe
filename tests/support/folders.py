"""Model folders made into others: as Hugging Face has them, or with other tensors."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx


def as_hugging_face(folder: Path, weights: dict[str, mx.array] | None = None) -> Path:
    """Rewrite the weight file as transformers would: its metadata, and other names if given."""
    path = folder / "model.safetensors"
    weights = weights or mx.load(str(path))
    mx.eval(weights)
    (folder / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})
    return folder


def unstacked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Expert stacks as the one matrix an expert that Hugging Face stores."""
    raw = {}
    for name, value in weights.items():
        if "switch_mlp" not in name:
            raw[name] = value
            continue
        prefix, _, rest = name.partition(".switch_mlp.")
        raw |= {f"{prefix}.experts.{e}.{rest}": value[e] for e in range(value.shape[0])}
    return raw


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """A copy of a model with its tensors changed by ``change(dict)``."""
    shutil.copytree(source, target)
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = mx.load(str(source / "model.safetensors"))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(target / "model.safetensors"), tensors, metadata={"format": "mlx"})
    return target
