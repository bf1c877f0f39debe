"""Which modules get wider bits, so that the fused model comes close enough to its teacher.

What each group of modules costs is measured: the KL divergence of the teacher with only this group
rounded to nearest, times the share of that error that calibration left. Each bit more is taken to
quarter a group's cost, and the bits go where they gain most for a byte.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_fusekit.formats.floats import STORAGE
from mlx_fusekit.formats.specs import AFFINE_BITS, AFFINE_GROUPS, CODEBOOK_MODES, QuantSpec
from mlx_fusekit.merging.merged import Weight
from mlx_fusekit.merging.plan import WeightStep
from mlx_fusekit.progress import Progress
from mlx_fusekit.requantize.grids import nearest_of
from mlx_fusekit.running.model import RunningModel
from mlx_fusekit.running.swapped import FusedModules
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.parity import Variant, compare

#: Share of the whole that a group counts for at least: single measurements can be negative.
_LEAST_SHARE = 1e-3
#: Tokens that the groups are measured on.
_TOKENS = 512


@dataclass(frozen=True)
class Widths:
    """Bits of modules to be widened.

    Attributes:
        bits: by module path, of those wider than the base's.
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
    """Size of a step's weight when it has an affine width, or the base's own format."""
    experts, rows, columns = step.shape
    elements = experts * rows * columns
    spec = step.target_spec
    assert spec is not None, "only quantized modules are widened"
    if bits <= spec.bits:
        bits, own = spec.bits, spec
    else:
        own = QuantSpec(bits, spec.group_size if spec.group_size in AFFINE_GROUPS else 32)
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
    aim: float,
    most_added_bytes: int | None = None,
) -> Widths:
    """Widen group by group, each time where a byte gains most, until ``aim`` is promised.

    Args:
        costs: of each group, up to a common factor.
        steps: by module path.
        kl: of the model without wider bits, in nats a token.
        aim: the KL to get down to.
        most_added_bytes: cap on the growth, None for none.
    """
    whole = sum(costs.values())
    remaining = {group: cost / whole * kl for group, cost in costs.items()}
    bits = {group: max(step_bits(steps[path]) for path in group) for group in remaining}
    total, added = kl, 0
    queue = [_offer(group, remaining[group], bits[group], steps) for group in remaining]
    offers = [offer for offer in queue if offer is not None]
    heapq.heapify(offers)
    while offers and total > aim:
        _, group, wider, nbytes, gain = heapq.heappop(offers)
        if most_added_bytes is not None and added + nbytes > most_added_bytes:
            continue
        added += nbytes
        total -= gain
        remaining[group] -= gain
        bits[group] = wider
        offer = _offer(group, remaining[group], wider, steps)
        if offer is not None:
            heapq.heappush(offers, offer)
    chosen = {
        path: bits[group]
        for group in remaining
        for path in group
        if bits[group] > step_bits(steps[path])
    }
    return Widths(chosen, total, added)


def step_bits(step: WeightStep) -> int:
    """Bits that the plan gives a module."""
    assert step.target_spec is not None, "only quantized modules are widened"
    return step.target_spec.bits


def _offer(
    group: tuple[str, ...], remaining: float, bits: int, steps: Mapping[str, WeightStep]
) -> tuple[float, tuple[str, ...], int, int, float] | None:
    """The next wider width of a group: (-gain a byte, group, width, bytes, gain)."""
    wider = next_width(bits)
    if wider is None:
        return None
    nbytes = sum(stored_bytes(steps[p], wider) - stored_bytes(steps[p], bits) for p in group)
    gain = remaining * (1 - 4.0 ** (bits - wider))
    return -gain / max(nbytes, 1), group, wider, nbytes, gain
