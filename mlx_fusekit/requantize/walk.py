"""A model's layers as a chain that is walked layer by layer, teacher and fused model side by side.

What the layers before do to a layer's inputs is known exactly then, at the cost of each layer
running a few times, and only one group of inputs' moments is held at a time.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_fusekit.requantize.replay import Known, inputs_on_the_way, matrices_in, output_from
from mlx_fusekit.requantize.shelf import Held, Shelf
from mlx_fusekit.requantize.taps import (
    HeldInput,
    ModuleInput,
    calls_intercepted,
    evaluate,
    inputs_noted,
)
from mlx_fusekit.running.model import RunningModel, place
from mlx_fusekit.running.streamed import layers_of
from mlx_fusekit.running.swapped import FusedModules
from mlx_fusekit.texts.sequences import TokenSequence, grouped_by_length
from mlx_fusekit.verifying.parity import Batch, Variant

#: Tokens of a batch, padding included.
BATCH_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Sequences padded to one length on the right, where causal models do not look back from.

    Attributes:
        tokens: ids ``[sequences, length]``.
        valid: which positions count, ``[sequences, length]``: no padding, nor a token that stood
            behind the same ones in an earlier sequence.
    """

    tokens: mx.array
    valid: npt.NDArray[np.bool_]


def token_batches(sequences: Sequence[TokenSequence]) -> list[TokenBatch]:
    """Batches of sequences of similar length.

    Where many begin alike, as conversations do with a template's system message, that would weigh
    as much as all they say, and has the same inputs each time.
    """
    groups = grouped_by_length(sequences, BATCH_TOKENS)
    known: dict[tuple[int, int], int] = {}
    return [_padded([sequence.tokens for sequence in group], known) for group in groups]


