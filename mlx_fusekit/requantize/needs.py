"""How much memory calibrating takes: with the whole model in it, or with a layer at a time.

Estimates from headers alone, on the high side. On the CPU backend weights run as float32; the
second moments of inputs are square matrices of a module's columns.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import mlx.core as mx

from mlx_fusekit.adapters.fitting import vocabulary_size
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.figures import size
from mlx_fusekit.machine import memory_bytes
from mlx_fusekit.merging.plan import FusePlan, WeightStep
from mlx_fusekit.requantize.effort import estimated_seconds, layer_of, shapes_of, stated
from mlx_fusekit.requantize.moments import BATCHES, MOMENTS_BYTES
from mlx_fusekit.requantize.options import CalibrationNeeds, CalibrationOptions
from mlx_fusekit.requantize.parts import LEAST_ELEMENTS, SHARES, SOLVED_ELEMENTS
from mlx_fusekit.requantize.walk import BATCH_TOKENS
from mlx_fusekit.texts.calibration import GENERAL_SHARE
from mlx_fusekit.texts.sequences import most_held_out
from mlx_fusekit.verifying.parity import LOGIT_BYTES

#: What configurations call the width of hidden states.
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
#: Share of the machine's memory that calibrating may take, where nothing else is said.
MEMORY_SHARE = 0.6
#: Arrays of logits that live at once while models are compared, and what measuring needs beside.
_LOGITS = 9
#: Arrays of hidden states: in teacher and fused model, before a layer and behind it.
_STATES = 6
#: Square matrices of a module's columns that live at once: damped moments, and their factor.
_MATRICES = 2
#: Merged weights that live at once: of each module, and of modules with the same inputs together.
_COPIES = 2
#: Bytes of a weight that is being solved, in all its copies.
_SOLVED_BYTES = 32
#: Bytes of a solved weight of all experts, which wait for each other: at most 8 bits, and scales.
_SOLUTION_BYTES = 1.25
#: Python, MLX, what they have loaded, and what the allocators keep.
_PROGRAM_BYTES = 400 << 20


@dataclass(frozen=True)
class MemoryNeeds:
    """Peak bytes of calibrating a plan.

    Attributes:
        resident: with the whole model in memory.
        streamed: with one layer at a time.
        spilled: so, and with what flows between and into modules on the disk.
        running: of the model by itself, to write text.
    """

    resident: int
    streamed: int
    spilled: int
    running: int


def memory_needs(plan: FusePlan, tokens: int) -> MemoryNeeds:
    """Estimate what calibrating takes.

    Args:
        plan: the fuse.
        tokens: to calibrate on.
    """
    layers, trunk = _sizes(plan.base)
    merged: dict[int | None, int] = defaultdict(int)
    for step in plan.requantized:
        merged[layer_of(step.module)] += int(math.prod(step.shape) * _run_bytes(step))
    shapes, widest = shapes_of(plan), 0
    inputs: dict[int | None, int] = defaultdict(int)
    for layer, columns, _, experts in shapes["solved"]:
        # A token's inputs are there once for each expert that it goes to.
        width = columns * (min(shapes["used"], experts) if experts > 1 else 1)
        inputs[layer] += width
        widest = max(widest, width)
    narrowest = min((columns for _, columns, *_ in shapes["solved"]), default=0)
    hidden = stated(plan.base.config, _HIDDEN) or narrowest
    states = 4 * (tokens + most_held_out(tokens)) * _STATES * hidden
    # Of a layer that runs as the teacher's: all that its modules are called with.
    noted = 4 * tokens * max(inputs.values(), default=0)
    # Of its modules one group after the other: what it is called with in both models.
    called = 8 * tokens * widest
    solving = max((_solved_bytes(*group[1:]) for group in shapes["solved"]), default=0)
    # It runs as the teacher's, and then as the fused model's.
    one = max((*layers.values(), *merged.values()), default=0)
    whole = sum(layers.values()) + sum(trunk)
    logits = 4 * (vocabulary_size(plan.base) or 0) * most_held_out(tokens)
    measuring = _LOGITS * min(LOGIT_BYTES, logits)
    walking = max(noted, called + solving) + states
    share = 8 * _COPIES * min(tokens, BATCHES * BATCH_TOKENS) * widest
    beside = plan.computed_bytes // max(len(layers), 1) + _PROGRAM_BYTES
    trunk_bytes = _at_once(trunk) + measuring
    return MemoryNeeds(
        resident=whole + max(merged.values(), default=0) + max(measuring, walking) + _PROGRAM_BYTES,
        streamed=max(one + walking, trunk_bytes + states) + beside,
        spilled=max(one + max(solving, share), trunk_bytes) + beside,
        running=whole + _PROGRAM_BYTES,
    )


def _solved_bytes(columns: int, rows: int, experts: int) -> int:
    """Of matrices that have the same inputs while they are solved."""
    merged, square = columns * rows, columns**2
    shares = SHARES if experts == 1 else 1
    at_once = min(max(merged // shares, LEAST_ELEMENTS), SOLVED_ELEMENTS, merged)
    one = 4 * (_MATRICES * square + _COPIES * merged) + _SOLVED_BYTES * at_once
    if experts == 1:
        return one + 4 * min(merged, square)  # the drift
    moments = min(4 * square * (experts + 1), max(MOMENTS_BYTES, 8 * square))
    return one + moments + int(_SOLUTION_BYTES * experts * merged)


def streams(plan: FusePlan, options: CalibrationOptions) -> bool:
    """Whether a layer at a time is to be in memory, since the model does not fit as a whole.

    Raises:
        ConfigurationError: where not even that fits what the user allows.
    """
    needs = memory_needs(plan, options.tokens)
    allowed = allowed_bytes(options)
    if needs.resident <= allowed:
        return False
    if options.memory is not None and needs.spilled > allowed:
        raise ConfigurationError(
            f"--memory {size(options.memory)}: calibrating takes about {size(needs.spilled)}, a "
            "layer at a time; allow that, or say --requantize nearest"
        )
    return True


def spills(plan: FusePlan, options: CalibrationOptions) -> bool:
    """Whether what flows between and into modules is to wait on the disk."""
    return streams(plan, options) and (
        memory_needs(plan, options.tokens).streamed > allowed_bytes(options)
    )


def calibration_needs(plan: FusePlan, options: CalibrationOptions, data: bool) -> CalibrationNeeds:
    """What calibrating takes; times this machine for that, for less than a second.

    Args:
        plan: the fuse.
        options: of calibrating.
        data: whether there is text of the task, which need not be written then.

    Raises:
        ConfigurationError: as :func:`streams`.
    """
    needs, streamed = memory_needs(plan, options.tokens), streams(plan, options)
    allowed, peak, written = allowed_bytes(options), needs.resident, 0
    if streamed:
        peak = needs.spilled if needs.streamed > allowed else needs.streamed
    if needs.running <= allowed:
        # The whole model writes the text.
        peak = max(peak, needs.running)
        all_of_it = options.tokens + most_held_out(options.tokens)
        written = round(GENERAL_SHARE * options.tokens) if data else all_of_it
    return CalibrationNeeds(peak, streamed, estimated_seconds(plan, options.tokens, written))


def allowed_bytes(options: CalibrationOptions) -> int:
    """Memory that calibrating may take."""
    return int(MEMORY_SHARE * memory_bytes()) if options.memory is None else options.memory


def _sizes(base: BaseModel) -> tuple[dict[int | None, int], list[int]]:
    """Bytes of each layer's weights as they run, and of each tensor outside of layers."""
    layers: dict[int | None, int] = defaultdict(int)
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
        layer = layer_of(name)
        if layer is None:
            trunk.append(nbytes)
        else:
            layers[layer] += nbytes
    return layers, trunk


def _at_once(trunk: list[int]) -> int:
    """Bytes outside of layers that are in memory together: embeddings or a head, not both."""
    largest, second = sorted((*trunk, 0), reverse=True)[:2]
    return sum(trunk) - (second if second == largest else 0)


def _run_bytes(step: WeightStep) -> float:
    """Of one weight of a fused module as it runs."""
    if mx.default_device().type == mx.cpu or step.target_spec is None:
        return 4
    return step.target_spec.bits / 8 + 0.5
