"""Base and adapter as mlx-lm runs them: unmerged, with its own adapter layers."""

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from mlx_fusekit.adapters.combined import CombinedUpdate
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.updates import Adapter, Update
from mlx_fusekit.checkpoint.base import TensorSource
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running.combined import HeldDeltas, combined_layer
from mlx_fusekit.running.exact import (
    MEMORY_SHARE,
    dense,
    is_quantized,
    may_run_in_float32,
    weight_as_run,
)
from mlx_fusekit.running.loading import load_lazily, run_model
from mlx_fusekit.running.model import Place, RunningModel, place, swapped


def run_adapted(
    source: LocalFolder, adapter: Adapter, *, memory_share: float = MEMORY_SHARE
) -> RunningModel:
    """Load a base model with an adapter that was bound to it.

    The layers are mlx-lm's own, placed by module path: ``linear_to_lora_layers`` of mlx-lm takes
    wrong widths for DoRA on 3-, 5- and 6-bit linears.

    Args:
        source: the base.
        adapter: what to put on it.
        memory_share: as for :func:`~mlx_fusekit.running.loading.run_model`.

    Raises:
        AdapterError: when mlx-lm has no adapter layer for a module.
        CheckpointError: naming what is wrong with the base.
    """
    return put_on(run_model(source, memory_share=memory_share), adapter, memory_share=memory_share)


def put_on(
    bare: RunningModel, adapter: Adapter, *, memory_share: float = MEMORY_SHARE
) -> RunningModel:
    """Put an adapter on a running base, whose model then runs with it.

    Args:
        bare: the base, loaded with the same share of the memory.
        adapter: bound to it.
        memory_share: as for :func:`~mlx_fusekit.running.loading.run_model`.

    Raises:
        AdapterError: when mlx-lm has no adapter layer for a module.
    """
    model, exact = bare.model, bare.exact
    norms = norms_as_run(bare.source, adapter) if may_run_in_float32(model, memory_share) else {}
    deltas = HeldDeltas(mx.float32 if exact else float_type(model))
    running = replace(bare, bare_values=[])
    put_parts(running, adapter, norms, deltas)
    mx.eval(model.parameters())
    model.eval()
    return running


def put_parts(
    running: RunningModel,
    adapter: Adapter,
    norms: Mapping[str, mx.array],
    deltas: HeldDeltas,
    paths: Collection[str] | None = None,
) -> None:
    """Put an adapter on some of a base's modules; the model's ``bare_values`` are added to.

    Args:
        running: the base.
        adapter: bound to it.
        norms: as :func:`norms_as_run` gives them.
        deltas: holds updates of full size.
        paths: of the modules; None for all.

    Raises:
        AdapterError: when mlx-lm has no adapter layer for a module.
    """
    model, exact, before = running.model, running.exact, running.bare_values
    for path, update in adapter.weights.items():
        if paths is None or path in paths:
            before.append(_put(model, path, update, norms.get(path), exact, deltas))
    for name, parameter in adapter.parameters.items():
        if paths is None or name.rpartition(".")[0] in paths:
            before.append(_exchanged(place(model, name), _array(parameter.tensor, exact)))


@contextlib.contextmanager
def adapted_alone(running: RunningModel, adapter: Adapter) -> Iterator[nn.Module]:
    """While it lasts, a model runs with another adapter than the one it was loaded with.

    Args:
        running: as :func:`run_adapted` gave it.
        adapter: of LoRA alone, bound to the same base.
    """
    with running.without_adapter(), contextlib.ExitStack() as stack:
        for path, update in adapter.weights.items():
            assert isinstance(update, LowRankUpdate), "what is combined is LoRA"
            where = place(running.model, path)
            layer = _adapted(path, where.value, update, None)[1]
            stack.enter_context(swapped([(where, layer)]))
        yield running.model


def put_adapter(model: nn.Module, adapter: Adapter, *, scale: float, dtype: mx.Dtype) -> None:
    """Put mlx-lm's adapter layers into a model that runs as it is stored.

    Args:
        model: mlx-lm's.
        adapter: bound to the same base, without the scale multiplied in.
        scale: of its updates.
        dtype: of the matrices of its layers.

    Raises:
        AdapterError: when mlx-lm has no adapter layer for a module.
    """
    deltas = HeldDeltas(dtype)
    for path, update in adapter.weights.items():
        _put(model, path, update, None, False, deltas)
        if isinstance(update, LowRankUpdate):
            layer = place(model, path).value
            layer.scale = scale
            layer.lora_a, layer.lora_b = (m.astype(dtype) for m in (layer.lora_a, layer.lora_b))
    for name, parameter in adapter.parameters.items():
        place(model, name).put(_array(parameter.tensor, exact=False))
    mx.eval(model.parameters())


