"""Tiny real models, made on the spot from mlx-lm's own classes, and adapters for them."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model

VOCABULARY = 96

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "attention_bias": True,
}

QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "norm_topk_prob": True,
}

LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
EXPERTS = [f"mlp.switch_mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]


def make_model(
    folder: Path,
    config: dict[str, Any] = LLAMA,
    *,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = 4,
    group_size: int | None = 64,
    mode: str = "affine",
    global_scale: bool = False,
    mixed: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Save a random model as mlx-lm saves one; ``bits=None`` leaves it unquantized.

    ``mixed`` gives other quantization parameters to modules whose path ends with a key.
    """
    mx.random.seed(seed)
    config = dict(config)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(dtype)
    if bits is not None:

        def predicate(path: str, module: nn.Module) -> Any:
            for suffix, parameters in (mixed or {}).items():
                if path.endswith(suffix):
                    return parameters
            return True

        model, config = quantize_model(
            model,
            config,
            group_size,
            bits,
            mode=mode,
            global_scale=global_scale,
            quant_predicate=predicate,
        )
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def make_adapter(
    folder: Path,
    base: Path,
    *,
    kind: str = "lora",
    keys: list[str] = LINEARS,
    num_layers: int = 2,
    rank: int = 4,
    scale: float = 2.0,
    strength: float = 0.02,
    seed: int = 1,
) -> Path:
    """Save an adapter with random (not zero) updates, as mlx-lm's trainer would."""
    mx.random.seed(seed)
    model = teacher_layers(base, kind, keys, num_layers, rank, scale)
    tensors = {}
    for name, value in tree_flatten(model.parameters()):
        leaf = name.rpartition(".")[2]
        if leaf in ("lora_a", "lora_b"):
            tensors[name] = mx.random.normal(value.shape) * math.sqrt(strength / scale)
        elif leaf == "m":
            tensors[name] = value * (1 + 0.1 * mx.random.normal(value.shape))
    return save_adapter(
        folder, tensors, kind=kind, keys=keys, num_layers=num_layers, rank=rank, scale=scale
    )


def save_adapter(
    folder: Path,
    tensors: dict[str, mx.array],
    *,
    kind: str = "lora",
    keys: list[str] | None = None,
    num_layers: int = 2,
    rank: int = 4,
    scale: float = 2.0,
    **more: Any,
) -> Path:
    """Save an adapter folder of these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys
    config = {
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": None if kind == "full" else parameters,
        **more,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    return folder


def teacher_layers(
    base: Path, kind: str, keys: list[str], num_layers: int, rank: int, scale: float
) -> nn.Module:
    """The base with mlx-lm's own LoRA or DoRA layers, built with the right input widths.

    ``mlx_lm.tuner.utils.linear_to_lora_layers`` computes the width of a DoRA on 3-, 5- and 6-bit
    linears wrongly, so the layers are placed by hand.
    """
    model, _ = load_model(base)
    chosen = {}
    layers = model.layers[-num_layers:]
    inside = {id(m): None for layer in layers for _, m in layer.named_modules()}
    for path, module in model.named_modules():
        in_layer = any(path.endswith("." + key) for key in keys) and id(module) in inside
        if not (path in keys or in_layer):
            continue
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            chosen[path] = LoRASwitchLinear.from_base(module, rank, 0.0, scale)
        elif kind == "dora" and isinstance(module, nn.Embedding):
            chosen[path] = DoRAEmbedding.from_base(module, rank, 0.0, scale)
        elif isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            chosen[path] = LoRAEmbedding.from_base(module, rank, 0.0, scale)
        elif kind == "dora":
            rows, columns = module.weight.shape
            if isinstance(module, nn.QuantizedLinear):
                columns = columns * 32 // module.bits
            layer = DoRALinear(columns, rows, rank, 0.0, scale)
            layer.set_linear(module)
            chosen[path] = layer
        else:
            chosen[path] = LoRALinear.from_base(module, rank, 0.0, scale)
    from mlx.utils import tree_unflatten

    model.update_modules(tree_unflatten(list(chosen.items())))
    model.eval()
    return model


def in_float32(model: nn.Module) -> nn.Module:
    """The same model with every quantized weight dequantized exactly, all in float32.

    What remains between two such models is their weights, not the rounding of 16-bit kernels, and
    experts run on the CPU backend, which multiplies gathered matrices in float32 only.
    """
    from mlx.utils import tree_unflatten

    replaced = []
    for path, module in model.named_modules():
        if not isinstance(
            module, nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear
        ):
            continue
        weight = dequantized(module)
        if isinstance(module, nn.QuantizedEmbedding):
            dense: nn.Module = nn.Embedding(*weight.shape)
        elif isinstance(module, QuantizedSwitchLinear):
            dense = SwitchLinear(
                weight.shape[2], weight.shape[1], weight.shape[0], bias="bias" in module
            )
        else:
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in module)
        dense.weight = weight
        if "bias" in module:
            dense.bias = module.bias
        replaced.append((path, dense))
    model.update_modules(tree_unflatten(replaced))
    model.set_dtype(mx.float32)
    return model


def dequantized(module: nn.Module) -> mx.array:
    """A quantized module's weight, in float32 throughout."""
    biases = module.biases
    scales = module.scales
    if module.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    more = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    global_scale = module.get("global_scale") if isinstance(module, QuantizedSwitchLinear) else None
    if global_scale is None:
        return mx.dequantize(module.weight, scales, biases, dtype=mx.float32, **more)
    return mx.stack(
        [
            mx.dequantize(
                module.weight[e],
                scales[e],
                None,
                global_scale=global_scale[e],
                dtype=mx.float32,
                **more,
            )
            for e in range(module.weight.shape[0])
        ]
    )


def logits(model: nn.Module) -> mx.array:
    """Logits of a fixed token sequence, float32 ``[1, tokens, vocabulary]``."""
    tokens = mx.array([[(7 * i + 3) % VOCABULARY for i in range(24)]])
    return model(tokens).astype(mx.float32)
