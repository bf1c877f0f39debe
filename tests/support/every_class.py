"""A tiny configuration of every model class that mlx-lm has.

``SIZES`` holds what most configurations call their settings; a class takes those that its
``ModelArgs`` knows, and ``SPECIAL`` adds what it needs besides. Widths are multiples of 32, so that
everything can be quantized in groups of 32, and windows are shorter than the text that is run.
"""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import mlx_lm.models

VOCABULARY = 96

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "sliding_window": 8,
    # experts
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
    # latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "index_head_dim": 64,
    "index_n_heads": 2,
    "index_topk": 8,
    # linear attention and state spaces
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "layer_group_size": 2,
    "group_norm_size": 1,
    "conv_kernel": 4,
    "state_size": 32,
    "n_groups": 1,
    "use_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 32,
    "mamba_n_groups": 1,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    # granite and its kin
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    # GPT's names
    "n_embd": 64,
    "n_inner": 96,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 512,
    "n_ctx": 512,
    "num_layers": 2,
}

_ROTARY = {"rope_type": "default", "rope_theta": 5000.0}
_EVERY_KIND = {"full_attention": _ROTARY, "sliding_attention": _ROTARY}
_BOTH = ["sliding_attention", "full_attention"]


_LLAMA4_ROTARY = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.2,
}
_GEMMA3 = {
    "text_config": {**SIZES, "model_type": "gemma3_text", "sliding_window_pattern": 2},
}
_GEMMA4 = {
    **SIZES,
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "global_head_dim": 64,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
    "layer_types": _BOTH * 2,
    "enable_moe_block": True,
    "top_k_experts": 2,
    "tie_word_embeddings": True,
}
_KIMI_LINEAR = {
    "num_heads": 4,
    "head_dim": 32,
    "kda_layers": [1],
    "full_attn_layers": [2],
    "short_conv_kernel_size": 4,
}
_LFM2 = {
    "layer_types": ["conv", "full_attention"],
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
_LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 96,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 64,
    "zero_expert_num": 1,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
_MINICPM = {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 3.0}
_QWEN3_5 = {
    **SIZES,
    "model_type": "qwen3_5_text",
    "num_experts": 0,
    "rope_parameters": {
        "type": "default",
        "mrope_section": [3, 3, 2],
        "rope_theta": 5000.0,
        "partial_rotary_factor": 0.5,
    },
}


def _nested(of: str, **more: Any) -> dict[str, Any]:
    return {"text_config": {**_known(of), "model_type": of, **more}}


def _known(name: str) -> dict[str, Any]:
    fields = inspect.signature(_module(name).ModelArgs).parameters
    return {key: value for key, value in SIZES.items() if key in fields}


def _module(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{name}")


#: By class: what it needs besides.
SPECIAL: dict[str, dict[str, Any]] = {
    "afm7": {
        "hidden_dim": 64,
        "num_layers": 3,
        "num_kv_reuse_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 1.5,
    },
    "afmoe": {"layer_types": _BOTH, "num_dense_layers": 1},
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "cohere2": {"head_dim": 16, "sliding_window_pattern": 2},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 5000.0},
    },
    "deepseek_v2": {
        "topk_method": "greedy",
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "deepseek_v41": {
        "o_groups": 2,
        "o_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 8,
    },
    "exaone": {"head_dim": 16},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _BOTH, "is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gear": {
        "layer_types": ["conv_mixer", "sliding_attention", "full_attention"],
        "num_hidden_layers": 3,
    },
    "gemma3": _GEMMA3,
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3n": {
        "text_config": {
            **SIZES,
            "model_type": "gemma3n_text",
            "num_hidden_layers": 4,
            "intermediate_size": 64,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "rope_local_base_freq": 900.0,
            "final_logit_softcapping": 12.0,
            "layer_types": _BOTH * 2,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            "hidden_size_per_layer_input": 32,
            "altup_num_inputs": 2,
            "altup_coef_clip": 1.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 32,
        }
    },
    "gemma4": {"text_config": {"model_type": "gemma4_text", **_GEMMA4}},
    "gemma4_text": _GEMMA4,
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"rope_parameters": _ROTARY},
    "granite": {"intermediate_size": 128},  # always in groups of 64
    "granitemoe": {"intermediate_size": 128},
    "gpt_neox": {"rotary_emb_base": 5000.0, "rotary_pct": 0.5},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 2.0},
    },
    "jamba": {
        "num_hidden_layers": 3,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
        "mamba_dt_rank": 32,
    },
    "kimi_k25": _nested("deepseek_v3"),
    "kimi_k3": {
        "text_config": {
            **SIZES,
            "model_type": "kimi_linear",
            "linear_attn_config": _KIMI_LINEAR,
            "num_experts_per_token": 2,
            "mla_use_output_gate": True,
            "attn_res_block_size": 1,
            "activation_situ_beta": 1.0,
            "activation_situ_linear_beta": 1.0,
        }
    },
    "kimi_linear": {
        "linear_attn_config": _KIMI_LINEAR,
        "model_max_length": 512,
        "num_experts_per_token": 2,
    },
    "kimi_vl": _nested("deepseek_v3"),
    "lfm2": _LFM2,
    "lfm2-vl": {"text_config": {**SIZES, "model_type": "lfm2", **_LFM2}},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "conv_bias": False,
        "conv_L_cache": 3,
    },
    "lille-130m": {"block_size": 512, "n_kv_heads": 2},
    "llama4": {
        "text_config": {
            **SIZES,
            "num_hidden_layers": 4,
            "model_type": "llama4_text",
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
            "rope_scaling": None,
        }
    },
    "llama4_text": {"intermediate_size_mlp": 64, "no_rope_layers": [1, 0]},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": {
        **_LONGCAT,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 2,
        "emb_split_num": 2,
    },
    "mamba": {"time_step_rank": 32, "intermediate_size": 128},
    "mamba2": {"num_heads": 4, "time_step_limit": [0.0, 10.0], "time_step_rank": 32},
    "mellum": {"layer_types": _BOTH, "rope_parameters": _EVERY_KIND},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "swa_rope_theta": 900.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
    },
    "minicpm": _MINICPM,
    "minicpm3": {
        **_MINICPM,
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 16,
            "short_factor": [1.0 + 0.05 * i for i in range(16)],
            "long_factor": [1.0 + 0.4 * i for i in range(16)],
        },
    },
    "minimax": {"rotary_dim": 16},
    "minimax_m3_vl": {
        "text_config": {**SIZES, "dense_intermediate_size": 96, "moe_layer_freq": [0, 1]}
    },
    "ministral3": {"rope_parameters": _LLAMA4_ROTARY},
    "mistral3": _nested("llama"),
    "mistral4": {"rope_parameters": {**_LLAMA4_ROTARY, "rope_type": "default"}},
    "muse_glimmer": {"layer_types": _BOTH},
    "muse_spark": {
        "text_config": {
            **SIZES,
            "post_norm_eps": 1e-5,
            "rope_parameters": _ROTARY,
            "layer_rope_theta": [5000.0, 0.0],
            "layer_types": _BOTH,
            "final_logit_softcapping": 12.0,
            "output_multiplier": 0.5,
            "moe_hidden_size": 32,
            "num_shared_experts": 0,
        }
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {
                    "n_heads_in_group": 2,
                    "no_op": False,
                    "replace_with_linear": False,
                },
                "ffn": {"ffn_mult": 1.5, "no_op": False, "replace_with_linear": False},
            },
            {
                "attention": {
                    "n_heads_in_group": None,
                    "no_op": False,
                    "replace_with_linear": True,
                },
                "ffn": {"ffn_mult": None, "no_op": False, "replace_with_linear": True},
            },
        ]
    },
    "nemotron_h": {"ssm_state_size": 32, "hybrid_override_pattern": ["M", "*", "-", "E"]},
    "olmo3": {"layer_types": _BOTH},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 1.5],
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
        "mup_width_multiplier": 2.0,
        "vocab_size": 100352,  # mlx-lm masks tokens up to 100351
    },
    "phixtral": {"num_vocab": VOCABULARY, "model_dim": 64, "num_heads": 4, "rotary_dim": 8},
    "pixtral": _nested("llama"),
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 32, "full_attention_idx": [1]},
    "prism_hadamard_qwen35": {
        "text_config": {**_QWEN3_5, "hidden_size": 128, "intermediate_size": 128},
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.1.mlp.down_proj",
                "block": 0,
                "embedding": False,
                "dtype": "float16",
            }
        ],
    },
    "qwen": {"kv_channels": 16},
    "qwen2_vl": _nested("qwen2"),
    "qwen3_5": {"text_config": _QWEN3_5},
    "qwen3_5_moe": {"text_config": {**_QWEN3_5, "num_experts": 4}},
    "qwen3_vl": _nested("qwen3"),
    "qwen3_vl_moe": _nested("qwen3_moe"),
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 12.0,
        "attention_window_size": 8,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {  # groups of 64 always
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 64,
        "gate_low_rank_dim": 64,
        "decay_low_rank_dim": 64,
    },
    "spark2_5": {"rope_parameters": _EVERY_KIND, "layer_types": _BOTH},
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {
        "num_attention_groups": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "moe_top_k": 2,
        "share_expert_dim": 64,
        "moe_layers_enum": "1",
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
    },
}


#: Classes that are not run, and why.
NOT_RUN = {
    "bitnet": "its layers have a kernel for Metal only",
    "muse_spark": "its attention has a kernel for Metal only",
    "olmo": "mlx-lm wants the package ai2-olmo for it",
}
#: What only older versions of mlx-lm have, by today's name.
RENAMED = {"muse_spark_open": "muse_spark"}


def runnable() -> list[str]:
    """Names of those that run here."""
    return [name for name in names() if name not in NOT_RUN and name not in RENAMED]


def names() -> list[str]:
    """Of the modules of mlx-lm that have a model class."""
    has_one = re.compile(r"^(class|from \S+ import) Model\b", re.MULTILINE)
    files = sorted(Path(mlx_lm.models.__path__[0]).glob("*.py"))
    return [file.stem for file in files if has_one.search(file.read_text("utf-8"))]


def config_of(name: str) -> dict[str, Any]:
    """The configuration of a class, by its module's name."""
    return {"model_type": name, **_known(name), **SPECIAL.get(name, {})}


def model_of(name: str) -> Any:
    """mlx-lm's model of it, with the weights that it begins with."""
    module = _module(name)
    return module.Model(module.ModelArgs.from_dict(config_of(name)))
