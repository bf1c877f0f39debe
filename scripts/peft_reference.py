"""Adapters that PEFT saved, and what PEFT makes of them: ``merge_and_unload()`` in float32.

    .venv-peft/bin/python scripts/peft_reference.py FOLDER

Runs where torch, transformers and peft are installed, on tiny random models of transformers'. In
FOLDER lie the bases, and for each adapter NAME the folder NAME and the merged model NAME-merged.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

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
_FOR_MLX_LM = {"num_experts": 4, "rope_theta": 10000.0}
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
    "one-layer": ("qwen3", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}),
    "gate-and-up": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": _EXPERTS[:1]},
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


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(_FOR_MLX_LM | json.loads(path.read_text())))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
