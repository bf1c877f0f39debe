"""What the model card in a folder says in its front matter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fusekit.checkpoint.belongings import CARD_NAME
from mlx_fusekit.reading import is_file, resolve_inside

_LARGEST_CARD = 10_000_000


def front_matter(folder: Path) -> Mapping[str, Any]:
    """The front matter of ``README.md``; a card that is missing or cannot be read says nothing."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import metadata_load

    path = folder / CARD_NAME
    if not is_file(path) or path.stat().st_size > _LARGEST_CARD:
        return {}
    try:
        resolve_inside(folder, path.name)
        return metadata_load(path) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
