"""Models in memory, ready to run: as stored, or with an adapter's layers as mlx-lm runs them.

On Metal and CUDA a model runs in its own format. MLX's CPU backend multiplies quantized and 16-bit
matrices slowly, and 16-bit experts not at all, so there every weight becomes float32, without any
rounding: what is then compared are the weights of two models, not the kernels that ran them.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.utils import load_model, load_tokenizer

from mlx_fusekit.adapters import Adapter, AdapterFolder, LowRankUpdate
from mlx_fusekit.adapters.sources import open_bound
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.errors import AdapterError, CheckpointError
from mlx_fusekit.machine import memory_bytes

#: The share of the machine's memory that a model made float32 may take.
MEMORY_SHARE = 0.6

_DENSE = {
    nn.QuantizedLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
    QuantizedSwitchLinear: SwitchLinear,
    QuantizedMultiLinear: MultiLinear,
}


@dataclass(frozen=True, eq=False)
class _Slot:
    """A place in a model that an adapter changes: ``owner[key]`` is ``adapted`` or ``bare``."""

    owner: Any
    key: Any
    adapted: Any
    bare: Any

    def fill(self) -> None:
        """Put the adapted value in its place."""
        self.owner[self.key] = self.adapted


@dataclass(frozen=True, eq=False)
class RunningModel:
    """A model in memory, in eval mode.

    Attributes:
        model: mlx-lm's; call it with token ids ``[batch, tokens]`` for logits
            ``[batch, tokens, vocabulary]``.
        folder: where it came from.
        config: its ``config.json``.
        exact: whether its weights are float32 throughout, the exact values of what is stored.
    """

    model: nn.Module
    folder: Path
    config: Mapping[str, Any]
    exact: bool
    trust_remote_code: bool = False
    slots: tuple[_Slot, ...] = ()

    @cached_property
    def tokenizer(self) -> Any:
        """mlx-lm's ``TokenizerWrapper``, loaded on first use.

        Raises:
            CheckpointError: when the folder holds none that transformers can read.
        """
        # Said in so many words: left open, transformers asks on the terminal whether to run code.
        extra = {"trust_remote_code": self.trust_remote_code}
        try:
            return load_tokenizer(
                self.folder, extra, eos_token_ids=self.config.get("eos_token_id", None)
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder}: its tokenizer cannot be loaded ({_first_line(error)})"
            ) from error

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[nn.Module]:
        """The same model without its adapter, which returns when the block ends.

        The unchanged weights are the same arrays, so base and teacher need the memory of one.
        """
        for slot in self.slots:
            slot.owner[slot.key] = slot.bare
        try:
            yield self.model
        finally:
            for slot in self.slots:
                slot.fill()

    def bare(self, path: str) -> nn.Module:
        """The module of a path as the base has it, without an adapter's layer around it."""
        owner, key = place(self.model, path)
        for slot in self.slots:
            if slot.owner is owner and slot.key == key:
                assert isinstance(slot.bare, nn.Module), "a module's place holds modules"
                return slot.bare
        module: nn.Module = owner[key]
        return module


def run_model(
    folder: Path, *, trust_remote_code: bool = False, memory_share: float = MEMORY_SHARE
) -> RunningModel:
    """Load a model folder.

    Args:
        folder: as mlx-lm loads it, quantized or not.
        trust_remote_code: let model code that lies in the folder run.
        memory_share: on the CPU backend, weights become float32 when they then take at most this
            share of the machine's memory.

    Raises:
        CheckpointError: naming what is wrong with the folder.
    """
    Checkpoint.open(folder)
    model, config = _load(folder, trust_remote_code)
    exact = _may_run_in_float32(model, memory_share) and _to_float32(model)
    mx.eval(model.parameters())
    model.eval()
    return RunningModel(model, folder, config, exact, trust_remote_code)


def run_teacher(
    folder: Path,
    adapters: Sequence[tuple[AdapterFolder, float]],
    *,
    trust_remote_code: bool = False,
    memory_share: float = MEMORY_SHARE,
) -> RunningModel:
    """Load a base model with adapters, as mlx-lm runs them: unmerged.

    Args:
        folder: the base.
        adapters: each with the weight of its update; LoRA adapters add up.
        trust_remote_code: as for :func:`run_model`.
        memory_share: as for :func:`run_model`.

    Raises:
        AdapterError: when an adapter does not fit the base or the others.
        CheckpointError: naming what is wrong with the base.
    """
    _, bound = open_bound(folder, adapters, trust_remote_code=trust_remote_code)
    return run_adapted(
        folder, bound, trust_remote_code=trust_remote_code, memory_share=memory_share
    )


def run_adapted(
    folder: Path,
    adapter: Adapter,
    *,
    trust_remote_code: bool = False,
    memory_share: float = MEMORY_SHARE,
) -> RunningModel:
    """As :func:`run_teacher`, of an adapter that was bound to the base of this folder.

    The layers are mlx-lm's own, placed by module path: ``linear_to_lora_layers`` of mlx-lm takes
    wrong widths for DoRA on 3-, 5- and 6-bit linears.
    """
    Checkpoint.open(folder)
    model, config = _load(folder, trust_remote_code)
    exact = _may_run_in_float32(model, memory_share)
    norms = _norms_as_run(model, adapter) if exact else {}
    if exact:
        exact = _to_float32(model)
    slots = []
    for path, update in adapter.weights.items():
        owner, key = place(model, path)
        if isinstance(update, LowRankUpdate):
            bare, layer = _adapted(path, owner[key], update, norms.get(path))
            slots.append(_Slot(owner, key, layer, bare))
        else:
            slots.append(_replaced(owner, key, _array(update.tensor, exact)))
        slots[-1].fill()
    for name, parameter in adapter.parameters.items():
        owner, key = place(model, name)
        slots.append(_Slot(owner, key, _array(parameter.tensor, exact), owner[key]))
        slots[-1].fill()
    mx.eval(model.parameters())
    model.eval()
    return RunningModel(model, folder, config, exact, trust_remote_code, tuple(slots))


