"""Second moments of modules' inputs, gathered from the running teacher and fused model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.requantize.cholesky import add_cross_products, add_products
from mlx_fusekit.requantize.ranks import Ranks
from mlx_fusekit.requantize.solver import Moments
from mlx_fusekit.requantize.taps import ModuleInput, evaluate, inputs_noted

#: Pseudo-observations, as a share of the columns, by which an expert's moments lean on those of
#: all experts: few tokens say little about the second moments of many columns.
_EXPERT_PRIOR = 0.25
#: Inputs must be below this, so that float32 holds the sums of their squares.
_LARGEST = np.float32(1e15)


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

    def add(self, fused: Float32, difference: Float32) -> None:
        """Count some tokens, ``y`` and ``x - y``, ``[tokens, columns]``."""
        right = difference if self.weights is None else difference @ self.weights
        add_cross_products(self.sums, fused, right)

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

    def emptied(self) -> "InputMoments":
        """The same kind of sums, of no tokens."""
        drift = self.drift
        if drift is not None:
            drift = Drift(np.zeros_like(drift.sums), drift.weights)
        return InputMoments.zero(len(self.fused), drift)

    def take_in(self, share: "InputMoments", ranks: Ranks) -> None:
        """Add every rank's sums of one share of its tokens, in the order of the ranks."""
        ranks.add_in_order(self.fused, share.fused)
        if self.drift is not None and share.drift is not None:
            ranks.add_in_order(self.drift.sums, share.drift.sums)
        count, skipped = ranks.total(share.count, share.skipped)
        self.count, self.skipped = self.count + count, self.skipped + skipped

    def add(self, teacher: Float32, fused: Float32 | None) -> None:
        """Count some tokens' inputs ``[tokens, columns]``; None where the fused are the same."""
        # NaN is not below anything.
        finite = (np.abs(teacher) < _LARGEST).all(1)
        if fused is not None:
            finite &= (np.abs(fused) < _LARGEST).all(1)
        if not finite.all():
            self.skipped += int((~finite).sum())
            teacher = teacher[finite]
            fused = None if fused is None else fused[finite]
        own = teacher if fused is None else fused
        add_products(self.fused, own)
        if self.drift is not None:
            self.drift.add(own, teacher - own)
        self.count += len(own)


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
        own = {expert: InputMoments.zero(columns) for expert in experts}
        share = InputMoments.zero(columns)
        for call in calls(turn):
            rows, of = call.rows_of_experts()
            share.add(rows, None)
            for expert in np.unique(of):
                if int(expert) in own:
                    own[int(expert)].add(rows[of == expert], None)
        everyone.take_in(share, ranks)
        for expert, moments in chosen.items():
            moments.take_in(own[expert], ranks)
    for moments in chosen.values():
        _lean_on(moments, everyone, columns)
    return [chosen[expert] for expert in experts], everyone


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
