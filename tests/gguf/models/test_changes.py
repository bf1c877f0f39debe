"""Rows and columns that move on their way into a GGUF file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_architectures import make_model

from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.gguf.models import linear_attention
from mlx_fusekit.gguf.models.architectures import Layout, lay_out
from mlx_fusekit.gguf.models.changes import interleaved_rows
from mlx_fusekit.gguf.models.settings import Settings
from mlx_fusekit.gguf.models.tensors import GgufTensor


def named(layout: Layout, name: str) -> GgufTensor:
    (tensor,) = (tensor for tensor in layout.tensors if tensor.name == name)
    return tensor


def linear_settings(*, keys: int, values: int, dim: int) -> Settings:
    used = {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": dim,
        "linear_value_head_dim": dim,
    }
    return Settings(Path("config.json"), {}, used)


@given(heads=st.integers(1, 5), half=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_interleaved_rows_turn_halves_into_pairs(heads: int, half: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    stored = random.normal(size=heads * 2 * half)
    angles = random.normal(size=half)
    split = stored.reshape(heads, 2, half)
    turned = np.stack(
        [
            split[:, 0] * np.cos(angles) - split[:, 1] * np.sin(angles),
            split[:, 0] * np.sin(angles) + split[:, 1] * np.cos(angles),
        ],
        axis=1,
    ).reshape(-1)
    rows = interleaved_rows(heads, 2 * half)
    pairs = stored[rows].reshape(heads, half, 2)
    turned_pairs = np.stack(
        [
            pairs[..., 0] * np.cos(angles) - pairs[..., 1] * np.sin(angles),
            pairs[..., 0] * np.sin(angles) + pairs[..., 1] * np.cos(angles),
        ],
        axis=-1,
    ).reshape(-1)
    np.testing.assert_allclose(turned[rows], turned_pairs)


def test_biases_move_with_their_rows(tmp_path: Path) -> None:
    layout = lay_out(open_base(make_model(tmp_path, "llama")))
    for part, heads in (("q", 4), ("k", 2)):
        weight = named(layout, f"blk.0.attn_{part}.weight")
        bias = named(layout, f"blk.0.attn_{part}.bias")
        assert weight.rows is not None
        assert bias.columns is not None
        np.testing.assert_array_equal(weight.rows, interleaved_rows(heads, 32))
        np.testing.assert_array_equal(bias.columns, weight.rows)
    assert named(layout, "blk.0.attn_v.weight").rows is None
    assert named(layout, "blk.0.attn_v.bias").columns is None


@pytest.mark.parametrize(
    "name", ["llama/linear,traditional", "qwen3", "cohere", "glm4", "ernie4_5", "deepseek_v3"]
)
def test_rows_stay_where_both_turn_the_same_pairs(tmp_path: Path, name: str) -> None:
    layout = lay_out(open_base(make_model(tmp_path, name)))
    assert all(tensor.rows is None for tensor in layout.tensors)


def test_split_of_linear_attention() -> None:
    parts = linear_attention.split_qkvz(linear_settings(keys=2, values=4, dim=3))
    stored = np.array([f"{part}{head}" for head in (0, 1) for part in "qqqkkkvvvvvvzzzzzz"])
    assert list(stored[parts["attn_qkv.weight"]]) == [
        f"{part}{head}"
        for part, n in (("q", 3), ("k", 3), ("v", 6))
        for head in (0, 1)
        for _ in range(n)
    ]
    assert list(stored[parts["attn_gate.weight"]]) == ["z0"] * 6 + ["z1"] * 6


def test_tiled_value_heads() -> None:
    four = linear_settings(keys=2, values=4, dim=2)
    heads = linear_attention.tiled_heads(four)
    values = linear_attention.tiled_values(four)
    after = linear_attention.tiled_values_after_keys(four)
    assert heads is not None
    assert values is not None
    assert after is not None
    assert list(heads) == [0, 2, 1, 3]
    assert list(values) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert list(after) == [*range(8), *(8 + values)]
    assert linear_attention.tiled_heads(linear_settings(keys=4, values=4, dim=1)) is None


def test_channels_of_a_convolution_move_whole(tmp_path: Path) -> None:
    layout = lay_out(open_base(make_model(tmp_path, "qwen3_5")))
    convolution = named(layout, "blk.0.ssm_conv1d.weight")
    channels, width = convolution.shape
    projection = named(layout, "blk.0.attn_qkv.weight")
    assert convolution.rows is not None
    assert projection.rows is not None
    assert sorted(projection.rows) == list(range(channels)) != list(projection.rows)
    rows = convolution.rows.reshape(channels, width)
    np.testing.assert_array_equal(rows, projection.rows[:, None] * width + np.arange(width))
