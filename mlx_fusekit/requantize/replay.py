"""A layer that is run up to one group of its modules after the other, and does little twice.

MLX computes only what is asked for. So a layer is called anew for each group, and where a module
was called before, its first call takes the input, or gives the output, that is known: what leads
there is then not computed again. Whatever a layer does beside its modules is done as always.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fusekit.requantize.shelf import Held, Shelf
from mlx_fusekit.requantize.taps import ModuleInput, calls_intercepted


@dataclass
class Known:
    """What is known of one batch on its way through a layer.

    Attributes:
        shelf: on which it waits.
        group: paths of the modules that it has reached, whose inputs are the same.
        inputs: of their first call.
        outputs: of the first calls of modules before those, where they have the shape of hidden
            states: what is added up along the layer.
    """

    shelf: Shelf
    group: Sequence[str] = ()
    inputs: Held | None = None
    outputs: dict[str, Held] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Call:
    path: str
    inputs: mx.array
    output: Any


def matrices_in(layer: nn.Module, top: str) -> list[str]:
    """Paths of a layer's modules that multiply with a matrix, its own path being ``top``."""
    return [
        f"{top}.{path}"
        for path, module in layer.named_modules()
        if path and isinstance(weight := module.get("weight"), mx.array) and weight.ndim == 2
    ]


def inputs_on_the_way(
    run: Callable[[], mx.array],
    modules: Mapping[str, nn.Module],
    known: Known,
    group: Sequence[str],
    shape: tuple[int, ...],
) -> list[ModuleInput]:
    """What a group of modules is called with; only what leads there from what is known is computed.

    Args:
        run: calls the layer.
        modules: of the layer, by path, the group's among them.
        known: brought up to date.
        group: paths of modules with the same inputs, none called before those that are known.
        shape: of the hidden states.

    Returns:
        The calls of the first of the group.
    """
    with _reusing(known, modules) as calls:
        run()
    own = [call for call in calls if call.path == group[0]]
    before = calls[: calls.index(own[0])] if own else []
    outputs = {call.path: call.output for call in reversed(before)}
    outputs = {
        path: output
        for path, output in outputs.items()
        if isinstance(output, mx.array) and output.shape == shape
    }
    mx.eval([call.inputs for call in own], list(outputs.values()))
    if own:
        put = known.shelf.put
        known.group, known.inputs = group, put(own[0].inputs)
        known.outputs = {path: put(output) for path, output in outputs.items()}
    return [ModuleInput(call.path, call.inputs) for call in own]


def output_from(
    run: Callable[[], mx.array], modules: Mapping[str, nn.Module], known: Known
) -> mx.array:
    """The layer's output, computed from what is known."""
    with _reusing(known, modules):
        output = run()
    mx.eval(output)
    return output


@contextlib.contextmanager
def _reusing(known: Known, modules: Mapping[str, nn.Module]) -> Iterator[list[_Call]]:
    calls: list[_Call] = []
    called: set[str] = set()
    inputs = None if known.inputs is None else known.inputs.get()

    def intercept(path: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first = path not in called
        called.add(path)
        if first and path in known.outputs:
            output = known.outputs[path].get()
        else:
            if first and path in known.group:
                args = (inputs, *args[1:])
            output = call(*args, **kwargs)
        calls.append(_Call(path, args[0], output))
        return output

    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(calls_intercepted(module, partial(intercept, path)))
        yield calls
