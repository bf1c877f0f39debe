"""Second moments of modules' inputs, gathered from the running teacher and fused model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.requantize.cholesky import Adding, add_cross_products, add_products
from mlx_fusekit.requantize.ranks import Ranks
from mlx_fusekit.requantize.solver import Moments
from mlx_fusekit.requantize.taps import ModuleInput, evaluate, inputs_noted

#: Pseudo-observations, as a share of the columns, by which an expert's moments lean on those of
#: all experts: few tokens say little about the second moments of many columns.
_EXPERT_PRIOR = 0.25
#: Inputs must be below this, so that float32 holds the sums of their squares.
_LARGEST = np.float32(1e15)

#: Of a share of the text, batches whose inputs are in memory together.
BATCHES = 4

#: Bytes that the second moments of experts may take, as many as are held at once.
MOMENTS_BYTES = 2 << 30

#: Gives a module's calls in a batch, by the batch's index.
Inputs = Callable[[int], list[ModuleInput]]


@dataclass
class Drift:
    """How the inputs of the fused model, ``y``, differ from the teacher's, ``x``.

    Attributes:
        sums: over tokens of ``y (x - y)^T``, float32 ``[columns, columns]``; where weights are
            given, of its product with them, ``[columns, rows]``.
        weights: the merged ones of the modules that have these inputs, ``[columns, rows]``.
    """

    sums: Float32
    weights: Float32 | None = None

    @classmethod
    def zero(cls, weights: Sequence[Float32], tokens: int) -> "Drift":
        """Of no tokens yet, in the form that takes fewer operations for so many.

        Args:
            weights: of each module, ``[columns, rows]``.
            tokens: that will be added.
        """
        columns, rows = len(weights[0]), sum(own.shape[1] for own in weights)
        if 2 * tokens * rows < columns * (tokens + rows):
            joined = weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1)
            return cls(np.zeros((columns, rows), np.float32), joined)
        return cls(np.zeros((columns, columns), np.float32))

    def add(self, fused: Float32, difference: Float32, adding: Adding) -> None:
        """Count some tokens, ``y`` and ``x - y``, ``[tokens, columns]``."""
        right = difference if self.weights is None else difference @ self.weights
        add_cross_products(self.sums, fused, right, adding)

    def times(self, weights: Float32, places: Sequence[slice]) -> Float32:
        """The sums times some of the weights, ``[columns, rows]``, which are at these places."""
        if self.weights is None:
            return self.sums @ weights
        return np.concatenate([self.sums[:, place] for place in places], axis=1)


@dataclass
class InputMoments:
    """Sums over tokens of a module's inputs, ``x`` in the teacher and ``y`` in the fused model.

    Attributes:
        fused: sum of ``y y^T``, float32 ``[columns, columns]``, of which the upper triangle counts.
        drift: None where both models have the same inputs.
        count: tokens.
        skipped: tokens whose inputs were not finite, or too large for sums of their squares.
    """

    fused: Float32
    drift: Drift | None = None
    count: int = 0
    skipped: int = 0

    @classmethod
    def zero(cls, columns: int, drift: Drift | None = None) -> "InputMoments":
        """Of no tokens."""
        return cls(np.zeros((columns, columns), np.float32), drift)

    def forget(self) -> None:
        """Let go of the sums; what was counted stays."""
        self.fused, self.drift = np.zeros((0, 0), np.float32), None

    def add(self, teacher: Float32, fused: Float32 | None, ranks: Ranks) -> None:
        """Count the inputs of some tokens of every rank, in the order of the ranks.

        Args:
            teacher: of this rank's, ``[tokens, columns]``.
            fused: the same in the fused model; None where they are the same.
            ranks: that do so together.
        """
        # NaN is not below anything.
        finite: npt.NDArray[np.bool_] = np.all(np.abs(teacher) < _LARGEST, axis=1)
        if fused is not None:
            finite &= (np.abs(fused) < _LARGEST).all(1)
        if not finite.all():
            teacher = teacher[finite]
            fused = None if fused is None else fused[finite]
        own = teacher if fused is None else fused
        add_products(self.fused, own, ranks.add_in_order)
        if self.drift is not None:
            self.drift.add(own, teacher - own, ranks.add_in_order)
        count, skipped = ranks.total(len(own), len(finite) - len(own))
        self.count, self.skipped = self.count + count, self.skipped + skipped


def input_groups(run: Callable[[], mx.array], modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Which of the modules have the same inputs, in the order in which they are called.

    Nothing is computed. Modules that are not called are in no group.
    """
    with inputs_noted(modules) as noted:
        run()
    groups: dict[int, list[str]] = {}
    seen: set[str] = set()
    for call in noted:
        if call.path not in seen:
            seen.add(call.path)
            groups.setdefault(id(call.inputs), []).append(call.path)
    return list(groups.values())


