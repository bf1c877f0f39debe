"""Adapters that PEFT saved, and what PEFT makes of them: ``merge_and_unload()`` in float32.

    .venv-peft/bin/python scripts/peft_reference.py FOLDER
    .venv-peft/bin/python scripts/peft_reference.py FOLDER BASE ADAPTER [BASE ADAPTER]...

Runs where torch, transformers and peft are installed, on tiny random models of transformers'. In
FOLDER lie the bases, and for each adapter NAME the folder NAME and the merged model NAME-merged;
of two adapters combined by PEFT, ties-a, ties-b and ties-merged. With bases and adapters named, in
FOLDER, it merges those that somebody else wrote.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
#: What mlx-lm looks for, and transformers 5 calls otherwise.
_FOR_MLX_LM = {
    "num_experts": 4,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 2,
}
BASES = {
    "llama": LlamaConfig(**_SIZES, attention_bias=True),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16),
    "qwen3_moe": Qwen3MoeConfig(
        **_SIZES,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        decoder_sparse_step=1,
        norm_topk_prob=True,
    ),
    "gpt_oss": GptOssConfig(**_SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_next": Qwen3NextConfig(
        **_SIZES,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
}
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: By name: the base, and the settings besides rank 4 and alpha 8.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("qwen3", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": r".*\.(q|up)_proj", "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "rank_pattern": {"up_proj": 6, r"layers\.1\.self_attn\.q_proj": 2},
            "alpha_pattern": {"up_proj": 3, "^model.layers.0.mlp.down_proj": 20},
        },
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "bias-all": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias-lora-only": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [100, 3]}),
    "one-layer": ("qwen3", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}),
    "gate-and-up": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": _EXPERTS[:1]},
    ),
    "by-turns": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}),
    "norms": (
        "qwen3_next",
        {"target_modules": ["o_proj"], "modules_to_save": ["norm", "q_norm", "conv1d"]},
    ),
    "down": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS[1:]}),
}


def main(folder: Path) -> None:
    """Write them all."""
    for name, config in BASES.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).float()
        for parameter, value in model.named_parameters():
            if parameter.endswith("bias"):
                torch.nn.init.normal_(value, std=0.1)
        _save(model, folder / name)
    for name, (base, settings) in ADAPTERS.items():
        model = AutoModelForCausalLM.from_pretrained(folder / base, dtype=torch.float32)
        torch.manual_seed(2)
        chosen = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)
        adapted = get_peft_model(model, chosen)
        with torch.no_grad():  # in the place of training, which begins with updates of zero
            for value in adapted.parameters():
                if value.requires_grad:
                    value.add_(torch.randn_like(value) * 0.05)
        adapted.save_pretrained(folder / name)
        _save(adapted.merge_and_unload(), folder / f"{name}-merged")
    for saved in (folder / "gpt_oss", folder / "by-turns-merged"):
        _turn_experts(saved / "model.safetensors")


def combine(folder: Path) -> None:
    """Two adapters of different ranks, and what PEFT makes of them by ``ties_svd``."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    for number, (name, rank) in enumerate({"a": 4, "b": 6}.items()):
        torch.manual_seed(3 + number)
        chosen = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=8, target_modules=["q_proj", "up_proj"]
        )
        if name == "a":
            adapted = get_peft_model(model, chosen, adapter_name=name)
        else:
            adapted.add_adapter(name, chosen)
        with torch.no_grad():
            for parameter, value in adapted.named_parameters():
                if f".{name}." in parameter:
                    value.add_(torch.randn_like(value) * 0.05)
    for name in ("a", "b"):
        adapted.save_pretrained(folder / "combined", selected_adapters=[name])
    adapted.add_weighted_adapter(
        ["a", "b"], [1.0, 1.0], "both", combination_type="ties_svd", density=0.3, svd_rank=64
    )
    adapted.set_adapter("both")
    _save(adapted.merge_and_unload(adapter_names=["both"]), folder / "ties-merged")


def merge(folder: Path, names: list[str]) -> None:
    """Adapters from folders, all of whose tensors PEFT has to find a place for."""
    warnings.filterwarnings("error", message=r"(?is).*(missing|unexpected).*keys.*")
    for base, adapter in zip(names[::2], names[1::2], strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder / base, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, folder / adapter)
        _save(adapted.merge_and_unload(), folder / f"{adapter}-merged")


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(_FOR_MLX_LM | json.loads(path.read_text())))


def _turn_experts(path: Path) -> None:
    """Write experts as ``[experts, out, in]``: mlx-lm expects them so, of GPT-OSS in 4 bits too."""
    turned = {}
    for name, value in load_file(path).items():
        is_experts = value.ndim == 3 and name.endswith("_proj")
        turned[f"{name}.weight" if is_experts else name] = (
            value.transpose(1, 2).contiguous() if is_experts else value
        )
    save_file(turned, path, {"format": "pt"})


if __name__ == "__main__":
    if len(sys.argv) > 2:
        merge(Path(sys.argv[1]), sys.argv[2:])
    else:
        main(Path(sys.argv[1]))
        combine(Path(sys.argv[1]))