def _padded(sequences: Sequence[tuple[int, ...]], known: dict[tuple[int, int], int]) -> TokenBatch:
    length = max(map(len, sequences))
    # Padded with their own tokens: expert layers hide which of their inputs are padding, and so
    # they see ordinary text there.
    tokens = [(s * (length // len(s) + 1))[:length] for s in sequences]
    valid = np.zeros((len(sequences), length), np.bool_)
    for row, sequence in zip(valid, sequences, strict=True):
        row[: len(sequence)] = _first_seen(sequence, known)
    return TokenBatch(mx.array(tokens), valid)


def _first_seen(tokens: Sequence[int], known: dict[tuple[int, int], int]) -> list[bool]:
    """Which tokens stand behind others as no token before did.

    Args:
        tokens: of a sequence.
        known: numbers every beginning, by the one that is a token shorter, and the token; brought
            up to date.
    """
    found, place = [], 0
    for token in tokens:
        found.append((place, token) not in known)
        place = known.setdefault((place, token), len(known) + 1)
    return found


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
        base: the same in the base by itself, of the batches from ``first_measured`` on.
        first_measured: batches from here on are not calibrated on.
    """

    def __init__(
        self,
        model: RunningModel,
        fused: FusedModules,
        calls: Sequence[Sequence[_Call]],
        start: int,
        teacher: list[Held],
        student: list[Held],
        base: list[Held],
        shelf: Shelf,
    ) -> None:
        self._model, self._fused, self._calls, self._shelf = model, fused, calls, shelf
        self.start, self.teacher, self.student, self.base = start, teacher, student, base
        self.first_measured = len(teacher) - len(base)
        self._known = [Known(shelf) for _ in student]
        paths = {id(module): path for path, module in model.model.named_modules()}
        self._paths = [paths[id(layer)] for layer in layers_of(model.model)]

    @classmethod
    def recorded(
        cls,
        teacher: RunningModel,
        fused: FusedModules,
        batches: Sequence[TokenBatch],
        start: int,
        measured: Sequence[TokenBatch] = (),
        shelf: Shelf | None = None,
    ) -> Self | None:
        """Run the model up to layer ``start``, and note how it calls the layers from there on.

        Args:
            teacher: base and adapter.
            fused: what of the fused model there is before that layer.
            batches: to calibrate on.
            start: the layer.
            measured: others, which go through the layers too, and through those of the base.
            shelf: for the hidden states; None to keep them in memory.

        Returns:
            None for a model whose layers are no chain: one that does more with the hidden states
            between them, or calls them in another order.
        """
        layers, shelf = layers_of(teacher.model), shelf or Shelf()
        calls, states, student, base = [], [], [], []
        for number, batch in enumerate((*batches, *measured)):
            noted = _chained_calls(teacher.model, layers, batch, start)
            if noted is None:
                return None
            calls.append(noted[0])
            states.append(shelf.put(noted[1]))
            if fused.ever:
                with fused.active():
                    again = _chained_calls(teacher.model, layers, batch, start)
                assert again is not None, "the fused model has the teacher's layers"
                student.append(shelf.put(again[1]))
            if number >= len(batches):
                entering = _entering_the_base(teacher, layers, batch, start, noted[1])
                base.append(shelf.put(entering))
        return cls(teacher, fused, calls, start, states, student or list(states), base, shelf)

    @classmethod
    def resumed(
        cls,
        teacher: RunningModel,
        fused: FusedModules,
        batches: Sequence[TokenBatch],
        start: int,
        states: Mapping[str, Iterable[mx.array]],
        measured: Sequence[TokenBatch] = (),
        shelf: Shelf | None = None,
    ) -> Self | None:
        """As :meth:`recorded`, with hidden states that are known; no layer is run.

        Args:
            teacher, fused, batches, start, measured, shelf: as there.
            states: as :meth:`states` gave them.
        """
        layers = layers_of(teacher.model)
        calls: list[list[_Call]] = []
        for batch in (*batches, *measured):
            noted = _chained_calls(teacher.model, layers, batch, start, known=True)
            if noted is None:
                return None
            calls.append(noted[0])
        shelf = shelf or Shelf()
        held = {name: [*map(shelf.put, own)] for name, own in states.items()}
        own = held["teacher"]
        student = held.get("student", list(own))
        return cls(teacher, fused, calls, start, own, student, held["base"], shelf)

    def states(self, apart: bool) -> dict[str, list[Held]]:
        """The hidden states where the walk is now, by whose they are.

        Args:
            apart: whether the fused model differs from the teacher by now.
        """
        own = {"teacher": self.teacher, "base": self.base}
        return own | {"student": self.student} if apart else own

    def run(self, layer: int, batch: int, states: mx.array | None = None) -> mx.array:
        """A layer's output for a batch, lazily; for the teacher's hidden states or others."""
        states = self.teacher[batch].get() if states is None else states
        call = self._calls[batch][layer - self.start]
        output: mx.array = layers_of(self._model.model)[layer](states, *call.args, **call.kwargs)
        return output

    def student_inputs(self, layer: int, group: Sequence[str], batch: int) -> list[ModuleInput]:
        """What the first of a group of a layer's modules is called with in the fused model.

        The groups of a layer are to be asked for in their order, once those before are solved.
        """
        states, known = self.student[batch].get(), self._known[batch]
        with self._fused.active():
            run = partial(self.run, layer, batch, states)
            modules = self._matrices(layer, group)
            return inputs_on_the_way(run, modules, known, group, states.shape)

    def _matrices(self, layer: int, group: Sequence[str] = ()) -> dict[str, nn.Module]:
        """A layer's matrices as they stand in the model now, and a group of modules as such."""
        model = self._model.model
        inside = tuple(f"{path}." for path in group)
        found = matrices_in(layers_of(model)[layer], self._paths[layer])
        paths = [*group, *(p for p in found if p not in group and not p.startswith(inside))]
        return {path: place(model, path).value for path in paths}

    def run_teacher(self, layer: int, modules: Mapping[str, nn.Module]) -> list[list[HeldInput]]:
        """Run the teacher's layer, and note what some of its modules are called with.

        The teacher's states are then those behind the layer.

        Returns:
            The calls, one list a batch that is calibrated on.
        """
        calls: list[list[HeldInput]] = []
        for batch in range(len(self.teacher)):
            counts = batch < self.first_measured
            with inputs_noted(modules if counts else {}) as noted:
                after = self.run(layer, batch)
            evaluate(noted, after)
            if counts:
                put = self._shelf.put
                calls.append([HeldInput(c.path, put(c.inputs), c.experts) for c in noted])
            self.teacher[batch] = self._shelf.put(after)
        return calls

    def run_base(self, layer: int) -> None:
        """Run the base's layer, whose states are then those behind it."""
        for number, states in enumerate(self.base):
            with self._model.without_adapter():
                after = self.run(layer, self.first_measured + number, states.get())
            mx.eval(after)
            self.base[number] = self._shelf.put(after)

    def run_student(self, layer: int) -> None:
        """Run the fused model's layer, whose states are then those behind it.

        Where it does not differ from the teacher so far, nothing is run.
        """
        if not self._fused.ever:
            self.student = list(self.teacher)
            return
        for batch, states in enumerate(self.student):
            with self._fused.active():
                run, matrices = partial(self.run, layer, batch, states.get()), self._matrices(layer)
                after = output_from(run, matrices, self._known[batch])
            self.student[batch] = self._shelf.put(after)
            self._known[batch] = Known(self._shelf)


def _entering_the_base(
    teacher: RunningModel,
    layers: Sequence[nn.Module],
    batch: TokenBatch,
    start: int,
    states: mx.array,
) -> mx.array:
    """The hidden states that enter a layer in the base."""
    if not teacher.bare_values:
        return states
    with teacher.without_adapter() as model:
        noted = _chained_calls(model, layers, batch, start)
    assert noted is not None, "the base has the teacher's layers"
    return noted[1]


def replayed(model: nn.Module, tokens: mx.array, final: mx.array) -> mx.array:
    """What a model makes of the hidden states behind its last layer; its layers are not run.

    Args:
        model: mlx-lm's.
        tokens: ids ``[batch, tokens]`` that it is called with.
        final: the states, ``[batch, tokens, columns]``.
    """
    layers = layers_of(model)
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            given = final if index == len(layers) - 1 else None
            stack.enter_context(calls_intercepted(layer, partial(_passed_on, given)))
        output: mx.array = model(tokens)
    return output


@dataclass(frozen=True)
class FinalStates(Variant):
    """A model of which only the hidden states behind its last layer are known.

    Attributes:
        states: by the sequences of the batch, ``[batch, tokens, columns]``.
    """

    states: Mapping[tuple[TokenSequence, ...], mx.array] = field(default_factory=dict)

    def chunk_logits(self, batch: Batch) -> Iterator[tuple[mx.array, list[Any]]]:
        """See :meth:`mlx_fusekit.verifying.parity.Variant.chunk_logits`."""
        states = self.states[batch.sequences]
        for chunk in batch.chunks:
            span = slice(chunk.first, chunk.last)
            # Left before others run, which are states of the same model.
            with self.state():
                logits = replayed(self.model, batch.inputs[:, span], states[:, span])
            yield logits, []


def measured_batches(batches: Sequence[Batch]) -> list[TokenBatch]:
    """Batches of a measurement, as the layers get them."""
    return [TokenBatch(b.inputs, np.ones(b.inputs.shape, np.bool_)) for b in batches]


def _passed_on(given: mx.array | None, _: Callable[..., Any], *args: Any, **__: Any) -> Any:
    return args[0] if given is None else given


def _chained_calls(
    model: nn.Module,
    layers: Sequence[nn.Module],
    batch: TokenBatch,
    start: int,
    *,
    known: bool = False,
) -> tuple[list[_Call], mx.array] | None:
    """The calls of the layers from ``start`` on, and the hidden states that enter there.

    Those are not computed where they are ``known``.
    """
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
    if known:
        return calls, handed[0]
    mx.eval(entering)
    return calls, entering[0]
