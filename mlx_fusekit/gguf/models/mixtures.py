"""Families of which layers are mixtures of experts."""

from dataclasses import replace

from mlx_fusekit.gguf.models.changes import INTERLEAVED, SHARED_EXPERT_GATE
from mlx_fusekit.gguf.models.family import ATTENTION, PROBABILITIES, QKV, Family
from mlx_fusekit.gguf.models.hyperparameters import (
    BASE,
    GRANITE_SCALES,
    HEADS,
    RMS_NORM,
    SHARED_EXPERT,
    SIGMOID_GATE,
    WINDOW,
    array,
    count,
    experts,
    flag,
    real,
    sliding_pattern,
    without,
)
from mlx_fusekit.gguf.models.requirements import (
    QWEN3_VL_KEYS,
    QWEN3_VL_NOTES,
    dense_or_routed,
    epsilon_inside,
    groups,
    normalizes,
    only,
    partial_rotation,
    queries_of_deepseek,
    same_heads,
)
from mlx_fusekit.gguf.models.rope import ALL_FACTORS, PLAIN_IN_MLX, RopeStyle

_DEEPSEEK_EXPERTS = (
    *experts("n_routed_experts"),
    count(name="expert_shared_count", value="n_shared_experts"),
    count(name="leading_dense_block_count", value="first_k_dense_replace"),
    count(name="expert_group_count", value=groups("n_group")),
    count(name="expert_group_used_count", value=groups("topk_group")),
    SIGMOID_GATE,
    real(name="expert_weights_scale", value="routed_scaling_factor"),
    flag(name="expert_weights_norm", value=normalizes),
)

MIXTURES: dict[str, Family] = {
    "mixtral": Family(
        "LLAMA",
        (*BASE, *HEADS, *RMS_NORM, *experts("num_local_experts", "intermediate_size")[:2]),
        rope=replace(ALL_FACTORS, ignored_by_mlx=True),
        changes=INTERLEAVED,
    ),
    "qwen2_moe": Family(
        "QWEN2MOE",
        (
            *BASE,
            *RMS_NORM,
            *experts("num_experts"),
            *SHARED_EXPERT,
        ),
        rope=PLAIN_IN_MLX,
        biases=QKV,
        changes=(SHARED_EXPERT_GATE,),
        needs_head=True,
        square_heads=True,
    ),
    "qwen3_moe": Family(
        "QWEN3MOE",
        (*BASE, *HEADS, *RMS_NORM, *experts("num_experts")),
        rope=PLAIN_IN_MLX,
        checks=(only("norm_topk_prob", True), dense_or_routed),
    ),
    "qwen3_vl_moe": Family(
        "QWEN3VLMOE",
        (
            *BASE,
            *HEADS,
            *RMS_NORM,
            *experts("num_experts"),
            *QWEN3_VL_KEYS,
        ),
        notes=QWEN3_VL_NOTES,
        rope=PLAIN_IN_MLX,
        checks=(only("norm_topk_prob", True), dense_or_routed),
    ),
    "olmoe": Family(
        "OLMOE",
        (*BASE, *RMS_NORM, *experts("num_experts", "intermediate_size")[:2]),
        needs_head=True,
        square_heads=True,
        checks=(only("norm_topk_prob", False), only("clip_qkv", None), same_heads),
    ),
    "granitemoe": Family(
        "GRANITE_MOE",
        (
            *BASE,
            *RMS_NORM,
            *GRANITE_SCALES,
            *experts("num_local_experts", "intermediate_size")[:2],
        ),
        rope=ALL_FACTORS,
        changes=INTERLEAVED,
        biases=ATTENTION,
    ),
    "glm4_moe": Family(
        "GLM4_MOE",
        (*BASE, *HEADS, *RMS_NORM, *_DEEPSEEK_EXPERTS),
        rope=PLAIN_IN_MLX,
        rope_dims=partial_rotation,
        biases=QKV | PROBABILITIES,
        checks=(only("scoring_func", "sigmoid"), only("topk_method", "noaux_tc")),
    ),
    "gpt_oss": Family(
        "GPT_OSS",
        (
            *BASE,
            *HEADS,
            *RMS_NORM,
            *WINDOW,
            array(name="attention.sliding_window_pattern", value=sliding_pattern(2, default=2)),
            *experts("num_local_experts", "intermediate_size"),
        ),
        biases=ATTENTION
        | {
            "ffn_gate_inp.bias",
            "ffn_gate_exps.bias",
            "ffn_up_exps.bias",
            "ffn_down_exps.bias",
        },
        needs_head=True,
        checks=(only("swiglu_limit", None, 7),),
    ),
    "deepseek_v3": Family(
        "DEEPSEEK2",
        (
            *without(BASE, "attention.head_count_kv"),
            *RMS_NORM,
            *_DEEPSEEK_EXPERTS,
            count(name="attention.head_count_kv", value=1),
            count(name="attention.q_lora_rank", value=lambda s: s.get("q_lora_rank", 0)),
            count(name="attention.kv_lora_rank", value="kv_lora_rank"),
            count(
                name="attention.key_length",
                value=lambda s: s["kv_lora_rank"] + s["qk_rope_head_dim"],
            ),
            count(name="attention.value_length", value="kv_lora_rank"),
            count(
                name="attention.key_length_mla",
                value=lambda s: s["qk_nope_head_dim"] + s["qk_rope_head_dim"],
            ),
            count(name="attention.value_length_mla", value="v_head_dim"),
        ),
        rope=RopeStyle(yarn_multiplier=0.1),
        rope_dims=lambda s: int(s["qk_rope_head_dim"]),
        rotates_pairs=True,
        biases=PROBABILITIES,
        checks=(
            only("scoring_func", "sigmoid"),
            only("topk_method", "noaux_tc"),
            only("moe_layer_freq", 1),
            queries_of_deepseek,
            epsilon_inside,
        ),
    ),
}
