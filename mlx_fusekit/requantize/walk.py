"""A model's layers as a chain that is walked layer by layer, teacher and fused model side by side.

What the layers before do to a layer's inputs is known exactly then, at the cost of each layer
running a few times, and only one group of inputs' moments is held at a time.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_fusekit.requantize.taps import ModuleInput, calls_intercepted, evaluate, inputs_noted
from mlx_fusekit.running.model import RunningModel
from mlx_fusekit.running.swapped import FusedModules
from mlx_fusekit.texts.sequences import TokenSequence, grouped_by_length

#: Tokens of a batch, padding included.
BATCH_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Sequences padded to one length on the right, where causal models do not look back from.

    Attributes:
        tokens: ids ``[sequences, length]``.
        valid: which positions are no padding, ``[sequences, length]``.
    """

    tokens: mx.array
    valid: npt.NDArray[np.bool_]


def token_batches(sequences: Sequence[TokenSequence]) -> list[TokenBatch]:
    """Batches of sequences of similar length."""
    groups = grouped_by_length(sequences, BATCH_TOKENS)
    return [_padded([sequence.tokens for sequence in group]) for group in groups]


def _padded(sequences: Sequence[tuple[int, ...]]) -> TokenBatch:
    length = max(map(len, sequences))
    # Padded with their own tokens: expert layers hide which of their inputs are padding, and so
    # they see ordinary text there.
    tokens = [(s * (length // len(s) + 1))[:length] for s in sequences]
    valid = np.arange(length) < np.array([[len(s)] for s in sequences])
    return TokenBatch(mx.array(tokens), valid)


@dataclass(frozen=True, eq=False)
class _Call:
    """The arguments of a layer's call but the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class LayerChain:
    """Layers that hand on their hidden states to each other.

    Attributes:
        start: index of the first layer that is walked.
        teacher: the hidden states before the current layer in the teacher, one a batch.
        student: the same in the fused model.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        fused: FusedModules,
        calls: Sequence[Sequence[_Call]],
        start: int,
        teacher: list[mx.array],
        student: list[mx.array],
    ) -> None:
        self._layers, self._fused, self._calls = layers, fused, calls
        self.start, self.teacher, self.student = start, teacher, student

    @classmethod
    def recorded(
        cls,
        teacher: RunningModel,
        fused: FusedModules,
        batches: Sequence[TokenBatch],
        start: int,
    ) -> Self | None:
        """Run the model up to layer ``start``, and note how it calls the layers from there on.

        Returns:
            None for a model whose layers are no chain: one that does more with the hidden states
            between them, or calls them in another order.
        """
        layers = layers_of(teacher.model)
        calls, states, student = [], [], []
        for batch in batches:
            noted = _chained_calls(teacher.model, layers, batch, start)
            if noted is None:
                return None
            calls.append(noted[0])
            states.append(noted[1])
            if len(fused):
                with fused.active():
                    again = _chained_calls(teacher.model, layers, batch, start)
                assert again is not None, "the fused model has the teacher's layers"
                student.append(again[1])
        return cls(layers, fused, calls, start, states, student or list(states))

    def run(self, layer: int, batch: int, *, fused: bool) -> mx.array:
        """A layer's output for a batch, lazily."""
        states = self.student if fused else self.teacher
        call = self._calls[batch][layer - self.start]
        context: AbstractContextManager[Any] = (
            self._fused.active() if fused else contextlib.nullcontext()
        )
        with context:
            output: mx.array = self._layers[layer](states[batch], *call.args, **call.kwargs)
        return output

    def run_teacher(self, layer: int, modules: Mapping[str, nn.Module]) -> list[list[ModuleInput]]:
        """Run the teacher's layer, and note what some of its modules are called with.

        The teacher's states are then those behind the layer.

        Returns:
            The calls, one list a batch.
        """
        calls = []
        for batch in range(len(self.teacher)):
            with inputs_noted(modules) as noted:
                after = self.run(layer, batch, fused=False)
            evaluate(noted, after)
            calls.append(noted)
            self.teacher[batch] = after
        return calls

    def run_student(self, layer: int) -> None:
        """Run the fused model's layer, whose states are then those behind it."""
        for batch in range(len(self.student)):
            after = self.run(layer, batch, fused=True)
            mx.eval(after)
            self.student[batch] = after


def layers_of(model: Any) -> list[nn.Module]:
    """The model's layers in their order, none when it does not say."""
    layers = getattr(model, "layers", None)
    return [layer for layer in layers if layer is not None] if isinstance(layers, list) else []


def _chained_calls(
    model: nn.Module, layers: Sequence[nn.Module], batch: TokenBatch, start: int
) -> tuple[list[_Call], mx.array] | None:
    """The calls of the layers from ``start`` on, and the hidden states that enter there."""
    order: list[int] = []
    calls: list[_Call] = []
    handed: list[Any] = []
    entering: list[mx.array] = []
    whole = True

    def intercept(index: int) -> Callable[..., Any]:
        def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal whole
            order.append(index)
            first = args[0] if args else None
            whole &= isinstance(first, mx.array)
            whole &= index <= start or (bool(handed) and first is handed[0])
            if index == start:
                entering[:] = args[:1]
            if index >= start:
                calls.append(_Call(args[1:], kwargs))
            handed[:] = [call(*args, **kwargs)]
            return handed[0]

        return run

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(calls_intercepted(layer, intercept(index)))
        model(batch.tokens)
    if not whole or order != list(range(len(layers))) or not isinstance(handed[0], mx.array):
        return None
    mx.eval(entering)
    return calls, entering[0]
