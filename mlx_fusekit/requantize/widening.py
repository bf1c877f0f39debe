"""Which modules get wider bits, so that the fused model comes close enough to its teacher.

What each group of modules costs is measured: the KL divergence with the group's modules replaced
by the teacher's. From there on, each bit more is taken to quarter a group's share, and the bits go
where they gain most for a byte. The model is then re-quantized with these widths and measured.
"""

import contextlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.nn as nn

from mlx_fusekit.numerics import STORAGE
from mlx_fusekit.parity import Model, Progress, Variant, compare
from mlx_fusekit.plan import WeightStep
from mlx_fusekit.quantization import AFFINE_BITS, AFFINE_GROUPS, CODEBOOK_MODES, QuantSpec
from mlx_fusekit.requantize.fused import FusedModules
from mlx_fusekit.texts.sequences import TokenSequence

#: Share of the bound that is aimed at, since gains are estimates.
_AIM = 0.85
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


def measured_shares(
    model: nn.Module,
    fused: FusedModules,
    groups: Sequence[tuple[str, ...]],
    sequences: Sequence[TokenSequence],
    progress: Progress | None = None,
) -> dict[tuple[str, ...], float]:
    """What share of the KL divergence each group of modules is the cause of; they sum up to 1."""

    @contextlib.contextmanager
    def without(group: tuple[str, ...]) -> Iterator[None]:
        taken = {path: fused.remove(path) for path in group}
        try:
            with fused.active():
                yield
        finally:
            fused.restore(taken)

    variants: dict[str, Model] = {
        str(place): Variant(model, partial(without, group)) for place, group in enumerate(groups)
    }
    variants["all"] = Variant(model, fused.active)
    measured = compare(model, variants, _some(sequences), progress=progress)
    whole = measured["all"].kl_mean
    least = _LEAST_SHARE * max(whole, 1e-12)
    gains = [max(whole - measured[str(place)].kl_mean, least) for place in range(len(groups))]
    return {group: gain / sum(gains) for group, gain in zip(groups, gains, strict=True)}


def _some(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    chosen: list[TokenSequence] = []
    for sequence in sequences:
        if chosen and sum(len(s.tokens) for s in chosen) + len(sequence.tokens) > _TOKENS:
            break
        chosen.append(sequence)
    return chosen


def choose_widths(
    shares: Mapping[tuple[str, ...], float],
    steps: Mapping[str, WeightStep],
    kl: float,
    bound: float,
    most_added_bytes: int | None,
    current: Mapping[str, int],
) -> Widths:
    """Widen group by group, each time where a byte gains most, until the bound is promised.

    Args:
        shares: of each group in ``kl``.
        steps: by module path.
        kl: of the model as it is, in nats a token.
        bound: to be reached.
        most_added_bytes: cap on the growth, None for none.
        current: bits of modules that are wider than the base's already.
    """
    remaining = {group: share * kl for group, share in shares.items()}
    bits = {group: max(_bits(steps[path], current) for path in group) for group in remaining}
    start = {path: stored_bytes(step, step_bits(step)) for path, step in steps.items()}
    added = sum(stored_bytes(steps[p], b) - start[p] for p, b in current.items())
    queue = [_offer(group, remaining[group], bits[group], steps) for group in remaining]
    offers = [offer for offer in queue if offer is not None]
    heapq.heapify(offers)
    total = sum(remaining.values())
    while offers and total > _AIM * bound:
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


def _bits(step: WeightStep, current: Mapping[str, int]) -> int:
    return current.get(step.module, step_bits(step))


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
