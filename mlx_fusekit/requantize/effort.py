"""How much work calibrating is, from the shapes of a plan.

Of a matrix with ``C`` columns and ``R`` rows, on ``T`` tokens, in float32 operations (a product and
a sum are two), where modules with the same inputs count as one matrix of all their rows:

* running: ``2 C R`` a token. In a layer from the first that the adapter touches on, the teacher and
  the fused model run the ``T`` tokens; below, the teacher does. Base, teacher and fused model run
  the ``M`` tokens that are measured on through all layers and the head. One of them writes the text
  that nobody gave, a token of which counts as ``WRITTEN``. Of experts, those that a token goes to
  run. Attention's own products and the adapter's are left out: they are small beside these;
* solving: second moments ``C^2 T`` (half a matrix); what the inputs drifted by, the smaller of
  ``4 T C R`` and ``2 T C^2 + 2 C^2 R``; the Cholesky factor ``C^3 / 3``; making the drift good
  ``2 C^2 R``; error feedback ``C^2 R``; the errors of two starts ``2 C^2 R``; coordinate descent
  ``2 C^2 R`` a pass. Of experts each is a matrix, without drift, and what comes to it counts for
  all experts together too;
* elementwise: every one of the ``C R`` weights is looked at once a pass, once to be rounded, once
  for each of the three starts, and once for error feedback;
* reading: the base once to be hashed and once to be run, and its merged weights once more.

The number of passes depends on the weights: ``PASSES`` is that of the embedded sample, the mean
over its groups. Starting the programs, which takes seconds, is left out.
"""

import hashlib
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.merging.plan import FusePlan
from mlx_fusekit.texts.sequences import most_held_out

#: How many times its ideal time calibrating takes: 3.6 with a model of 135M, 2.8 with one of 0.5B,
#: on two virtual x86-64 cores.
_OVER_IDEAL = 3.2
#: Of the matrices that this machine is timed with.
_SIDE = 1024
#: Of an element that is looked at.
_ELEMENT_BYTES = 8
#: Passes of coordinate descent over a matrix.
PASSES = 4
#: As many tokens of long texts a token counts that is drawn one after the other, in batches.
WRITTEN = 2.5
#: Times that a weight is looked at beside those passes.
_LOOKS = 5
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
#: Of mlx-lm's modules that hold many experts; other stacks of matrices run as a whole.
_EXPERTS = re.compile(r"\.(switch_\w+|experts)\.")
#: What configurations call the number of experts that a token goes to.
_USED = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
#: Modules of Llama and Qwen that have the same inputs, by what they are called together.
_TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}


