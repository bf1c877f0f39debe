"""Listening to what flows through a running model, without changing its tree of modules.

A module is given a subclass of its own class for a while, which notes its arguments and then calls
it. Everything else about it (attributes, parameters, ``isinstance``) stays as it was, so any model
of mlx-lm runs as always.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.requantize.shelf import Held


@dataclass(frozen=True, eq=False)
class ModuleInput:
    """What a module was called with.

    Attributes:
        path: of the module.
        inputs: ``[batch, tokens, columns]``, or for experts ``[..., 1, columns]``.
        experts: which expert each input goes to, of expert layers only.
    """

    path: str
    inputs: mx.array
    experts: mx.array | None = None

    def rows(self, valid: npt.NDArray[np.bool_]) -> Float32:
        """The inputs as float32 ``[n, columns]``.

        Args:
            valid: which positions of the batch are no padding, ``[batch, tokens]``.
        """
        inputs = _as_float32(self.inputs)
        if inputs.shape[:-1] == valid.shape:
            return inputs[valid]
        return inputs.reshape(-1, inputs.shape[-1])

    def rows_of_experts(self) -> tuple[Float32, npt.NDArray[np.int64]]:
        """The inputs, one row for each expert that gets it, and which expert that is."""
        assert self.experts is not None
        experts = np.array(self.experts, copy=False).astype(np.int64)
        inputs = _as_float32(self.inputs)[..., 0, :]
        rows = np.broadcast_to(inputs, (*experts.shape, inputs.shape[-1]))
        return rows.reshape(-1, inputs.shape[-1]), experts.reshape(-1)


@dataclass(frozen=True, eq=False)
class HeldInput:
    """What a module was called with, while that waits."""

    path: str
    inputs: Held
    experts: mx.array | None

    def get(self) -> ModuleInput:
        """The call."""
        return ModuleInput(self.path, self.inputs.get(), self.experts)


def fetched(calls: Sequence[Sequence[HeldInput]], batch: int) -> list[ModuleInput]:
    """The calls in a batch."""
    return [call.get() for call in calls[batch]]


@contextlib.contextmanager
def inputs_noted(modules: Mapping[str, nn.Module]) -> Iterator[list[ModuleInput]]:
    """While it lasts, calls of these modules are noted, in their order.

    Of embeddings, it is the calls as the output head (``as_linear``) that are noted: a token id is
    no input that could have second moments.
    """
    noted: list[ModuleInput] = []

    def note(path: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        experts = args[1] if len(args) > 1 else kwargs.get("indices")
        noted.append(ModuleInput(path, args[0], experts))
        return call(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            method = "as_linear" if hasattr(module, "as_linear") else "__call__"
            stack.enter_context(_overridden(module, method, partial(note, path)))
        yield noted


def evaluate(noted: Sequence[ModuleInput], *others: mx.array) -> None:
    """Compute noted inputs, and what leads to them."""
    experts = [call.experts for call in noted if call.experts is not None]
    mx.eval([call.inputs for call in noted], experts, *others)


@contextlib.contextmanager
def calls_intercepted(module: nn.Module, intercept: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, ``intercept(call, *args, **kwargs)`` runs in place of ``module(...)``."""
    with _overridden(module, "__call__", intercept):
        yield


@cache
def _listening(kind: Any, method: str) -> Any:
    """A subclass that hands a method's calls to ``intercepts``, by the module's id.

    One for all modules of a class: a class is only freed with all that its methods refer to when
    Python looks for cycles, and hidden states must not wait for that.
    """
    intercepts: dict[int, Callable[..., Any]] = {}

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return intercepts[id(self)](partial(getattr(kind, method), self), *args, **kwargs)

    return type(kind.__name__, (kind,), {method: run, "intercepts": intercepts})


@contextlib.contextmanager
def _overridden(module: Any, method: str, intercept: Callable[..., Any]) -> Iterator[None]:
    before = module.__class__
    listening = _listening(before, method)
    listening.intercepts[id(module)] = intercept
    module.__class__ = listening
    try:
        yield
    finally:
        module.__class__ = before
        del listening.intercepts[id(module)]


def _as_float32(array: mx.array) -> Float32:
    return np.array(array.astype(mx.float32), copy=False)
