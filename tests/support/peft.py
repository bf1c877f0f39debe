"""PEFT's adapter folders, written by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Tensors = dict[str, np.ndarray]
#: What PEFT writes of a plain LoRA, as far as it matters.
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "init_lora_weights": True,
}


def write_peft(
    folder: Path,
    tensors: Mapping[str, Any],
    *,
    file: str = "adapter_model.safetensors",
    prefix: str = "base_model.model.",
    **settings: Any,
) -> Path:
    """An adapter of these tensors, whose names get ``prefix``."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{prefix}{name}": mx.array(value) for name, value in tensors.items()}
    mx.save_safetensors(str(folder / file), arrays)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def random(*shape: int, seed: int = 0, scale: float = 0.05) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def pair(module: str, rows: int, columns: int, rank: int = 4, seed: int = 0) -> dict[str, Any]:
    """A linear's two matrices."""
    return {
        f"{module}.lora_A.weight": random(rank, columns, seed=seed),
        f"{module}.lora_B.weight": random(rows, rank, seed=seed + 1),
    }


def product(tensors: Tensors, module: str, scale: float = 1.0) -> np.ndarray:
    """``scale * B A`` of a module."""
    a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    return scale * b.astype(np.float64) @ a


def as_peft(adapter: Path, folder: Path) -> Path:
    """An mlx-lm LoRA of linears as PEFT would save it; its scale times rank is the alpha."""
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    assert isinstance(tensors, dict)
    parameters = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]
    leaves = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    stored = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        stored[f"{module}.{leaves[leaf]}"] = np.ascontiguousarray(np.array(value).T)
    rank = parameters["rank"]
    return write_peft(folder, stored, r=rank, lora_alpha=parameters["scale"] * rank)
