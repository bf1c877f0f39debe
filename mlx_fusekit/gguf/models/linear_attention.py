"""Tensors of gated delta nets (qwen3_next, qwen3_5), which llama.cpp lays out its own way."""

import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.gguf.models.settings import Settings

Rows = npt.NDArray[np.int64]


def minus_exp(logarithm: Float32) -> Float32:
    """``A`` of ``A_log``."""
    return -np.exp(logarithm)


def split_qkvz(settings: Settings) -> dict[str, Rows]:
    """Rows of ``in_proj_qkvz`` for each tensor that llama.cpp splits it into.

    Stored, each key head's queries, keys, values and gates follow each other; llama.cpp wants all
    queries, then all keys, then all values, and the gates apart.
    """
    heads, dim, per_head = _sizes(settings)
    widths = (dim, dim, per_head, per_head)
    rows = np.arange(heads * sum(widths)).reshape(heads, -1)
    query, key, value, gate = np.split(rows, np.cumsum(widths)[:-1], axis=1)
    joined = np.concatenate([part.reshape(-1) for part in (query, key, value)])
    return {"attn_qkv.weight": joined, "attn_gate.weight": gate.reshape(-1)}


def tiled_order(settings: Settings, stored: str) -> Rows | None:
    """Order in which llama.cpp wants what belongs to value heads, as indices into the stored order.

    Stored, the value heads of a key head follow each other; llama.cpp repeats the key heads as a
    whole, so that first comes each one's first value head.

    Args:
        settings: of the model.
        stored: name of a tensor; of ``out_proj`` the columns are meant, of others the first axis.

    Returns:
        None where the orders are the same.
    """
    keys, values = int(settings["linear_num_key_heads"]), int(settings["linear_num_value_heads"])
    if keys == values or stored.endswith("linear_attn.norm.weight"):
        return None
    per_head = (".in_proj_a.", ".in_proj_b.", ".A_log", ".dt_bias")
    width = 1 if any(part in stored for part in per_head) else settings["linear_value_head_dim"]
    stored_order = np.arange(values * width).reshape(keys, values // keys, width)
    order = stored_order.transpose(1, 0, 2).reshape(-1)
    if not any(part in stored for part in (".in_proj_qkv.", ".conv1d.")):
        return order
    before = 2 * keys * int(settings["linear_key_head_dim"])
    return np.concatenate([np.arange(before), before + order])


def _sizes(settings: Settings) -> tuple[int, int, int]:
    """Key heads, width of a key head, and width of all value heads of a key head."""
    heads = int(settings["linear_num_key_heads"])
    values = int(settings["linear_num_value_heads"]) * int(settings["linear_value_head_dim"])
    return heads, int(settings["linear_key_head_dim"]), values // heads
