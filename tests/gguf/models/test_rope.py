"""Rotary embeddings: keys and factors that make llama.cpp turn as mlx-lm does."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE
from support.tiny_architectures import CONFIGS, LLAMA3, YARN, make_changed

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.models.architectures import lay_out
from mlx_fusekit.gguf.models.rope import FACTORS, Rope, RopeStyle, rope_of
from mlx_fusekit.gguf.models.settings import Settings


def rope_with(
    block: dict[str, Any], *, theta: float = 10000.0, dims: int = 64, style: RopeStyle | None = None
) -> Rope:
    declared = {"rope_theta": theta, "rope_scaling": block}
    return rope_of(Settings(Path("config.json"), declared, declared), style or FACTORS, dims)


@given(
    dims=st.sampled_from([8, 64, 128]),
    theta=st.floats(100, 1e6),
    factor=st.floats(1.5, 64),
    original=st.sampled_from([16, 512, 8192]),
)
@settings(max_examples=25, deadline=None)
def test_llama3_factors_are_those_of_mlx_lm(
    dims: int, theta: float, factor: float, original: int
) -> None:
    block = {**LLAMA3, "factor": factor, "original_max_position_embeddings": original}
    (tensor,) = rope_with(block, theta=theta, dims=dims, style=FACTORS).tensors
    mine = tensor.values
    theirs = np.array(Llama3RoPE(dims, base=theta, scaling_config=block)._freqs)
    assert mine is not None
    assert tensor.shape == mine.shape == (dims // 2,)
    np.testing.assert_allclose(mine, theirs / theta ** (np.arange(0, dims, 2) / dims), 2e-4)


@given(
    factor=st.floats(1.1, 64),
    mscale=st.sampled_from([0.5, 0.707, 1.0]),
    all_dim=st.sampled_from([0.0, 0.707, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_yarn_scales_queries_and_keys_as_mlx_lm_does(
    factor: float, mscale: float, all_dim: float
) -> None:
    block = {**YARN, "factor": factor, "mscale": mscale, "mscale_all_dim": all_dim}
    wanted = YarnRoPE(64, scaling_factor=factor, mscale=mscale, mscale_all_dim=all_dim).mscale
    usual = 0.1 * math.log(factor) + 1
    plain = rope_with(block).keys
    assert "rope.scaling.yarn_log_multiplier" not in plain
    assert plain.get("rope.scaling.attn_factor", (1.0,))[0] * usual == pytest.approx(wanted)
    style = RopeStyle(frozenset({"yarn"}), yarn_multiplier=1)
    keys = rope_with(block, style=style).keys
    given_multiplier = keys.get("rope.scaling.yarn_log_multiplier", (0.0,))[0]
    assert given_multiplier == all_dim
    llama_cpp = usual / (0.1 * given_multiplier * math.log(factor) + 1)
    attention = keys.get("rope.scaling.attn_factor", (1.0,))[0]
    assert attention * llama_cpp == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["llama", "llama/yarn", "llama/linear,traditional"])
def test_rope_parameters_say_the_same(tmp_path: Path, name: str) -> None:
    old = make_changed(tmp_path / "old", name, {})
    scaling = CONFIGS[name]["rope_scaling"]
    new = make_changed(
        tmp_path / "new",
        name,
        {"rope_parameters": {**scaling, "rope_theta": 5000.0}},
        rope_scaling=None,
        rope_theta=None,
    )
    assert lay_out(new).hyperparameters == lay_out(old).hyperparameters
    notes = " ".join(lay_out(new).notes)
    assert "mlx-lm runs this model with rope_theta 10000" in notes
    assert "mlx-lm ignores the" in notes
    assert not lay_out(old).notes


def test_layers_with_a_window_have_their_own_base(tmp_path: Path) -> None:
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 800.0},
    }
    new = make_changed(tmp_path, "gemma3_text", {"rope_parameters": parameters}, rope_scaling=None)
    keys = lay_out(new).hyperparameters
    assert keys["gemma3.rope.freq_base"][0] == 5000
    assert keys["gemma3.rope.freq_base_swa"][0] == 800
    assert keys["gemma3.rope.scaling.factor"][0] == 8


@pytest.mark.parametrize(
    "parameters",
    [
        {**LLAMA3, "rope_theta": 4000.0},
        {**YARN, "rope_theta": 5000.0},
    ],
)
def test_contradictions_are_refused(tmp_path: Path, parameters: dict[str, Any]) -> None:
    found = make_changed(
        tmp_path, "mistral", {"rope_parameters": parameters, "rope_scaling": LLAMA3}
    )
    with pytest.raises(CheckpointError, match=r"in rope_parameters|but rope_parameters yarn"):
        lay_out(found)
