"""Parts of a model for images or sound, told by their names; mlx-lm runs the text model alone."""

import re

from mlx_fusekit.checkpoint.json_text import shown

_TOWERS = re.compile(r"vision|visual|audio|image|speech|multi_modal|mm_projector")


def is_of_another_tower(module: str) -> bool:
    """Whether a module belongs to a part for images or sound."""
    return _TOWERS.search(module) is not None


def why_not_run(tensor: str, module: str) -> str | None:
    """Why a tensor of such a part is refused, and what leaves it out; None for other parts.

    Args:
        tensor: its name in the adapter's file.
        module: path of its module.
    """
    part = next((part for part in module.split(".") if is_of_another_tower(part)), None)
    if part is None:
        return None
    pattern = f"*{re.sub(r'[^A-Za-z0-9_-]', '?', part)}*"
    return (
        f"{shown(tensor)} belongs to a part for images or sound, which mlx-lm does not run; leave "
        f"it out with --ignore '{pattern}'"
    )
