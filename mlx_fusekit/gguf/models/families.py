"""The architectures that can be exported: one entry for each of mlx-lm's model types.

An entry says which llama.cpp architecture runs the model, which keys its graph reads, and what
differs from the stored tensors beyond their names. All of it was checked against llama.cpp's
source and by running a random model of each type in both programs (tests/real).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import gguf

from mlx_fusekit.gguf.models.changes import (
    INTERLEAVED,
    PLUS_ONE,
    SHARED_EXPERT_GATE,
    SHORT_CONVOLUTION,
    Change,
    Split,
)
from mlx_fusekit.gguf.models.hyperparameters import (
    BASE,
    HEADS,
    LAYER_NORM,
    RMS_NORM,
    Key,
    array,
    count,
    experts,
    flag,
    real,
    sliding_pattern,
)
from mlx_fusekit.gguf.models.linear_attention import SPLIT, STATES, TILED_STATES
from mlx_fusekit.gguf.models.requirements import (
    Check,
    dense_or_routed,
    epsilon_inside,
    groups,
    head_of_linear_attention,
    key_value_heads_of_lfm2,
    no_rope_every_fourth,
    no_sliding,
    normalizes,
    norms_of_large_cohere,
    only,
    partial_rotation,
    pattern_of_exaone4,
    queries_of_deepseek,
    same_heads,
    sections_of_qwen35,
    softmax_scale,
    width_of_lfm2,
    window_of_exaone4,
    window_of_gemma2,
)
from mlx_fusekit.gguf.models.rope import (
    ALL_FACTORS,
    FACTORS,
    PLAIN,
    PLAIN_IN_MLX,
    RopeStyle,
    local_theta,
)
from mlx_fusekit.gguf.models.settings import Settings

SIGMOID = int(gguf.ExpertGatingFuncType.SIGMOID)

QKV = frozenset({"attn_q.bias", "attn_k.bias", "attn_v.bias"})
ATTENTION = QKV | {"attn_output.bias"}
MLP = frozenset({"ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"})
NORMS = frozenset({"attn_norm.bias", "ffn_norm.bias", "output_norm.bias"})
PROBABILITIES = frozenset({"exp_probs_b.bias"})
STEPS = frozenset({"ssm_dt.bias"})


@dataclass(frozen=True, slots=True)
class Family:
    """How models of one type become GGUF.

    Attributes:
        gguf: member of ``gguf.MODEL_ARCH``.
        keys: hyperparameters, those of the rotary embedding apart.
        rope: what llama.cpp does with rotary embeddings.
        rope_dims: how many dimensions of a head are rotated.
        rotates_pairs: whether mlx-lm's class turns neighbouring rows unless ``rope_traditional``
            says otherwise, as the graph does (type NORM).
        biases: which biases its graph adds, by GGUF name without the block.
        splits: stored tensors that the file holds as several, by the end of their name.
        changes: what else differs from the stored tensors; those not named stay as they are.
        needs_head: whether it has no fallback to the embedding for a missing output matrix.
        may_lack_head: whether mlx-lm's class ties the embedding where no output matrix is stored.
        square_heads: whether it takes heads times their width to be the hidden size.
        activations: what ``hidden_act`` may be.
        checks: of settings that it may not be able to run.
        notes: for the table of supported architectures.
    """

    gguf: str
    keys: tuple[Key, ...]
    rope: RopeStyle = PLAIN
    rope_dims: Callable[[Settings], int] = lambda s: s.head_dim
    rotates_pairs: bool = False
    biases: frozenset[str] = frozenset()
    splits: Mapping[str, Split] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    needs_head: bool = False
    may_lack_head: bool = False
    square_heads: bool = False
    activations: frozenset[str] = frozenset({"silu", "swiglu"})
    checks: tuple[Check, ...] = ()
    notes: str = ""


def _state_keys() -> tuple[Key, ...]:
    return (
        count(name="ssm.conv_kernel", value="linear_conv_kernel_dim"),
        count(name="ssm.state_size", value="linear_key_head_dim"),
        count(name="ssm.group_count", value="linear_num_key_heads"),
        count(name="ssm.time_step_rank", value="linear_num_value_heads"),
        count(
            name="ssm.inner_size",
            value=lambda s: s["linear_value_head_dim"] * s["linear_num_value_heads"],
        ),
        count(name="full_attention_interval", value="full_attention_interval"),
    )


def without(keys: tuple[Key, ...], *names: str) -> tuple[Key, ...]:
    """Keys but for some, by name."""
    return tuple(key for key in keys if key.name not in names)


_LLAMA = Family(
    "LLAMA",
    BASE + HEADS + RMS_NORM,
    rope=ALL_FACTORS,
    changes=INTERLEAVED,
    biases=ATTENTION | MLP,
    checks=(no_sliding,),
)
_GRANITE_SCALES = (
    real(name="attention.scale", value="attention_multiplier"),
    real(name="embedding_scale", value="embedding_multiplier"),
    real(name="residual_scale", value="residual_multiplier"),
    real(name="logit_scale", value="logits_scaling"),
)
_COHERE = (
    real(name="logit_scale", value="logit_scale"),
    # Of Command R, max_position_embeddings is a fraction of the context it was trained on.
    count(
        name="context_length",
        value=lambda s: s.get("model_max_length") or s.get("max_position_embeddings", 8192),
    ),
)
_GELU = frozenset({"gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"})
_WINDOW = (count(name="attention.sliding_window", value="sliding_window"),)
_DEEPSEEK_EXPERTS = (
    *experts("n_routed_experts"),
    count(name="expert_shared_count", value="n_shared_experts"),
    count(name="leading_dense_block_count", value="first_k_dense_replace"),
    count(name="expert_group_count", value=groups("n_group")),
    count(name="expert_group_used_count", value=groups("topk_group")),
    count(name="expert_gating_func", value=SIGMOID),
    real(name="expert_weights_scale", value="routed_scaling_factor"),
    flag(name="expert_weights_norm", value=normalizes),
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Family(
        "LLAMA",
        (*BASE, *HEADS, *RMS_NORM, *experts("num_local_experts", "intermediate_size")[:2]),
        rope=replace(ALL_FACTORS, ignored_by_mlx=True),
        changes=INTERLEAVED,
    ),
    "qwen2": Family("QWEN2", BASE + RMS_NORM, biases=QKV, square_heads=True),
    "qwen2_moe": Family(
        "QWEN2MOE",
        (
            *BASE,
            *RMS_NORM,
            *experts("num_experts"),
            count(
                name="expert_shared_feed_forward_length", value="shared_expert_intermediate_size"
            ),
        ),
        rope=PLAIN_IN_MLX,
        biases=QKV,
        changes=(SHARED_EXPERT_GATE,),
        needs_head=True,
        square_heads=True,
    ),
    "qwen3": Family("QWEN3", BASE + HEADS + RMS_NORM),
    "qwen3_moe": Family(
        "QWEN3MOE",
        (*BASE, *HEADS, *RMS_NORM, *experts("num_experts")),
        rope=PLAIN_IN_MLX,
        checks=(only("norm_topk_prob", True), dense_or_routed),
    ),
    "gemma": Family(
        "GEMMA",
        BASE + HEADS + RMS_NORM,
        rope=PLAIN_IN_MLX,
        changes=PLUS_ONE,
        activations=_GELU,
    ),
    "gemma2": Family(
        "GEMMA2",
        (
            *BASE,
            *HEADS,
            *RMS_NORM,
            real(name="attn_logit_softcapping", value="attn_logit_softcapping"),
            real(name="final_logit_softcapping", value="final_logit_softcapping"),
            count(name="attention.sliding_window", value=lambda s: s.get("sliding_window", 4096)),
        ),
        rope=PLAIN_IN_MLX,
        changes=PLUS_ONE,
        activations=_GELU,
        checks=(softmax_scale(46), window_of_gemma2),
        notes="the sliding window of config.json applies, which mlx-lm leaves out",
    ),
    "gemma3_text": Family(
        "GEMMA3",
        (
            *BASE,
            *HEADS,
            *RMS_NORM,
            *_WINDOW,
            array(name="attention.sliding_window_pattern", value=sliding_pattern(0, default=6)),
            real(name="rope.freq_base_swa", value=local_theta),
        ),
        changes=PLUS_ONE,
        may_lack_head=True,
        activations=_GELU,
        checks=(
            softmax_scale(62),
            only("final_logit_softcapping", None),
            only("attn_logit_softcapping", None),
            only("use_bidirectional_attention", None, False),
        ),
    ),
    "phi": Family(
        "PHI2",
        BASE + LAYER_NORM,
        rope=PLAIN_IN_MLX,
        rope_dims=partial_rotation,
        biases=ATTENTION | MLP | NORMS | {"output.bias"},
        needs_head=True,
        square_heads=True,
        activations=_GELU,
        checks=(only("qk_layernorm", None, False),),
    ),
    "phi3": Family(
        "PHI3",
        BASE + RMS_NORM,
        rope=RopeStyle(frozenset({"linear", "longrope"})),
        rope_dims=partial_rotation,
        square_heads=True,
        notes="neither mlx-lm nor llama.cpp applies its sliding window",
    ),
    "olmo2": Family("OLMO2", BASE + RMS_NORM, needs_head=True, square_heads=True),
    "olmo3": Family(
        "OLMO2",
        (
            *BASE,
            *RMS_NORM,
            *_WINDOW,
            array(name="attention.sliding_window_pattern", value=sliding_pattern(4, default=4)),
        ),
        needs_head=True,
        square_heads=True,
    ),
    "olmoe": Family(
        "OLMOE",
        (*BASE, *RMS_NORM, *experts("num_experts", "intermediate_size")[:2]),
        needs_head=True,
        square_heads=True,
        checks=(only("norm_topk_prob", False), only("clip_qkv", None), same_heads),
    ),
    "starcoder2": Family(
        "STARCODER2",
        (
            *BASE,
            real(name="attention.layer_norm_epsilon", value="norm_epsilon"),
        ),
        rope=PLAIN_IN_MLX,
        biases=ATTENTION | MLP | NORMS,
        square_heads=True,
        activations=_GELU,
        notes="neither mlx-lm nor llama.cpp applies its sliding window",
    ),
    "stablelm": Family(
        "STABLELM",
        (*BASE, *LAYER_NORM, flag(name="use_parallel_residual", value="use_parallel_residual")),
        rope=PLAIN_IN_MLX,
        rope_dims=partial_rotation,
        biases=QKV | NORMS,
        needs_head=True,
        square_heads=True,
        checks=(only("qk_layernorm", False),),
        notes="without qk_layernorm",
    ),
    "granite": Family(
        "GRANITE",
        BASE + RMS_NORM + _GRANITE_SCALES,
        rope=ALL_FACTORS,
        changes=INTERLEAVED,
        biases=ATTENTION | MLP,
    ),
    "granitemoe": Family(
        "GRANITE_MOE",
        (
            *BASE,
            *RMS_NORM,
            *_GRANITE_SCALES,
            *experts("num_local_experts", "intermediate_size")[:2],
        ),
        rope=ALL_FACTORS,
        changes=INTERLEAVED,
        biases=ATTENTION,
    ),
    "cohere": Family(
        "COMMAND_R",
        BASE + LAYER_NORM + _COHERE,
        rope=RopeStyle(ignored_by_mlx=True, off=True),
        rotates_pairs=True,
        square_heads=True,
        checks=(norms_of_large_cohere,),
    ),
    "cohere2": Family(
        "COHERE2",
        (
            *BASE,
            *LAYER_NORM,
            *_COHERE,
            *_WINDOW,
            array(name="attention.sliding_window_pattern", value=sliding_pattern(0, default=4)),
        ),
        rope=RopeStyle(ignored_by_mlx=True, off=True),
        rotates_pairs=True,
        square_heads=True,
    ),
    "smollm3": Family(
        "SMOLLM3",
        BASE + HEADS + RMS_NORM,
        changes=INTERLEAVED,
        checks=(no_sliding, no_rope_every_fourth),
    ),
    "ministral3": Family(
        "MISTRAL3",
        (
            *BASE,
            *HEADS,
            *RMS_NORM,
            real(
                name="attention.temperature_scale",
                value=lambda s: s["rope_parameters"]["llama_4_scaling_beta"],
            ),
        ),
        rope=RopeStyle(frozenset({"yarn"}), yarn_multiplier=1, reads_betas=True),
        changes=INTERLEAVED,
        checks=(no_sliding,),
    ),
    "glm4": Family(
        "GLM4",
        BASE + HEADS + RMS_NORM,
        rope=PLAIN_IN_MLX,
        rope_dims=partial_rotation,
        rotates_pairs=True,
        biases=QKV,
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
            *_WINDOW,
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
            count(name="expert_gating_func", value=SIGMOID),
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
    "seed_oss": Family("SEED_OSS", BASE + HEADS + RMS_NORM, biases=QKV),
    "exaone4": Family(
        "EXAONE4",
        (
            *BASE,
            *HEADS,
            *RMS_NORM,
            count(name="attention.sliding_window", value=lambda s: s.get("sliding_window")),
            array(name="attention.sliding_window_pattern", value=pattern_of_exaone4),
        ),
        rope=FACTORS,
        square_heads=True,
        checks=(window_of_exaone4,),
    ),
    "ernie4_5": Family(
        "ERNIE4_5",
        BASE + HEADS + RMS_NORM,
        rope=PLAIN_IN_MLX,
        rotates_pairs=True,
        biases=ATTENTION,
    ),
    "minicpm": Family(
        "MINICPM",
        (
            *BASE,
            *RMS_NORM,
            real(name="embedding_scale", value="scale_emb"),
            real(
                name="residual_scale",
                value=lambda s: s["scale_depth"] / s["num_hidden_layers"] ** 0.5,
            ),
            real(name="logit_scale", value=lambda s: s["hidden_size"] / s["dim_model_base"]),
        ),
        rope=ALL_FACTORS,
        changes=INTERLEAVED,
        checks=(only("tie_word_embeddings", False),),
    ),
    "nemotron": Family(
        "NEMOTRON",
        (*BASE, *HEADS, real(name="attention.layer_norm_epsilon", value="norm_eps")),
        rope=RopeStyle(frozenset({"linear"}), off=True),
        rope_dims=partial_rotation,
        biases=ATTENTION | MLP | NORMS,
        changes=PLUS_ONE,
        needs_head=True,
        square_heads=True,
        activations=frozenset({"relu2"}),
    ),
    "qwen3_next": Family(
        "QWEN3NEXT",
        (
            *BASE,
            *HEADS,
            *RMS_NORM,
            *experts("num_experts"),
            count(
                name="expert_shared_feed_forward_length", value="shared_expert_intermediate_size"
            ),
            *_state_keys(),
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
            *_state_keys(),
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
FAMILIES["gemma3"] = FAMILIES["gemma3_text"]
