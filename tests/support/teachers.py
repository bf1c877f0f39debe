"""Tiny models of several architectures, adapters on them, and what calibrating them takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fusekit.fusing.fuse import prepare_fuse
from mlx_fusekit.merging.plan import FusePlan
from mlx_fusekit.running.exact import MEMORY_SHARE
from mlx_fusekit.running.model import RunningModel
from mlx_fusekit.texts.sequences import TokenSequence
from support.models import run_teacher
from support.tiny import EXPERTS, LINEARS, LLAMA, QWEN3_MOE, VOCABULARY, make_adapter, make_model

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
LFM2: dict[str, Any] = {
    **SMALL,
    "model_type": "lfm2",
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 128,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
}
GEMMA3N: dict[str, Any] = {
    "model_type": "gemma3n",
    "text_config": {
        **SMALL,
        "model_type": "gemma3n_text",
        "num_hidden_layers": 4,
        "intermediate_size": [128] * 4,
        "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": VOCABULARY,
        "sliding_window": 16,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 32,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 32,
    },
}
PHI = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
CONVOLUTION = [
    "conv.in_proj",
    "conv.out_proj",
    "self_attn.q_proj",
    "feed_forward.w1",
    "feed_forward.w2",
]
#: Configuration and modules to adapt, by name.
ARCHITECTURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (LLAMA, LINEARS),
    "qwen3": ({**SMALL, "model_type": "qwen3"}, LINEARS),
    "gemma2": ({**SMALL, "model_type": "gemma2"}, LINEARS),
    "gemma3_text": (
        {**SMALL, "model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 2},
        LINEARS,
    ),
    "phi3": ({**SMALL, "model_type": "phi3"}, PHI),
    # Attention and MLP side by side.
    "cohere": ({**SMALL, "model_type": "cohere", "logit_scale": 0.5}, LINEARS),
    "lfm2": (LFM2, CONVOLUTION),
    "qwen3_moe": (QWEN3_MOE, [*EXPERTS, "mlp.gate", "self_attn.q_proj", "self_attn.o_proj"]),
    "mixtral": (
        {**SMALL, "model_type": "mixtral", "num_local_experts": 4},
        [
            "block_sparse_moe.switch_mlp.up_proj",
            "block_sparse_moe.switch_mlp.down_proj",
            "block_sparse_moe.gate",
            "self_attn.q_proj",
        ],
    ),
    "gemma3n": (GEMMA3N, [*LINEARS, "per_layer_input_gate", "per_layer_projection"]),
}


def random_text(
    count: int, shortest: int = 12, longest: int = 40, seed: int = 0
) -> list[TokenSequence]:
    random = np.random.default_rng(seed)
    return [
        TokenSequence(tuple(map(int, random.integers(0, VOCABULARY, length))))
        for length in random.integers(shortest, longest + 1, count)
    ]


@dataclass(frozen=True)
class Case:
    """A plan to fuse, and the teacher it is to be like."""

    plan: FusePlan
    teacher: RunningModel
    base: Path
    adapter: Path


def case_of(base: Path, adapter: Path, memory_share: float = MEMORY_SHARE, **options: Any) -> Case:
    plan = prepare_fuse(base, adapter, base.parent / "never", **options).plan
    return Case(plan, run_teacher(base, adapter, memory_share=memory_share), base, adapter)


def make_case(
    folder: Path,
    config: dict[str, Any] = LLAMA,
    keys: Sequence[str] = LINEARS,
    *,
    kind: str = "lora",
    strength: float = 0.02,
    num_layers: int = 2,
    memory_share: float = MEMORY_SHARE,
    **quantization: Any,
) -> Case:
    base = make_model(folder / "base", config, **quantization)
    adapter = make_adapter(
        folder / "adapter",
        base,
        kind=kind,
        keys=list(keys),
        strength=strength,
        num_layers=num_layers,
    )
    return case_of(base, adapter, memory_share)


def logits_of(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """Of one sequence alone, ``[tokens, vocabulary]``."""
    return np.array(model(mx.array([[int(token) for token in tokens]])).astype(mx.float32))[0]
