"""How much memory calibrating takes: with the whole model in it, or with a layer at a time.

Estimates from headers alone, on the high side. On the CPU backend weights run as float32; the
second moments of inputs are square matrices of a module's columns.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import mlx.core as mx

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.figures import size
from mlx_fusekit.machine import memory_bytes
from mlx_fusekit.merging.plan import FusePlan, WeightStep
from mlx_fusekit.requantize.options import CalibrationOptions
from mlx_fusekit.texts.sequences import most_held_out
from mlx_fusekit.verifying.parity import LOGIT_BYTES

#: Share of the machine's memory that calibrating may take, where nothing else is said.
MEMORY_SHARE = 0.6
#: Arrays of logits that live at once while models are compared.
_LOGITS = 5
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
#: Bytes a square of columns, of all copies of the moments that live at once: the damped ones, their
#: factor, and the drift or what prepares a factor.
_MOMENT_BYTES = 12
#: Weights that are solved at once at most, and bytes of each in all its copies.
_SOLVED_AT_ONCE, _SOLVED_BYTES = 1 << 24, 24
#: Python, MLX and what they have loaded.
_PROGRAM_BYTES = 300 << 20


@dataclass(frozen=True)
class MemoryNeeds:
    """Peak bytes of calibrating a plan.

    Attributes:
        resident: with the whole model in memory.
        streamed: with one layer at a time.
        running: of the model by itself, to write text.
    """

    resident: int
    streamed: int
    running: int


def memory_needs(plan: FusePlan, tokens: int) -> MemoryNeeds:
    """Estimate what calibrating takes.

    Args:
        plan: the fuse.
        tokens: to calibrate on.
    """
    layers, trunk = _sizes(plan.base)
    steps = [step for step in plan.merged if step.target_spec is not None]
    merged: dict[str, int] = defaultdict(int)
    inputs: dict[str, set[int]] = defaultdict(set)
    for step in steps:
        merged[_layer_of(step.module)] += int(math.prod(step.shape) * _run_bytes(step))
        inputs[_layer_of(step.module)].add(step.shape[2])
    columns = max((step.shape[2] for step in steps), default=0)
    # What a layer's groups of modules are called with, about twice each width.
    widths = 2 * max((sum(widths) for widths in inputs.values()), default=0)
    states = 4 * (tokens + most_held_out(tokens)) * widths
    largest = max((step.shape[1] * step.shape[2] for step in steps), default=0)
    solving = _MOMENT_BYTES * columns**2 + _SOLVED_BYTES * min(largest, _SOLVED_AT_ONCE)
    fixed = solving + states + plan.computed_bytes + _PROGRAM_BYTES
    one = max(layers.values(), default=0) * 2 + max(merged.values(), default=0)
    whole = sum(layers.values()) + sum(trunk)
    return MemoryNeeds(
        resident=whole + sum(merged.values()) + _LOGITS * LOGIT_BYTES + fixed,
        streamed=max(one, sum(trunk) + _LOGITS * LOGIT_BYTES) + fixed,
        running=whole + _PROGRAM_BYTES,
    )


def streams(plan: FusePlan, options: CalibrationOptions) -> bool:
    """Whether a layer at a time is to be in memory, since the model does not fit as a whole.

    Raises:
        ConfigurationError: where not even that fits what the user allows.
    """
    needs = memory_needs(plan, options.tokens)
    allowed = allowed_bytes(options)
    if needs.resident <= allowed:
        return False
    if options.memory is not None and needs.streamed > allowed:
        raise ConfigurationError(
            f"--memory {size(options.memory)}: calibrating takes about {size(needs.streamed)}, a "
            "layer at a time; allow that, or say --requantize nearest"
        )
    return True


def allowed_bytes(options: CalibrationOptions) -> int:
    """Memory that calibrating may take."""
    return int(MEMORY_SHARE * memory_bytes()) if options.memory is None else options.memory


def _sizes(base: BaseModel) -> tuple[dict[str, int], list[int]]:
    """Bytes of each layer's weights as they run, and of each tensor outside of layers."""
    layers: dict[str, int] = defaultdict(int)
    trunk = [0]
    quantized = set(base.quantized_modules)
    in_float32 = mx.default_device().type == mx.cpu
    for name, tensor in base.tensors.items():
        module, _, leaf = name.rpartition(".")
        nbytes = tensor.nbytes
        if in_float32:
            nbytes = 4 * math.prod(tensor.shape)
            if module in quantized:
                spec = base.quantization(module)
                nbytes = nbytes * 32 // spec.bits if spec and leaf == "weight" else 0
        if layer := _layer_of(name):
            layers[layer] += nbytes
        else:
            trunk.append(nbytes)
    return layers, trunk


def _layer_of(name: str) -> str:
    found = _LAYER.search(name)
    return found[1] if found else ""


def _run_bytes(step: WeightStep) -> float:
    """Of one weight of a fused module as it runs."""
    if mx.default_device().type == mx.cpu or step.target_spec is None:
        return 4
    return step.target_spec.bits / 8 + 0.5