def noted_inputs(run: Callable[[], mx.array], path: str, module: nn.Module) -> list[ModuleInput]:
    """What a module is called with; only what leads to it is computed."""
    with inputs_noted({path: module}) as noted:
        run()
    evaluate(noted)
    return noted


def expert_moments(
    calls: Callable[[int], Iterator[ModuleInput]],
    experts: Sequence[int],
    columns: int,
    ranks: Ranks,
) -> tuple[list[InputMoments], InputMoments]:
    """Moments of some experts' inputs, and of all experts' together.

    Args:
        calls: gives the calls of the layer in each share of this rank's batches, by its number.
        experts: which experts' moments are wanted.
        columns: width of the inputs.
        ranks: that have the other batches.
    """
    chosen = {expert: InputMoments.zero(columns) for expert in experts}
    everyone = InputMoments.zero(columns)
    for turn in range(ranks.turns):
        found = [call.rows_of_experts() for call in calls(turn)]
        rows = joined([rows for rows, _ in found], columns)
        of = np.concatenate([of for _, of in found]) if found else np.empty(0, np.int64)
        everyone.add(rows, None, ranks)
        for expert, moments in chosen.items():
            moments.add(rows[of == expert], None, ranks)
    for moments in chosen.values():
        _lean_on(moments, everyone, columns)
    return [chosen[expert] for expert in experts], everyone


def add_batches(
    moments: InputMoments,
    valid: Sequence[npt.NDArray[np.bool_]],
    ours: Inputs,
    theirs: Inputs | None,
    ranks: Ranks,
) -> None:
    """Count a module's inputs in all batches, share by share, so that ranks change no rounding.

    Args:
        moments: of no tokens yet.
        valid: of each of this rank's batches, which positions are no padding.
        ours: in the teacher.
        theirs: in the fused model; None where they are the same.
        ranks: that have the other batches.
    """
    columns = len(moments.fused)

    def rows(inputs: Inputs, first: int, turn: int) -> Float32:
        places = ranks.places(turn, len(valid))[first : first + BATCHES]
        return joined([call.rows(valid[i]) for i in places for call in inputs(i)], columns)

    longest = -(-max(ranks.all_of(len(valid))) // ranks.turns)
    for first in range(0, longest, BATCHES):
        for turn in range(ranks.turns):
            fused = None if theirs is None else rows(theirs, first, turn)
            moments.add(rows(ours, first, turn), fused, ranks)


def joined(parts: Sequence[Float32], columns: int) -> Float32:
    """Inputs ``[tokens, columns]`` after each other."""
    return np.concatenate(parts) if parts else np.empty((0, columns), np.float32)


def _lean_on(moments: InputMoments, everyone: InputMoments, columns: int) -> None:
    if everyone.count:
        prior = _EXPERT_PRIOR * columns / everyone.count
        moments.fused += everyone.fused * np.float32(prior)


def compensated(
    weights: Float32, places: Sequence[slice], drift: Drift, moments: Moments
) -> Float32:
    """Weights that give the teacher's outputs from the fused model's inputs, by least squares.

    What the layers before did to the inputs is made good as far as a linear map can: the target of
    asymmetric calibration (Li et al. 2025, GPTAQ, arXiv 2504.02692). Damping pulls it towards the
    weights.

    Args:
        weights: some of the merged ones, ``[columns, rows]``.
        places: theirs among all of them.
        drift: of the inputs.
        moments: of the inputs, damped.
    """
    # With x = y + e: (sum y y^T + d) target = (sum y x^T + d) weights, as a correction of them.
    wanted = drift.times(weights, places) * np.float32(moments.scale)
    correction = moments.factor.solved(wanted)
    # Sums of inputs that float32 just holds may overflow in a product.
    return weights + correction if np.isfinite(correction).all() else weights
