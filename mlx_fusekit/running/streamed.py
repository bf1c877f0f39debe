"""Base and adapter of which one layer at a time is in memory.

mlx-lm's model is made with weights that are read when they are first used. What lies outside the
layers (embeddings, norms, head) is computed when it is needed, and given back when it is not; a
layer is read, made float32 where models run so, given its adapter, and given back after its turn.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fusekit.adapters.updates import Adapter
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.machine import give_back_memory
from mlx_fusekit.running.adapted import float_type, norms_as_run, put_parts
from mlx_fusekit.running.combined import HeldDeltas
from mlx_fusekit.running.exact import to_float32
from mlx_fusekit.running.loading import load_lazily
from mlx_fusekit.running.model import RunningModel, place


class StreamedModel:
    """Base and adapter, layer by layer.

    Args:
        source: the base.
        adapter: bound to it.

    Attributes:
        running: the model; what of it is not in memory must not be computed.
        layer_paths: of the layers, in their order.

    Raises:
        CheckpointError: naming what is wrong with the base, or a model that does not say what its
            layers are.
    """

    def __init__(self, source: LocalFolder, adapter: Adapter) -> None:
        self._source, self._adapter = source, adapter
        model, config = load_lazily(source)
        model.eval()
        exact = mx.default_device().type == mx.cpu
        self.running = RunningModel(model, source, config, exact)
        names = {id(module): path for path, module in model.named_modules()}
        self.layer_paths = [names[id(layer)] for layer in layers_of(model) if id(layer) in names]
        if not self.layer_paths:
            raise CheckpointError(f"{source.path}: the model does not say what its layers are")
        self._deltas = HeldDeltas(mx.float32 if exact else float_type(model), nbytes=0)

    @contextlib.contextmanager
    def trunk(self) -> Iterator[None]:
        """While it lasts, what lies outside the layers may be computed, as it is needed."""
        inside = tuple(f"{path}." for path in self.layer_paths)
        paths = [
            path
            for path, module in self.running.model.named_modules()
            if path and not f"{path}.".startswith(inside) and _arrays(module)
        ]
        # What layers have left with the allocator would stay beside embeddings and logits.
        give_back_memory()
        with self._ready(paths, computed=False):
            yield

    @contextlib.contextmanager
    def layer(self, index: int, *, computed: bool = True) -> Iterator[None]:
        """While it lasts, a layer is in memory.

        Args:
            index: the layer's.
            computed: whether at once as a whole, or what of it is needed, when it is.
        """
        top = self.layer_paths[index]
        modules = place(self.running.model, top).value.named_modules()
        with self._ready(
            [f"{top}.{path}" if path else top for path, _ in modules], computed=computed
        ):
            if computed:
                mx.eval(place(self.running.model, top).value.parameters())
            yield

    @contextlib.contextmanager
    def _ready(self, paths: list[str], *, computed: bool) -> Iterator[None]:
        before, known = len(self.running.bare_values), set(paths)
        norms = {}
        if self.running.exact:
            norms = norms_as_run(self._source, self._adapter, known)
            to_float32(self.running.model, paths, computed=computed)
        put_parts(self.running, self._adapter, norms, self._deltas, known)
        try:
            yield
        finally:
            del self.running.bare_values[before:]
            self._give_back(paths)

    def _give_back(self, paths: list[str]) -> None:
        """Put modules in the places of others, with weights that nobody has used."""
        fresh, _ = load_lazily(self._source)
        fresh.eval()
        known = set(paths)
        for path in paths:
            if any(path[:end] in known for end in range(len(path)) if path[end] == "."):
                continue  # it goes with the module that holds it
            where, new = place(self.running.model, path), place(fresh, path).value
            if any(layer.startswith(f"{path}.") for layer in self.layer_paths):
                for name, value in _arrays(new).items():
                    where.value[name] = value
            else:
                where.put(new)
        mx.clear_cache()


def layers_of(model: Any) -> list[nn.Module]:
    """The model's layers in their order, none when it does not say."""
    layers = getattr(model, "layers", None)
    return [layer for layer in layers if layer is not None] if isinstance(layers, list) else []


def _arrays(module: nn.Module) -> dict[str, mx.array]:
    return {name: value for name, value in module.items() if isinstance(value, mx.array)}
