"""Adapter folders in PEFT's format, written by hand."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Tensors = dict[str, np.ndarray]
PREFIX = "base_model.model."


def save_peft(folder: Path, tensors: Tensors, *, prefix: str = PREFIX, **config: Any) -> Path:
    """Save an adapter as PEFT does; settings are those of a plain LoRA of rank 4, unless named."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": None,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    arrays = {f"{prefix}{name}": mx.array(value) for name, value in tensors.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    return folder


def pair(module: str, rows: int, columns: int, *, rank: int = 4, seed: int = 0) -> Tensors:
    """LoRA's two matrices of a module, both random."""
    draw = np.random.default_rng([seed, len(module), rows])
    return {
        f"{module}.lora_A.weight": _random(draw, rank, columns),
        f"{module}.lora_B.weight": _random(draw, rows, rank),
    }


def product(tensors: Tensors, module: str) -> np.ndarray:
    """``B A`` of a module."""
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def _random(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return draw.normal(0, 0.1, shape).astype(np.float32)
