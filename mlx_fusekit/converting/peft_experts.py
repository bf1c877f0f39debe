"""MLX's stacked experts as the parameters that transformers 5 keeps them in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.errors import AdapterError

_STACKED = re.compile(r"(.+)\.(?:switch_mlp|switch_glu|experts)\.(gate_proj|up_proj|down_proj)")
#: Updates by the parameter they are of, ``gate_up_proj`` before ``down_proj``.
ExpertParts: TypeAlias = Mapping[str, LowRankUpdate]


@dataclass(frozen=True)
class ExpertPlace:
    """Where a stacked matrix belongs.

    Attributes:
        block: path of the module that has the experts.
        projection: ``gate_proj``, ``up_proj`` or ``down_proj``.
    """

    block: str
    projection: str


def experts_of(module: str, base: BaseModel) -> ExpertPlace | None:
    """The place of a module; None of what is no stack of experts."""
    found = _STACKED.fullmatch(module)
    weight = base.tensors.get(f"{module}.weight")
    if found is None or weight is None or len(weight.shape) != 3:
        return None
    return ExpertPlace(found[1], found[2])


def joined(parts: Mapping[str, LowRankUpdate], base: BaseModel, block: str) -> ExpertParts:
    """A layer's updates, gate and up as one.

    transformers keeps gate and up in one parameter, whose rows are the gate's and then the up's.
    Where the two have matrices of their own, one of the sum of their ranks does what they do.

    Args:
        parts: by projection.
        base: that has the experts.
        block: the module that has them, for messages.

    Raises:
        AdapterError: of models that mix the rows of gate and up.
    """
    if base.config.get("model_type") == "gpt_oss":
        raise AdapterError(
            f"{block}: experts of gpt_oss, whose gate and up transformers keeps in turns, are not "
            "written for PEFT; fuse the adapter"
        )
    found = {}
    gate, up = parts.get("gate_proj"), parts.get("up_proj")
    if gate is not None or up is not None:
        found["gate_up_proj"] = _gate_and_up(gate, up)
    if "down_proj" in parts:
        found["down_proj"] = parts["down_proj"]
    return found


def _gate_and_up(gate: LowRankUpdate | None, up: LowRankUpdate | None) -> LowRankUpdate:
    """Their rows below each other."""
    one = gate if gate is not None else up
    assert one is not None, "one of the two is there"
    nothing = np.zeros_like(one.up)
    if gate is None or up is None or np.array_equal(gate.down, up.down):
        rows = [nothing if part is None else part.up for part in (gate, up)]
        return LowRankUpdate(np.concatenate(rows, axis=1), one.down)
    experts, rows_of_one, _ = gate.up.shape
    both = np.zeros((experts, 2 * rows_of_one, gate.rank + up.rank), np.float32)
    both[:, :rows_of_one, : gate.rank] = gate.up
    both[:, rows_of_one:, gate.rank :] = up.up
    return LowRankUpdate(both, np.concatenate([gate.down, up.down], axis=1))
