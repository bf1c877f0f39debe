"""Which adapters a base holds already, as its ``fusekit.json`` tells."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_fusekit.adapters.fitting import is_same_model
from mlx_fusekit.adapters.sources import Sources
from mlx_fusekit.checkpoint.belongings import ADAPTER_CONFIG_NAME
from mlx_fusekit.checkpoint.folder import recipe_of
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME, sha256
from mlx_fusekit.errors import ConfigurationError

#: What is taken over of an entry; another's recipe may hold anything.
_KEPT = ("id", "revision", "weight", "scale", "ignore", "ignored", "sha256")


def held_by(base: Path) -> list[dict[str, Any]]:
    """The adapters fused into a base, the last ones first, as its recipe lists them.

    A base without a recipe, or with one that is not ours, holds none as far as is known.
    """
    recipe = recipe_of(base)
    lists = (recipe.get(key) for key in ("adapters", "earlier_adapters"))
    entries = [entry for found in lists if isinstance(found, list) for entry in found]
    return [
        {key: entry[key] for key in _KEPT if key in entry}
        for entry in entries
        if isinstance(entry, dict)
    ]


def refuse_twice(sources: Sources) -> None:
    """Refuse an adapter that the base holds already; its update would count twice.

    Raises:
        ConfigurationError: naming the adapter.
    """
    held = {
        digest
        for entry in held_by(sources.base.folder)
        if isinstance(digests := entry.get("sha256"), dict)
        for name, digest in digests.items()
        if name != ADAPTER_CONFIG_NAME
    }
    if not held:
        return
    for choice, opened in zip(sources.choices, sources.opened, strict=True):
        weights = (file for file in opened.files if file.name != ADAPTER_CONFIG_NAME)
        if all(sha256(file) in held for file in weights):
            raise ConfigurationError(
                f"--adapter-path {choice.folder.path}: {sources.model.path} holds this adapter "
                f"already ({RECIPE_NAME}), and its update would count twice; give the base it was "
                "trained on as --model, or say --again"
            )


def better_start(sources: Sources) -> Iterator[str]:
    """What to tell where an adapter was trained on what a fused model was made of.

    Such an adapter has not seen what fusing the first one rounded. One that was trained on the
    fused model has, and belongs there.
    """
    recipe = recipe_of(sources.base.folder)
    base = recipe.get("base")
    origin = base.get("id") if isinstance(base, dict) else None
    if not isinstance(origin, str) or is_same_model(origin, sources.model.identity):
        return
    first = [str(entry.get("id")) for entry in held_by(sources.base.folder)]
    for choice, opened in zip(sources.choices, sources.opened, strict=True):
        if opened.trained_on is None or not is_same_model(opened.trained_on, origin):
            continue
        name, here = choice.folder.public_name, sources.model.public_name
        paths = " ".join(f"--adapter-path {path}" for path in [*reversed(first), name])
        yield (
            f"{name} was trained on {origin}, of which {here} was made ({RECIPE_NAME}); "
            f"`mlx-fusekit fuse --model {origin} {paths}` is the better start: it rounds once, "
            "and not what was rounded before"
        )
