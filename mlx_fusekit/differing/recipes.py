"""What ``fusekit.json`` beside a model says that went into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fusekit.checkpoint.folder import optional_json
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME
from mlx_fusekit.errors import CheckpointError


def made_of(folder: Path) -> Mapping[str, Any] | None:
    """Base, adapters with their digests, and how they were fused; None where nothing says so."""
    try:
        recipe = optional_json(folder, RECIPE_NAME) or {}
    except CheckpointError:
        return None
    base, adapters = recipe.get("base"), recipe.get("adapters")
    if not isinstance(base, dict) or not isinstance(adapters, list):
        return None
    listed = [adapter for adapter in adapters if isinstance(adapter, dict)]
    return {
        "base": base.get("id"),
        "adapters": [
            {key: adapter.get(key) for key in ("id", "weight", "sha256")} for adapter in listed
        ],
        "requantize": recipe.get("requantize"),
        "combine": recipe.get("combine"),
    }


def in_words(recipe: Mapping[str, Any]) -> str:
    """What went in, for people."""
    names = [str(adapter["id"]) for adapter in recipe["adapters"]]
    how = recipe["requantize"]
    end = f", {how}" if isinstance(how, str) else ""
    return f"{recipe['base']} with {', '.join(names) or 'no adapter'}{end}"
