"""Families of which some layers are no attention: convolutions, linear attention."""

from mlx_fusekit.gguf.models.changes import SHARED_EXPERT_GATE, SHORT_CONVOLUTION
from mlx_fusekit.gguf.models.family import PROBABILITIES, STEPS, Family
from mlx_fusekit.gguf.models.hyperparameters import (
    BASE,
    HEADS,
    RMS_NORM,
    SHARED_EXPERT,
    SIGMOID_GATE,
    array,
    count,
    experts,
    real,
    without,
)
from mlx_fusekit.gguf.models.linear_attention import SPLIT, STATE_KEYS, STATES, TILED_STATES
from mlx_fusekit.gguf.models.requirements import (
    dense_or_routed,
    epsilon_inside,
    head_of_linear_attention,
    key_value_heads_of_lfm2,
    only,
    partial_rotation,
    sections_of_qwen35,
    width_of_lfm2,
)
from mlx_fusekit.gguf.models.rope import PLAIN_IN_MLX

HYBRIDS: dict[str, Family] = {
    "lfm2": Family(
        "LFM2",
        (
            *without(BASE, "attention.head_count_kv", "feed_forward_length"),
            array(name="attention.head_count_kv", value=key_value_heads_of_lfm2),
            count(name="feed_forward_length", value=width_of_lfm2),
            count(name="shortconv.l_cache", value="conv_L_cache"),
            real(name="attention.layer_norm_rms_epsilon", value="norm_eps"),
        ),
        rope=PLAIN_IN_MLX,
        changes=(SHORT_CONVOLUTION,),
        square_heads=True,
        checks=(only("conv_bias", False),),
    ),
    "lfm2_moe": Family(
        "LFM2MOE",
        (
            *without(BASE, "attention.head_count_kv"),
            array(name="attention.head_count_kv", value=key_value_heads_of_lfm2),
            count(name="shortconv.l_cache", value="conv_L_cache"),
            real(name="attention.layer_norm_rms_epsilon", value="norm_eps"),
            *experts("num_experts"),
            count(name="leading_dense_block_count", value="num_dense_layers"),
            SIGMOID_GATE,
        ),
        rope=PLAIN_IN_MLX,
        biases=PROBABILITIES,
        changes=(SHORT_CONVOLUTION,),
        square_heads=True,
        checks=(
            only("conv_bias", False),
            only("norm_topk_prob", True),
            only("use_expert_bias", True),
            only("routed_scaling_factor", 1),
        ),
    ),
    "qwen3_next": Family(
        "QWEN3NEXT",
        (
            *BASE,
            *HEADS,
            *RMS_NORM,
            *experts("num_experts"),
            *SHARED_EXPERT,
            *STATE_KEYS,
        ),
        rope_dims=partial_rotation,
        biases=STEPS,
        splits=SPLIT,
        changes=(SHARED_EXPERT_GATE, *STATES),
        checks=(
            only("norm_topk_prob", True),
            dense_or_routed,
            head_of_linear_attention,
            epsilon_inside,
        ),
    ),
    "qwen3_5": Family(
        "QWEN35",
        (
            *BASE,
            *HEADS,
            *RMS_NORM,
            *STATE_KEYS,
            array(name="rope.dimension_sections", value=sections_of_qwen35),
        ),
        rope_dims=partial_rotation,
        biases=STEPS,
        changes=TILED_STATES,
        checks=(
            only("num_experts", 0),
            only("attn_output_gate", None, True),
            head_of_linear_attention,
            epsilon_inside,
        ),
    ),
}
