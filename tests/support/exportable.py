"""Model folders that can be exported: the embedded sample, and tiny models with its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mlx_fusekit import samples
from support.tiny import LLAMA, make_model

#: Files that make a tokenizer with the sample's vocabulary.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
VOCABULARY = 1024


def copy_sample(target: Path) -> Path:
    """The embedded sample in a folder of its own, to be damaged."""
    shutil.copytree(samples.model_path(), target)
    return target


def make_exportable(folder: Path, config: dict[str, Any] = LLAMA, **how: Any) -> Path:
    """A tiny random model, made as ``tiny.make_model`` does, with the sample's tokenizer."""
    rows = max(config["vocab_size"], VOCABULARY)
    make_model(folder, {**config, "vocab_size": rows}, **how)
    for name in TOKENIZER:
        shutil.copy(samples.model_path() / name, folder)
    return folder


def as_in_file(name: str, weight: Any, heads: int) -> Any:
    """A weight's rows as llama.cpp orders those of Llama's queries and keys: pairs side by side."""
    if not name.endswith(("q_proj", "k_proj")):
        return weight
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
