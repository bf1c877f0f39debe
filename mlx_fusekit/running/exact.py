"""Weights as float32, without any rounding.

MLX's CPU backend multiplies quantized and 16-bit matrices slowly, and 16-bit experts not at all, so
there every weight becomes float32: what is then compared are the weights of two models, not the
kernels that ran them. On Metal and CUDA a model runs in its own format.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_fusekit.formats.specs import LEAVES
from mlx_fusekit.machine import memory_bytes
from mlx_fusekit.running.model import place

#: The share of the machine's memory that a model made float32 may take.
MEMORY_SHARE = 0.6

_DENSE = {
    nn.QuantizedLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
    QuantizedSwitchLinear: SwitchLinear,
    QuantizedMultiLinear: MultiLinear,
}


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is packed, and there is a dense layer of its kind."""
    return type(module) in _DENSE


def may_run_in_float32(model: nn.Module, memory_share: float) -> bool:
    """Whether a model is to become float32: on the CPU, where it then takes at most this share."""
    if mx.default_device().type != mx.cpu:
        return False
    return _float32_bytes(model) <= memory_share * memory_bytes()


def _float32_bytes(model: nn.Module) -> int:
    """Size of all weights as float32, those of quantized modules counted unpacked."""
    count = sum(array.size for _, array in tree_flatten(model.parameters()))
    for _, module in model.named_modules():
        if is_quantized(module):
            count += module.weight.size * 32 // module.bits
            count -= sum(module[leaf].size for leaf in LEAVES if leaf in module)
    return 4 * int(count)


def to_float32(
    model: nn.Module, paths: Sequence[str] | None = None, *, computed: bool = True
) -> bool:
    """Make every weight float32, module after module, so that the peak is about the result.

    Args:
        model: mlx-lm's.
        paths: of the modules; None for all.
        computed: whether it is done now, or when a weight is first used.

    Returns:
        Whether no quantized module is left; of some kinds mlx-lm has no dense class.
    """
    own = [path for path, _ in model.named_modules() if path] if paths is None else paths
    for path in own:
        where = place(model, path)
        if is_quantized(where.value):
            where.put(dense(where.value, _exact_weight(where.value)))
        module = where.value
        for name, value in module.items():
            if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
                module[name] = value.astype(mx.float32)
        if computed:
            mx.eval([value for value in module.values() if isinstance(value, mx.array)])
    if paths is None:
        model.set_dtype(mx.float32)  # what the model itself has
    return not any("scales" in place(model, path).value for path in own)


def dense(module: nn.Module, weight: mx.array) -> nn.Module:
    """The dense layer of a quantized one's kind; nothing of its random weights is computed."""
    kind = _DENSE[type(module)]
    sizes = weight.shape if kind is nn.Embedding else weight.shape[::-1]
    options = {"bias": "bias" in module} if kind in (nn.Linear, SwitchLinear) else {}
    layer = kind(*sizes, **options)
    layer.weight = weight
    if "bias" in module:
        layer.bias = module.bias
    return layer


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


def weight_as_run(module: nn.Module) -> mx.array:
    """A module's weight as mlx-lm's DoRA sees it: dequantized in the type of its scales."""
    weight: mx.array = module.weight
    if not is_quantized(module):
        return weight
    parameters = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return mx.dequantize(weight, module.scales, module.get("biases"), **parameters)
