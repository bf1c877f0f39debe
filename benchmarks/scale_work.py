"""How much work calibrating is, from the shapes of a plan.

Of a matrix with ``C`` columns and ``R`` rows, on ``T`` tokens, in float32 operations (a product and
a sum are two), where modules with the same inputs count as one matrix of all their rows:

* running: ``2 C R`` a token. In a layer from the first that the adapter touches on, the teacher and
  the fused model run the ``T`` tokens; below, the teacher does. Base, teacher and fused model run
  the ``M`` tokens that are measured on through all layers and the head. Attention's own products
  and the adapter's are left out: they are small beside these;
* solving: second moments ``C^2 T`` (half a matrix); what the inputs drifted by, the smaller of
  ``4 T C R`` and ``2 T C^2 + 2 C^2 R``; the Cholesky factor ``C^3 / 3``; making the drift good
  ``2 C^2 R``; error feedback ``C^2 R``; the errors of the three starts ``6 C^2 R``; coordinate
  descent ``2 C^2 R`` a pass;
* elementwise: every one of the ``C R`` weights is looked at once a pass, once to be rounded, once
  for each of the three starts, and once for error feedback;
* reading: the base once to be hashed and once to be run, and its merged weights once more.

The number of passes depends on the weights: ``PASSES`` is that of the embedded sample, the mean
over its groups. Starting the programs, which takes seconds, is left out.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.merging.plan import FusePlan
from mlx_fusekit.texts.sequences import most_held_out

#: Passes of coordinate descent over a matrix.
PASSES = 4
#: Times that a weight is looked at beside those passes.
_LOOKS = 5
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
#: Modules of Llama and Qwen that have the same inputs, by what they are called together.
_TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}


@dataclass(frozen=True)
class Work:
    """What a calibrated fuse has to do.

    Attributes:
        running: operations of models that run.
        solving: operations of matrix products while solving.
        elements: weights looked at one by one, all passes counted.
        read_bytes: of files.
        layers: that are solved.
    """

    running: float
    solving: float
    elements: float
    read_bytes: float
    layers: float

    def as_list(self) -> list[float]:
        """In the order of the attributes."""
        return list(astuple(self))

    def __sub__(self, other: "Work") -> "Work":
        pairs = zip(self.as_list(), other.as_list(), strict=True)
        return Work(*(own - taken for own, taken in pairs))


def shapes_of(plan: FusePlan) -> dict[str, Any]:
    """What :func:`work_of` reads of a plan, as JSON holds it.

    Returns:
        ``solved``: layer (None outside), columns and rows of each group of merged modules;
        ``layers``: weights of the matrices in each layer; ``trunk``: of those outside, a tied head
        counting once; ``bytes``: of the base and of its merged weights.
    """
    groups: dict[tuple[int | None, int, str], int] = defaultdict(int)
    merged = 0
    for step in plan.merged:
        if step.target_spec is None:
            continue
        parent, _, leaf = step.module.rpartition(".")
        experts, rows, columns = step.shape
        name = f"{parent}.{_TOGETHER.get(leaf, leaf)}"
        groups[_layer_of(f"{step.module}."), columns, name] += experts * rows
        merged += sum(source.nbytes for source in step.sources.values())
    layers, trunk = _weights(plan.base)
    return {
        "solved": [[layer, columns, rows] for (layer, columns, _), rows in groups.items()],
        "layers": layers,
        "trunk": trunk,
        "bytes": plan.base_bytes,
        "merged_bytes": merged,
    }


def work_of(shapes: dict[str, Any], tokens: int, passes: float = PASSES) -> Work:
    """The work of calibrating on so many tokens."""
    held_out = most_held_out(tokens)
    solved = [(columns, rows) for _, columns, rows in shapes["solved"]]
    touched = [layer for layer, _, _ in shapes["solved"] if layer is not None]
    first = min(touched, default=0)
    running = 2.0 * 3 * held_out * (sum(shapes["layers"]) + shapes["trunk"])
    for layer, weights in enumerate(shapes["layers"]):
        running += 2.0 * weights * tokens * (2 if layer >= first else 1)
    elements = sum(columns * rows for columns, rows in solved)
    return Work(
        running=running,
        solving=sum(_solving(columns, rows, tokens, passes) for columns, rows in solved),
        elements=elements * (passes + _LOOKS),
        read_bytes=2.0 * shapes["bytes"] + shapes["merged_bytes"],
        layers=len(set(touched)),
    )


def _solving(columns: int, rows: int, tokens: int, passes: float) -> float:
    square = float(columns) ** 2
    drift = min(4.0 * tokens * columns * rows, 2 * square * (tokens + rows))
    each_row = square * rows * (2 + 1 + 6 + 2 * passes)
    return square * tokens + drift + square * columns / 3 + each_row


def repeated(shapes: dict[str, Any], layers: int) -> dict[str, Any]:
    """Shapes of a model of so many layers like the last of this one, all of them solved."""
    last = len(shapes["layers"]) - 1
    one: Sequence[Any] = [group for group in shapes["solved"] if group[0] == last]
    share = shapes["layers"][last] / (sum(shapes["layers"]) + shapes["trunk"])
    count = len({layer for layer, _, _ in shapes["solved"]})
    return {
        "solved": [[layer, *group[1:]] for layer in range(layers) for group in one],
        "layers": [shapes["layers"][last]] * layers,
        "trunk": shapes["trunk"],
        "bytes": round(shapes["bytes"] * (1 + share * (layers - last - 1))),
        "merged_bytes": shapes["merged_bytes"] // count * layers,
    }


def _weights(base: BaseModel) -> tuple[list[int], int]:
    """Logical weights of the matrices in each layer, and outside of layers."""
    layers: dict[int, int] = defaultdict(int)
    trunk, quantized = 0, set(base.quantized_modules)
    for name, tensor in base.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(tensor.shape) < 2:
            continue
        size = math.prod(tensor.shape)
        if module in quantized:
            spec = base.quantization(module)
            assert spec is not None, "a quantized module"
            size = size // tensor.shape[-1] * spec.columns(tensor.shape[-1])
        layer = _layer_of(name)
        if layer is None:
            trunk += size
        else:
            layers[layer] += size
    return [layers[index] for index in range(max(layers, default=-1) + 1)], trunk


def _layer_of(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None
