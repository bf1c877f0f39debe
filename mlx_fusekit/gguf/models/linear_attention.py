"""Tensors of gated delta nets (qwen3_next, qwen3_5), which llama.cpp lays out its own way."""

import numpy as np

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.gguf.models.changes import Change, Indices
from mlx_fusekit.gguf.models.hyperparameters import count
from mlx_fusekit.gguf.models.settings import Settings


def minus_exp(logarithm: Float32) -> Float32:
    """``A`` of ``A_log``."""
    return -np.exp(logarithm)


def split_qkvz(settings: Settings) -> dict[str, Indices]:
    """Rows of ``in_proj_qkvz`` for each tensor that llama.cpp splits it into.

    Stored, each key head's queries, keys, values and gates follow each other; llama.cpp wants all
    queries, then all keys, then all values, and the gates apart.
    """
    heads, dim = int(settings["linear_num_key_heads"]), int(settings["linear_key_head_dim"])
    values = int(settings["linear_num_value_heads"]) * int(settings["linear_value_head_dim"])
    widths = (dim, dim, values // heads, values // heads)
    rows = np.arange(heads * sum(widths)).reshape(heads, -1)
    query, key, value, gate = np.split(rows, np.cumsum(widths)[:-1], axis=1)
    joined = np.concatenate([part.reshape(-1) for part in (query, key, value)])
    return {"attn_qkv.weight": joined, "attn_gate.weight": gate.reshape(-1)}


def tiled_heads(settings: Settings) -> Indices | None:
    """Order in which llama.cpp wants value heads, as indices into the stored order.

    Stored, the value heads of a key head follow each other; llama.cpp repeats the key heads as a
    whole, so that first comes each one's first value head.

    Returns:
        None where the orders are the same.
    """
    keys, values = int(settings["linear_num_key_heads"]), int(settings["linear_num_value_heads"])
    if keys == values:
        return None
    return np.arange(values).reshape(keys, values // keys).T.reshape(-1)


def tiled_values(settings: Settings) -> Indices | None:
    """The same of the values: each head's dimensions stay together."""
    if (heads := tiled_heads(settings)) is None:
        return None
    width = int(settings["linear_value_head_dim"])
    return (heads[:, None] * width + np.arange(width)).reshape(-1)


def tiled_values_after_keys(settings: Settings) -> Indices | None:
    """The same of queries, keys and values together, of which the values come last."""
    if (values := tiled_values(settings)) is None:
        return None
    before = 2 * int(settings["linear_num_key_heads"]) * int(settings["linear_key_head_dim"])
    return np.concatenate([np.arange(before), before + values])


STATE_KEYS = (
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
#: Of qwen3_next.
SPLIT = {"linear_attn.in_proj_qkvz.weight": split_qkvz}
STATES = (
    Change(("ssm_a",), values=minus_exp),
    Change(("ssm_conv1d.weight",), squeezed=2),
)
#: Of qwen3_5, whose graph wants the value heads in another order.
TILED_STATES = (
    Change(("ssm_a",), rows=tiled_heads, values=minus_exp),
    Change(("ssm_alpha.weight", "ssm_beta.weight", "ssm_dt.bias"), rows=tiled_heads),
    Change(("ssm_conv1d.weight",), rows=tiled_values_after_keys, squeezed=2),
    Change(("attn_qkv.weight",), rows=tiled_values_after_keys),
    Change(("attn_gate.weight",), rows=tiled_values),
    Change(("ssm_out.weight",), columns=tiled_values),
)
