"""Listening to what flows through a running model, without changing its tree of modules.

A module is given a subclass of its own class for a while, which notes its arguments and then calls
it. Everything else about it (attributes, parameters, ``isinstance``) stays as it was, so any model
of mlx-lm runs as always.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.floats import Float32


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


@contextlib.contextmanager
def inputs_noted(modules: Mapping[str, nn.Module]) -> Iterator[list[ModuleInput]]:
    """While it lasts, calls of these modules are noted, in their order.

    Of embeddings, it is the calls as the output head (``as_linear``) that are noted: a token id is
    no input that could have second moments.
    """
    noted: list[ModuleInput] = []
    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(_overridden(module, _noting(type(module), path, noted)))
        yield noted


def evaluate(noted: Sequence[ModuleInput], *others: mx.array) -> None:
    """Compute noted inputs, and what leads to them."""
    experts = [call.experts for call in noted if call.experts is not None]
    mx.eval([call.inputs for call in noted], experts, *others)


@contextlib.contextmanager
def calls_intercepted(module: nn.Module, intercept: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, ``intercept(call, *args, **kwargs)`` runs in place of ``module(...)``."""
    kind: Any = type(module)

    class Intercepted(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return intercept(super().__call__, *args, **kwargs)

    with _overridden(module, Intercepted):
        yield


def _noting(kind: Any, path: str, noted: list[ModuleInput]) -> type:
    if hasattr(kind, "as_linear"):

        class NotingHead(kind):  # type: ignore[misc]
            def as_linear(self, x: mx.array) -> Any:
                noted.append(ModuleInput(path, x))
                return super().as_linear(x)

        return NotingHead

    class Noting(kind):  # type: ignore[misc]
        def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            experts = args[0] if args else kwargs.get("indices")
            noted.append(ModuleInput(path, x, experts))
            return super().__call__(x, *args, **kwargs)

    return Noting


@contextlib.contextmanager
def _overridden(module: Any, kind: type) -> Iterator[None]:
    before = module.__class__
    module.__class__ = kind
    try:
        yield
    finally:
        module.__class__ = before


def _as_float32(array: mx.array) -> Float32:
    return np.array(array.astype(mx.float32), copy=False)