@dataclass(frozen=True)
class Effort:
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

    def __sub__(self, other: "Effort") -> "Effort":
        pairs = zip(self.as_list(), other.as_list(), strict=True)
        return Effort(*(own - taken for own, taken in pairs))


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        name: of the machine.
        running: float32 operations of a running model's products.
        solving: float32 operations of NumPy's products.
        memory: bytes copied in memory, read and written.
        reading: bytes read of files, and hashed.
    """

    name: str
    running: float
    solving: float
    memory: float
    reading: float

    @classmethod
    def stated(cls, text: str) -> "Rates":
        """Of a machine that somebody describes.

        Args:
            text: ``NAME,RUN,SOLVE,MEMORY,READ``: TFLOPS of float32 products where models run and
                where NumPy runs, GB/s of memory, and GB/s of files.

        Raises:
            ValueError: for anything else.
        """
        name, *rates = text.split(",")
        run, solve, memory, read = (float(rate) for rate in rates)
        return cls(name, run * 1e12, solve * 1e12, memory * 1e9, read * 1e9)

    def ideal(self, work: Effort) -> npt.NDArray[np.float64]:
        """Seconds of each kind, and layers."""
        elements = _ELEMENT_BYTES * work.elements / self.memory
        running, solving = work.running / self.running, work.solving / self.solving
        return np.array([running, solving, elements, work.read_bytes / self.reading, work.layers])


def shapes_of(plan: FusePlan) -> dict[str, Any]:
    """What :func:`work_of` reads of a plan, as JSON holds it.

    Returns:
        ``solved``: layer (None outside), columns, rows and experts of each group of merged modules;
        ``used``: experts that a token goes to; ``layers``: weights in each layer that it meets;
        ``trunk``: of those outside, a tied head counting once; ``bytes``: of the base and of its
        merged weights.
    """
    groups: dict[tuple[int | None, int, int, str], int] = defaultdict(int)
    merged = 0
    for step in plan.requantized:
        parent, _, leaf = step.module.rpartition(".")
        experts, rows, columns = step.shape
        name = f"{parent}.{_TOGETHER.get(leaf, leaf)}"
        groups[layer_of(f"{step.module}."), columns, experts, name] += rows
        merged += sum(source.nbytes for source in step.sources.values())
    used = stated(plan.base.config, _USED) or 1
    layers, trunk = _weights(plan.base, used)
    return {
        "solved": [
            [layer, columns, rows, experts] for (layer, columns, experts, _), rows in groups.items()
        ],
        "used": used,
        "layers": layers,
        "trunk": trunk,
        "bytes": plan.base_bytes,
        "merged_bytes": merged,
    }


def work_of(
    shapes: dict[str, Any], tokens: int, passes: float = PASSES, written: int = 0
) -> Effort:
    """The work of calibrating.

    Args:
        shapes: as :func:`shapes_of` gives them.
        tokens: to calibrate on.
        passes: of coordinate descent.
        written: tokens that the models write themselves.
    """
    held_out = most_held_out(tokens)
    solved: list[list[int]] = [group[1:] for group in shapes["solved"]]
    touched = [layer for layer, *_ in shapes["solved"] if layer is not None]
    first = min(touched, default=0)
    whole = sum(shapes["layers"]) + shapes["trunk"]
    running = 2.0 * (3 * held_out + WRITTEN * written) * whole
    for layer, weights in enumerate(shapes["layers"]):
        running += 2.0 * weights * tokens * (2 if layer >= first else 1)
    elements = sum(map(math.prod, solved))
    return Effort(
        running=running,
        solving=sum(_solving(group, tokens, passes, shapes["used"]) for group in solved),
        elements=elements * (passes + _LOOKS),
        read_bytes=2.0 * shapes["bytes"] + shapes["merged_bytes"],
        layers=len(set(touched)),
    )


def estimated_seconds(plan: FusePlan, tokens: int, written: int) -> float:
    """About how long calibrating takes on this machine, which is timed for that.

    Args:
        plan: the fuse.
        tokens: to calibrate on.
        written: tokens that the models write themselves.
    """
    *ideal, _ = measured_rates().ideal(work_of(shapes_of(plan), tokens, written=written))
    return _OVER_IDEAL * float(sum(ideal))


def measured_rates() -> Rates:
    """This machine's, with the threads that it gives to this process."""
    left, right = np.ones((_SIDE, _SIDE), np.float32), np.ones((_SIDE, _SIDE), np.float32)
    ours, theirs = mx.array(left), mx.array(right)
    mx.eval(ours, theirs)
    operations, source, block = 2 * _SIDE**3, np.ones(1 << 24, np.float32), bytes(1 << 24)
    target = np.empty_like(source)
    return Rates(
        "this machine",
        running=operations / _best(lambda: mx.eval(ours @ theirs)),
        solving=operations / _best(lambda: left @ right),
        memory=2 * source.nbytes / _best(lambda: np.copyto(target, source)),
        reading=len(block) / _best(lambda: hashlib.sha256(block).digest()),
    )


def _best(work: Callable[[], Any], times: int = 5) -> float:
    """The least seconds of some trials."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _solving(group: Sequence[int], tokens: int, passes: float, used: int) -> float:
    columns, rows, experts = group
    square = float(columns) ** 2
    # Feedback, two starts, and passes over all columns.
    each_row, factor = square * rows * (1 + 2 + 2 * passes), square * columns / 3
    if experts > 1:
        return 2 * square * tokens * min(used, experts) + experts * (factor + each_row)
    drift = min(4.0 * tokens * columns * rows, 2 * square * (tokens + rows))
    targets = 2 * square * rows
    return square * tokens + drift + factor + targets + each_row


def stated(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """What a configuration calls by one of these names, the largest where each layer has its own.

    None where it has no such positive number.
    """
    text = config.get("text_config")
    blocks = (config, text if isinstance(text, dict) else {})
    for found in (block.get(name) for block in blocks for name in names):
        own = found if isinstance(found, list) else [found]
        if own and all(isinstance(number, int) and number > 0 for number in own):
            return int(max(own))
    return None


def _weights(base: BaseModel, used: int) -> tuple[list[int], int]:
    """Logical weights of the matrices in each layer that a token meets, and outside of layers."""
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
        if len(tensor.shape) == 3 and _EXPERTS.search(module):
            size = size // tensor.shape[0] * min(used, tensor.shape[0])
        layer = layer_of(name)
        if layer is None:
            trunk += size
        else:
            layers[layer] += size
    return [layers[index] for index in range(max(layers, default=-1) + 1)], trunk


def layer_of(name: str) -> int | None:
    """The layer that a tensor or module is in, by its name; None outside of layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None
