"""A tiny configuration for every architecture, with what is hard about it, and models of them.

Sizes are multiples of 64, so that everything can be quantized in groups of 64. Texts in the tests
have 40 tokens: windows are shorter, and the original contexts of scaled rotary embeddings too.
Epsilons are large, so that a wrong one shows.
"""

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes, quantize_model, save_config, save_model

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.sanitized import open_base

VOCABULARY = 96

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "type": "longrope",
    "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.05 * i for i in range(16)],
    "long_factor": [1.0 + 0.4 * i for i in range(16)],
}

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-2,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}
_SECTIONS = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _config(model_type: str, **more: Any) -> dict[str, Any]:
    return {**_COMMON, "model_type": model_type, **more}


_LLAMA = _config("llama", attention_bias=True, mlp_bias=True, rope_scaling=LLAMA3)

#: By name: the model type, and what is special after a slash.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama/tied,head_dim": _config("llama", tie_word_embeddings=True, head_dim=64),
    "llama/yarn": _config("llama", rope_scaling=YARN),
    "llama/linear,traditional": _config(
        "llama", rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_traditional=True
    ),
    "llama/longrope": _config("llama", rope_scaling=LONGROPE),
    "mistral": _config("mistral", head_dim=64),
    "mixtral": _config("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _config("qwen2", tie_word_embeddings=True, rope_scaling=YARN),
    "qwen2_moe": _config("qwen2_moe", **_EXPERTS, shared_expert_intermediate_size=128),
    "qwen3": _config("qwen3", head_dim=64, tie_word_embeddings=True),
    "qwen3/rope_parameters": {
        **_config(
            "qwen3",
            head_dim=64,
            rope_parameters={**YARN, "rope_type": "yarn", "rope_theta": 7000.0, "type": None},
        ),
        "rope_theta": None,
    },
    "qwen3_moe": _config(
        "qwen3_moe",
        **_EXPERTS,
        head_dim=64,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
    ),
    "gemma": _config("gemma", head_dim=64, hidden_activation="gelu_pytorch_tanh"),
    "gemma2": _config(
        "gemma2",
        head_dim=64,
        query_pre_attn_scalar=64,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=12.0,
    ),
    "gemma3_text": _config(
        "gemma3_text",
        num_hidden_layers=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=8,
        sliding_window_pattern=3,
        rope_local_base_freq=900.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "gemma3": {
        "model_type": "gemma3",
        "vocab_size": VOCABULARY,
        "text_config": _config(
            "gemma3_text",
            num_hidden_layers=6,
            head_dim=64,
            query_pre_attn_scalar=64,
            sliding_window=8,
        ),
    },
    "phi": _config("phi", layer_norm_eps=1e-2, partial_rotary_factor=0.5, hidden_act="gelu_new"),
    "phi3": _config("phi3", partial_rotary_factor=0.5, sliding_window=8),
    "phi3/longrope": _config(
        "phi3",
        rope_scaling=LONGROPE,
        original_max_position_embeddings=16,
        tie_word_embeddings=True,
    ),
    "olmo2": _config("olmo2", tie_word_embeddings=True, rope_scaling=YARN),
    "olmo3": _config(
        "olmo3",
        num_hidden_layers=4,
        sliding_window=8,
        layer_types=[
            "sliding_attention",
            "full_attention",
            "full_attention",
            "sliding_attention",
        ],
        rope_scaling=YARN,
    ),
    "olmoe": _config(
        "olmoe",
        num_experts=4,
        num_experts_per_tok=2,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    "starcoder2": _config(
        "starcoder2", norm_epsilon=1e-2, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"
    ),
    "stablelm": _config(
        "stablelm", layer_norm_eps=1e-2, partial_rotary_factor=0.25, use_qkv_bias=True
    ),
    "stablelm/parallel": _config(
        "stablelm",
        layer_norm_eps=1e-2,
        partial_rotary_factor=0.5,
        use_qkv_bias=False,
        use_parallel_residual=True,
    ),
    "granite": _config(
        "granite",
        attention_bias=True,
        mlp_bias=True,
        logits_scaling=4.0,
        attention_multiplier=0.3,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        tie_word_embeddings=True,
    ),
    "granitemoe": _config(
        "granitemoe",
        attention_bias=True,
        logits_scaling=4.0,
        attention_multiplier=0.3,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "cohere": _config("cohere", layer_norm_eps=1e-2, logit_scale=0.5),
    "cohere2": _config(
        "cohere2",
        num_hidden_layers=4,
        head_dim=32,
        layer_norm_eps=1e-2,
        logit_scale=0.5,
        sliding_window=8,
        sliding_window_pattern=2,
    ),
    "smollm3": _config("smollm3", num_hidden_layers=5, tie_word_embeddings=True),
    "ministral3": _config(
        "ministral3",
        head_dim=64,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 1.0,
            "beta_slow": 0.2,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.2,
        },
    ),
    "glm4": _config("glm4", attention_bias=True, head_dim=64, partial_rotary_factor=0.5),
    "glm4_moe": _config(
        "glm4_moe",
        num_hidden_layers=3,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        n_group=2,
        topk_group=1,
        head_dim=64,
        n_shared_experts=1,
        n_routed_experts=8,
        routed_scaling_factor=1.7,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        rope_scaling=None,
        use_qk_norm=True,
        attention_bias=True,
        partial_rotary_factor=0.5,
    ),
    "gpt_oss": _config(
        "gpt_oss",
        head_dim=64,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "deepseek_v3": _config(
        "deepseek_v3",
        num_hidden_layers=3,
        num_key_value_heads=4,
        moe_intermediate_size=64,
        n_shared_experts=1,
        n_routed_experts=8,
        routed_scaling_factor=1.7,
        kv_lora_rank=64,
        q_lora_rank=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        qk_nope_head_dim=64,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        rms_norm_eps=1e-6,
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "lfm2": _config(
        "lfm2",
        num_hidden_layers=3,
        norm_eps=1e-2,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=128,
        block_ff_dim=192,
        block_multiple_of=64,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=True,
        full_attn_idxs=[1],
    ),
    "lfm2_moe": _config(
        "lfm2_moe",
        **_EXPERTS,
        num_hidden_layers=3,
        norm_topk_prob=True,
        use_expert_bias=True,
        num_dense_layers=1,
        norm_eps=1e-2,
        conv_bias=False,
        conv_L_cache=3,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "seed_oss": _config("seed_oss", head_dim=64, attention_bias=True),
    "exaone4": _config(
        "exaone4",
        head_dim=32,
        rope_scaling=LLAMA3,
        sliding_window=None,
        sliding_window_pattern=None,
        tie_word_embeddings=True,
    ),
    "exaone4/window": _config(
        "exaone4",
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_hidden_layers=64,
        rope_scaling=LLAMA3,
        sliding_window=8,
        sliding_window_pattern="LLG",
    ),
    "ernie4_5": _config("ernie4_5", head_dim=64, use_bias=False, tie_word_embeddings=True),
    "minicpm": _config("minicpm", dim_model_base=64, scale_depth=1.4, scale_emb=3.0),
    "minicpm/longrope": _config(
        "minicpm", dim_model_base=64, scale_depth=1.4, scale_emb=3.0, rope_scaling=LONGROPE
    ),
    "nemotron": _config(
        "nemotron",
        hidden_act="relu2",
        norm_eps=1e-2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        partial_rotary_factor=0.5,
    ),
    "qwen3_next": _config(
        "qwen3_next",
        **_EXPERTS,
        rms_norm_eps=1e-6,
        num_hidden_layers=4,
        head_dim=64,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[],
        partial_rotary_factor=0.25,
        norm_topk_prob=True,
        full_attention_interval=2,
    ),
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": _config("qwen3_vl_text", head_dim=32, rope_scaling=_SECTIONS),
    },
    "qwen3_vl_moe": {
        "model_type": "qwen3_vl_moe",
        "text_config": _config(
            "qwen3_vl_moe_text",
            head_dim=32,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            rope_scaling=_SECTIONS,
            **_EXPERTS,
        ),
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {
            **_config(
                "qwen3_5_text",
                rms_norm_eps=1e-6,
                num_hidden_layers=2,
                full_attention_interval=2,
                head_dim=64,
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=32,
                linear_value_head_dim=32,
                linear_conv_kernel_dim=4,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 5000.0,
                    "partial_rotary_factor": 0.25,
                    "mrope_section": [3, 3, 2],
                },
            ),
        },
    },
}


def make_model(folder: Path, name: str, *, bits: int | None = None) -> Path:
    """Save a random model of a configuration, by its name, as mlx-lm saves one.

    Norms are far from one, biases far from zero, and attention far from uniform.
    """
    mx.random.seed(0)
    config = copy.deepcopy(CONFIGS[name])
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(copy.deepcopy(config)))
    _tie_gemma3(model)
    parameters = [(path, _hard(path, value)) for path, value in tree_flatten(model.parameters())]
    model.update(tree_unflatten(parameters))
    if bits is not None:
        model.set_dtype(mx.bfloat16)
        model, config = quantize_model(model, config, 64, bits)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def _tie_gemma3(model: Any) -> None:
    """As mlx-lm does when it loads a gemma3 without lm_head, as all of them are."""
    if model.model_type.startswith("gemma3"):
        text = getattr(model, "language_model", model)
        text.tie_word_embeddings = True
        text.pop("lm_head")


def _hard(path: str, value: mx.array) -> mx.array:
    leaf = path.rpartition(".")[2]
    if leaf in ("e_score_correction_bias", "expert_bias"):
        # mlx-lm takes masked groups of experts to score zero, llama.cpp minus infinity.
        return 0.1 * mx.abs(mx.random.normal(value.shape))
    if path.endswith("mlp.gate.weight"):
        return 0.2 * mx.random.normal(value.shape)
    if leaf in ("bias", "sinks"):
        return 0.3 * mx.random.normal(value.shape)
    if value.ndim == 1:
        return value if leaf == "A_log" else value + 0.3 * mx.random.normal(value.shape)
    return value if "embed" in path or value.ndim > 2 else 3 * value


def make_changed(folder: Path, name: str, changes: dict[str, Any], **removed: None) -> BaseModel:
    """A model of which the configuration was changed afterwards."""
    make_model(folder, name)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    block = config.get("text_config", config)
    block.update(changes)
    for key in removed:
        del block[key]
    path.write_text(json.dumps(config))
    return open_base(folder)
