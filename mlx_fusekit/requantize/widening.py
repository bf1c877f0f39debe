"""Which modules get wider bits, so that the fused model comes close enough to its teacher.

What each group of modules costs is measured: the KL divergence of the teacher with only this group
rounded to nearest, times the share of that error that calibration left. At another width a cost is
taken to be as the square of the grid's step, and the bits go where they gain most for a byte.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_fusekit.formats.floats import STORAGE
from mlx_fusekit.formats.specs import AFFINE_BITS, CODEBOOK_MODES
from mlx_fusekit.merging.merged import Weight
from mlx_fusekit.merging.plan import FusePlan, WeightStep
from mlx_fusekit.progress import Progress
from mlx_fusekit.requantize.grids import nearest_of
from mlx_fusekit.running.model import RunningModel
from mlx_fusekit.running.swapped import FusedModules
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.parity import Variant, compare

#: Share of the whole that a group counts for at least: single measurements can be negative.
_LEAST_SHARE = 1e-3
#: The least bits that a budget gives a module.
NARROWEST = 2
#: Tokens that the groups are measured on.
_TOKENS = 512


@dataclass(frozen=True)
class Widths:
    """Bits of modules.

    Attributes:
        bits: by module path, of those that get another width than planned.
        predicted_kl: what the estimates promise.
        added_bytes: against the plan without them.
    """

    bits: Mapping[str, int]
    predicted_kl: float
    added_bytes: int


def next_width(bits: int) -> int | None:
    """The next wider affine width."""
    return next((wider for wider in AFFINE_BITS if wider > bits), None)


def stored_bytes(step: WeightStep, bits: int) -> int:
    """Size of a step's weight when it has this width."""
    assert step.target_spec is not None, "only quantized modules have a width"
    own, elements = step.target_spec.with_bits(bits), math.prod(step.shape)
    if own.mode in CODEBOOK_MODES:
        return elements * bits // 8 + elements // own.group_size
    itemsize = STORAGE[step.dtype].itemsize if step.dtype != "U8" else 2
    return elements * bits // 8 + 2 * itemsize * elements // own.group_size


def measured_costs(
    teacher: RunningModel,
    steps: Mapping[str, WeightStep],
    groups: Sequence[tuple[str, ...]],
    left: Mapping[str, float],
    sequences: Sequence[TokenSequence],
    progress: Progress | None = None,
) -> dict[tuple[str, ...], float]:
    """What each group of modules adds to the KL divergence, up to a common factor.

    Args:
        teacher: base and adapter.
        steps: by module path.
        groups: of paths.
        left: of each module's error when rounded to nearest, the share that calibration left.
        sequences: to measure on.
        progress: called with groups done and groups in all.
    """
    some = _some(sequences)
    costs = {}
    for place, group in enumerate(groups):
        rounded = FusedModules(teacher)
        for path in group:
            weight = Weight.open(steps[path])
            experts = []
            for expert in range(steps[path].shape[0]):
                matrix = weight.matrix(expert)
                experts.append(matrix.finished(nearest_of(matrix.values, matrix.target)))
            rounded.put(path, experts, matrix.target.spec)
        variant = Variant(teacher.model, rounded.active)
        kl = compare(teacher.model, {"rounded": variant}, some)["rounded"].kl_mean
        costs[group] = max(kl, 0.0) * float(np.mean([left[path] for path in group]))
        if progress is not None:
            progress(place + 1, len(groups))
    # Single measurements can come out at nothing, and nothing would never be widened.
    least = _LEAST_SHARE * max(sum(costs.values()), 1e-12)
    return {group: max(cost, least) for group, cost in costs.items()}


def _some(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    chosen: list[TokenSequence] = []
    for sequence in sequences:
        if chosen and sum(len(s.tokens) for s in chosen) + len(sequence.tokens) > _TOKENS:
            break
        chosen.append(sequence)
    return chosen


def choose_widths(
    costs: Mapping[tuple[str, ...], float],
    steps: Mapping[str, WeightStep],
    kl: float,
    aim: float = 0.0,
    most_added_bytes: int | None = None,
    narrowest: int | None = None,
) -> Widths:
    """Widen group by group, each time where a byte gains most, until ``aim`` is promised.

    Args:
        costs: of each group at its planned width, up to a common factor.
        steps: by module path.
        kl: of the model with the planned widths, in nats a token.
        aim: the KL to get down to.
        most_added_bytes: cap on the growth, which may be negative; None for none.
        narrowest: the width to begin with; None for the planned ones.
    """
    planned = {path: step_bits(steps[path]) for group in costs for path in group}
    bits = {path: narrowest or width for path, width in planned.items()}
    whole, remaining = sum(costs.values()), dict[tuple[str, ...], float]()
    for group, cost in costs.items():
        before, now = (max(widths[path] for path in group) for widths in (planned, bits))
        remaining[group] = cost / whole * kl * _error(now) / _error(before)
    total = sum(remaining.values())
    added = sum(stored_bytes(steps[p], bits[p]) - stored_bytes(steps[p], planned[p]) for p in bits)
    offers = [offer for g in remaining if (offer := _offer(g, remaining[g], bits, steps))]
    heapq.heapify(offers)
    while offers and total > aim:
        _, group, wider, nbytes, gain = heapq.heappop(offers)
        if most_added_bytes is not None and added + nbytes > most_added_bytes:
            continue
        added += nbytes
        total -= gain
        remaining[group] -= gain
        bits.update(dict.fromkeys(group, wider))
        if offer := _offer(group, remaining[group], bits, steps):
            heapq.heappush(offers, offer)
    chosen = {path: width for path, width in bits.items() if width != planned[path]}
    return Widths(chosen, total, added)


def step_bits(step: WeightStep) -> int:
    """Bits that the plan gives a module."""
    assert step.target_spec is not None, "only quantized modules are widened"
    return step.target_spec.bits


def _offer(
    group: tuple[str, ...],
    remaining: float,
    bits: Mapping[str, int],
    steps: Mapping[str, WeightStep],
) -> tuple[float, tuple[str, ...], int, int, float] | None:
    """The next wider width of a group: (-gain a byte, group, width, bytes, gain)."""
    now = max(bits[path] for path in group)
    wider = next_width(now)
    if wider is None:
        return None
    nbytes = sum(stored_bytes(steps[p], wider) - stored_bytes(steps[p], bits[p]) for p in group)
    gain = remaining * (1 - _error(wider) / _error(now))
    return -gain / max(nbytes, 1), group, wider, nbytes, gain


def least_bits_per_weight(plan: FusePlan) -> float:
    """Of a plan whose re-quantized modules all get the narrowest width."""
    steps = plan.requantized
    saved = sum(stored_bytes(s, step_bits(s)) - stored_bytes(s, NARROWEST) for s in steps)
    return 8 * (plan.text_bytes - saved) / plan.parameters


def _error(bits: int) -> float:
    """Squared error of rounding, up to a factor: that of steps of which a range has so many."""
    return float((2**bits - 1) ** -2)
