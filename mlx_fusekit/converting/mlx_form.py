"""An adapter in mlx-lm's form.

A linear's ``lora_a`` is ``[columns, rank]`` and its ``lora_b`` ``[rank, rows]``; an embedding's
``[rows, rank]`` and ``[rank, columns]``; of stacked experts ``[experts, rank, columns]`` and
``[experts, rows, rank]``. mlx-lm takes one scale and one rank for all. Source: ``tuner/lora.py``,
``tuner/dora.py`` and ``tuner/utils.py`` of mlx-lm 0.32.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.updates import Adapter
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.belongings import ADAPTER_WEIGHTS
from mlx_fusekit.checkpoint.mlx_lm import adapted_modules, embedding_modules
from mlx_fusekit.converting.files import AdapterFiles, values_of
from mlx_fusekit.converting.full_rank import as_low_rank
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.floats import Float32

_IN_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


def mlx_lm_files(
    adapter: Adapter, base: BaseModel, *, scale: float, trained_on: str | None
) -> AdapterFiles:
    """The folder of an adapter.

    Args:
        adapter: its updates without the scale.
        base: what it was bound to.
        scale: of all updates.
        trained_on: the base's name.

    Raises:
        AdapterError: for what mlx-lm cannot hold.
    """
    found = as_low_rank(adapter, base, scale)
    updates, notes = found.updates, found.notes
    rank = max((update.rank for update in updates.values()), default=0)
    embeddings = embedding_modules(base.config)
    tensors: dict[str, Float32] = {}
    for module, update in updates.items():
        wide = _of_rank(update, rank)
        tensors |= _matrices(module, wide, is_embedding=module in embeddings)
    for name, whole in found.parameters.items():
        module, _, leaf = name.rpartition(".")
        inner = f"{module}.linear.{leaf}" if module in updates else name
        tensors[inner] = values_of(whole.tensor)
    config = _config(updates, base, rank, scale)
    if found.parameters:
        notes += (
            f"{', '.join(found.parameters)}: written as a whole, as it was saved; mlx-lm since "
            "0.32 loads no LoRA adapter that has more than matrices, so fuse this one to run it",
        )
    if trained_on is not None:
        config["model"] = trained_on
    return AdapterFiles(ADAPTER_WEIGHTS, tensors, config, notes)


def _of_rank(update: LowRankUpdate, rank: int) -> LowRankUpdate:
    """The same update at a larger rank: mlx-lm has one for all modules."""
    more = rank - update.rank
    up = np.pad(update.up, ((0, 0), (0, 0), (0, more)))
    down = np.pad(update.down, ((0, 0), (0, more), (0, 0)))
    return replace(update, up=up, down=down)


def _matrices(module: str, update: LowRankUpdate, *, is_embedding: bool) -> dict[str, Float32]:
    up, down = update.up, update.down
    if len(up) > 1:
        a, b = down, up
    elif is_embedding:
        a, b = up[0], down[0]
    else:
        a, b = down[0].T, up[0].T
    found = {f"{module}.lora_a": a, f"{module}.lora_b": b}
    if update.magnitude is not None:
        found[f"{module}.m"] = update.magnitude
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def _config(
    updates: Mapping[str, LowRankUpdate], base: BaseModel, rank: int, scale: float
) -> dict[str, Any]:
    """Settings with which mlx-lm makes a layer of each of the modules."""
    dora = {module for module, update in updates.items() if update.magnitude is not None}
    if dora and len(dora) < len(updates):
        plain = next(module for module in updates if module not in dora)
        raise AdapterError(
            f"{plain}: is LoRA and {min(dora)} DoRA, and mlx-lm has one for all; fuse the adapter"
        )
    keys = sorted({_key(module) for module in updates})
    layers = _num_layers(updates, base)
    _check_adapted(updates, base, layers, keys)
    return {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }


def _key(module: str) -> str:
    """A module, seen from its layer, or from the model where it is in none."""
    found = _IN_LAYER.search(module)
    return found[2] if found else module


def _num_layers(modules: Collection[str], base: BaseModel) -> int:
    """How many of the last layers have to be adapted; -1 for all."""
    numbers = [int(found[1]) for found in map(_IN_LAYER.search, modules) if found]
    total = base.layer_count
    if not numbers or total is None or max(numbers) >= total:
        return -1
    return total - min(numbers)


def _check_adapted(modules: Collection[str], base: BaseModel, layers: int, keys: list[str]) -> None:
    adapted = adapted_modules(base.config, layers, keys)
    missing = next((m for m in modules if adapted is not None and m not in adapted), None)
    if missing is not None:
        raise AdapterError(
            f"{missing}: mlx-lm has no adapter layer for it; fuse the adapter, or leave it out"
        )