def _put(
    model: nn.Module,
    path: str,
    update: Update,
    norms_as_run: mx.array | None,
    exact: bool,
    deltas: HeldDeltas,
) -> tuple[Place, Any]:
    """Put an update into the model; its place, and what lay there."""
    where = place(model, path)
    if isinstance(update, LowRankUpdate):
        bare, layer = _adapted(path, where.value, update, norms_as_run)
        where.put(layer)
        return where, bare
    if isinstance(update, CombinedUpdate):
        around = combined_layer(where.value, update, deltas)
        return _exchanged(where, _known(around, path, where.value))
    module, weight = where.value, _array(update.tensor, exact)
    if is_quantized(module):
        return _exchanged(where, dense(module, weight))
    return _exchanged(Place(module, "weight"), weight)


def float_type(model: nn.Module) -> mx.Dtype:
    """The type that most of a model's arrays of floats have."""
    found = Counter(
        value.dtype
        for _, value in tree_flatten(model.parameters())
        if mx.issubdtype(value.dtype, mx.floating)
    )
    most: mx.Dtype = found.most_common(1)[0][0]
    return most


def _known(layer: Any, path: str, module: nn.Module) -> Any:
    if layer is None:
        raise AdapterError(
            f"{path}: mlx-lm has no adapter layer for {type(module).__name__}; "
            "fuse into the model the adapter was trained on"
        )
    return layer


def _exchanged(where: Place, value: Any) -> tuple[Place, Any]:
    before = where.value
    where.put(value)
    return where, before


def norms_as_run(
    source: LocalFolder, adapter: Adapter, paths: Collection[str] | None = None
) -> dict[str, mx.array]:
    """Row norms of DoRA's adapted weights as mlx-lm computes them, of rounded weights.

    Args:
        source: the base.
        adapter: bound to it.
        paths: of the modules; None for all.
    """
    updates = {
        path: update
        for path, update in adapter.weights.items()
        if isinstance(update, LowRankUpdate) and update.magnitude is not None
        if paths is None or path in paths
    }
    norms = {}
    if updates:
        model, _ = load_lazily(source)  # the running one may hold float32
        for path, update in updates.items():
            norms[path] = _row_norms(weight_as_run(place(model, path).value), update)
            mx.eval(norms[path])
    return norms


def _row_norms(weight: mx.array, update: LowRankUpdate) -> mx.array:
    delta = mx.array(update.up[0]) @ mx.array(update.down[0])
    return mx.linalg.norm(weight.astype(mx.float32) + delta, axis=1)


def _adapted(
    path: str, module: nn.Module, update: LowRankUpdate, norms_as_run: mx.array | None
) -> tuple[nn.Module, nn.Module]:
    """The module an adapter is put around, and mlx-lm's adapter layer around it.

    Args:
        path: of the module, for the message.
        module: the base's.
        update: its scale is part of ``up``, so the layer's own is 1.
        norms_as_run: of DoRA's rows, where ``module`` holds other values than mlx-lm runs.
    """
    up, down, rank = update.up, update.down, update.rank
    dora = update.magnitude is not None
    layer: Any
    if isinstance(module, SwitchLinear | QuantizedSwitchLinear) and not dora:
        layer = LoRASwitchLinear.from_base(module, rank, 0.0, 1.0)
        layer.lora_a, layer.lora_b = mx.array(down), mx.array(up)
    elif isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        if dora and is_quantized(module):  # mlx-lm's DoRA reads the weight of a dense one
            module = dense(module, weight_as_run(module))
        kind = DoRAEmbedding if dora else LoRAEmbedding
        layer = kind.from_base(module, rank, 0.0, 1.0)
        layer.lora_a, layer.lora_b = mx.array(up[0]), mx.array(down[0])
    elif isinstance(module, nn.Linear | nn.QuantizedLinear):
        if dora:
            layer = DoRALinear(down.shape[-1], up.shape[1], rank, 0.0, 1.0)
            layer.set_linear(module)
        else:
            layer = LoRALinear.from_base(module, rank, 0.0, 1.0)
        layer.lora_a = mx.array(np.ascontiguousarray(down[0].T))
        layer.lora_b = mx.array(np.ascontiguousarray(up[0].T))
    else:
        layer = _known(None, path, module)
    if update.magnitude is not None:
        layer.m = mx.array(update.magnitude)
        if norms_as_run is not None:
            # The layer will divide by the norms of the exact weights it holds.
            layer.m *= _row_norms(module.weight, update) / norms_as_run
    return module, layer


def _array(tensor: TensorSource, exact: bool) -> mx.array:
    rows = math.prod(tensor.shape[:-1])
    array = mx.array(tensor.read_rows(0, rows).reshape(tensor.shape))
    if tensor.dtype == "BF16":
        array = array.view(mx.bfloat16)
    return array.astype(mx.float32) if exact else array