def _load(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model; its weights are read when they are first used."""
    try:
        model, config = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # mlx-lm raises these for architectures it does not know and weights that do not fit.
        raise CheckpointError(f"{folder}: mlx-lm cannot load it ({_first_line(error)})") from error
    return model, config


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _may_run_in_float32(model: nn.Module, memory_share: float) -> bool:
    if mx.default_device().type != mx.cpu:
        return False
    return _float32_bytes(model) <= memory_share * memory_bytes()


def _float32_bytes(model: nn.Module) -> int:
    """Size of all weights as float32, those of quantized modules counted unpacked."""
    count = sum(array.size for _, array in tree_flatten(model.parameters()))
    for _, module in model.named_modules():
        if type(module) in _DENSE:
            count += module.weight.size * 32 // module.bits
            packed = ("weight", "scales", "biases", "global_scale")
            count -= sum(module[leaf].size for leaf in packed if leaf in module)
    return 4 * int(count)


def _to_float32(model: nn.Module) -> bool:
    """Make every weight float32, module after module, so that the peak is about the result.

    Returns:
        Whether no quantized module is left; of some kinds mlx-lm has no dense class.
    """
    paths = [path for path, _ in model.named_modules() if path]
    for path in paths:
        owner, key = place(model, path)
        if type(owner[key]) in _DENSE:
            owner[key] = _dense(owner[key], _exact_weight(owner[key]))
        module = owner[key]
        for name, value in module.items():
            if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
                module[name] = value.astype(mx.float32)
        mx.eval([value for value in module.values() if isinstance(value, mx.array)])
    model.set_dtype(mx.float32)
    return not any("scales" in module for _, module in model.named_modules())


def _dense(module: nn.Module, weight: mx.array) -> nn.Module:
    """The dense layer of a quantized one's kind; nothing of its random weights is computed."""
    kind = _DENSE[type(module)]
    sizes = weight.shape if kind is nn.Embedding else weight.shape[::-1]
    options = {"bias": "bias" in module} if kind in (nn.Linear, SwitchLinear) else {}
    dense = kind(*sizes, **options)
    dense.weight = weight
    if "bias" in module:
        dense.bias = module.bias
    return dense


def _exact_weight(module: nn.Module) -> mx.array:
    """Float32 ``scale * code + bias`` of a quantized module; MLX rounds in the type of scales."""
    parameters = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    if module.mode == "affine":
        scales, biases = (module[key].astype(mx.float32) for key in ("scales", "biases"))
        return mx.dequantize(module.weight, scales, biases, **parameters)
    parameters["dtype"] = mx.float32
    scale = module.get("global_scale")
    if scale is None or scale.size == 1:
        if scale is not None:
            parameters["global_scale"] = scale.reshape(())
        return mx.dequantize(module.weight, module.scales, None, **parameters)
    return mx.stack(
        [
            mx.dequantize(weight, scales, None, global_scale=one, **parameters)
            for weight, scales, one in zip(module.weight, module.scales, scale, strict=True)
        ]
    )


def _weight_as_run(module: nn.Module) -> mx.array:
    """A module's weight as mlx-lm's DoRA sees it: dequantized in the type of its scales."""
    weight: mx.array = module.weight
    if type(module) not in _DENSE:
        return weight
    parameters = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return mx.dequantize(weight, module.scales, module.get("biases"), **parameters)


def _norms_as_run(model: nn.Module, adapter: Adapter) -> dict[str, mx.array]:
    """Row norms of DoRA's adapted weights as mlx-lm computes them, of rounded weights."""
    norms = {}
    for path, update in adapter.weights.items():
        if isinstance(update, LowRankUpdate) and update.magnitude is not None:
            owner, key = place(model, path)
            norms[path] = _row_norms(_weight_as_run(owner[key]), update)
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
        if dora and type(module) in _DENSE:  # mlx-lm's DoRA reads the weight of a dense one
            module = _dense(module, _weight_as_run(module))
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
        raise AdapterError(
            f"{path}: mlx-lm has no adapter layer for {type(module).__name__}; "
            "fuse into the model the adapter was trained on"
        )
    if update.magnitude is not None:
        layer.m = mx.array(update.magnitude)
        if norms_as_run is not None:
            # The layer will divide by the norms of the exact weights it holds.
            layer.m *= _row_norms(module.weight, update) / norms_as_run
    return module, layer


def _replaced(owner: Any, key: Any, weight: mx.array) -> _Slot:
    """Put the weight of a full fine-tune where a module has its own, maybe quantized."""
    module = owner[key]
    if type(module) in _DENSE:
        return _Slot(owner, key, _dense(module, weight), module)
    return _Slot(module, "weight", weight, module.weight)


def _array(tensor: TensorRef, exact: bool) -> mx.array:
    array = mx.array(tensor.read())
    if tensor.dtype == "BF16":
        array = array.view(mx.bfloat16)
    return array.astype(mx.float32) if exact else array


def place(model: nn.Module, path: str) -> tuple[Any, Any]:
    """The container and the key under which a module or parameter lies.

    Raises:
        AdapterError: when the model has no such place.
    """
    *parents, last = path.split(".")
    owner: Any = model
    try:
        for part in parents:
            owner = owner[int(part)] if isinstance(owner, list) else owner[part]
        key: Any = int(last) if isinstance(owner, list) else last
        owner[key]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise AdapterError(
            f"{path}: no module of mlx-lm's model; fuse into the model the adapter was trained on"
        ) from error
    return owner, key
