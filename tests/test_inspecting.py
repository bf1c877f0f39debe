"""The facts of models and adapters."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from support.tiny import (
    EXPERTS,
    QWEN3_MOE,
    dequantized,
    make_adapter,
    make_model,
    save_adapter,
)

from mlx_fusekit import fuse
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.errors import AdapterError, CheckpointError
from mlx_fusekit.inspecting import AdapterFacts, ModelFacts, inspect

NVFP4 = {"bits": 4, "group_size": 16, "mode": "nvfp4"}
UP = "model.layers.0.mlp.up_proj"


def model_facts(folder: Path) -> ModelFacts:
    found = inspect(folder)
    assert isinstance(found, ModelFacts)
    return found


def adapter_facts(folder: Path, **options: Path) -> AdapterFacts:
    found = inspect(folder, **options)
    assert isinstance(found, AdapterFacts)
    return found


# --- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, NVFP4, {"bits": 3}, {"bits": None}])
def test_a_packed_weight_counts_as_the_numbers_it_stands_for(tmp_path: Path, options) -> None:
    found = model_facts(make_model(tmp_path / "m", **options))
    hidden, ffn, vocabulary, layers, kv = 128, 256, 96, 2, 64
    linears = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn
    others = 2 * hidden + 2 * hidden + 2 * kv  # norms; biases of q and o, k and v
    assert found.parameters == vocabulary * hidden + layers * (linears + others) + hidden
    stored = Checkpoint.open(tmp_path / "m").tensors
    assert (found.tensors, found.bytes) == (len(stored), sum(t.nbytes for t in stored.values()))
    assert found.bits_per_weight == pytest.approx(8 * found.bytes / found.parameters)
    assert (found.architecture, found.layers, found.files) == ("llama", 2, 1)


def test_formats_are_counted_and_exceptions_named(tmp_path: Path) -> None:
    other = {"bits": 8, "group_size": 32}
    found = model_facts(make_model(tmp_path / "m", mixed={"1.mlp.up_proj": other, "k_proj": False}))
    assert found.formats == {"4-bit group 64": 12, "BF16": 2, "8-bit group 32": 1}
    assert found.exceptions == {"model.layers.1.mlp.up_proj": "8-bit group 32"}


def test_experts_count_as_one_matrix(tmp_path: Path) -> None:
    found = model_facts(make_model(tmp_path / "m", QWEN3_MOE, **NVFP4, global_scale=True))
    assert list(found.formats) == ["nvfp4"]
    dense = model_facts(make_model(tmp_path / "dense", QWEN3_MOE, bits=None))
    assert found.parameters == dense.parameters


def test_a_fused_model_shows_its_recipe(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    assert model_facts(base).fused is None
    fuse(base, make_adapter(tmp_path / "adapter", base), tmp_path / "fused", seed=7)
    fused = model_facts(tmp_path / "fused").fused
    assert fused is not None
    assert fused["seed"] == 7


# --- adapters ---------------------------------------------------------------------------------


def test_an_adapter_by_itself(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    found = adapter_facts(make_adapter(tmp_path / "a", base, rank=3, scale=5.0, num_layers=1))
    assert (found.fine_tune_type, found.rank, found.scale, found.num_layers) == ("lora", 3, 5.0, 1)
    assert found.modules == 7
    assert found.targets == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 1
    )
    tensors = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    assert found.parameters == sum(value.size for value in tensors.values())
    assert found.bytes == sum(value.nbytes for value in tensors.values())
    assert found.deltas == ()


def test_a_full_fine_tune_has_neither_rank_nor_scale(tmp_path: Path) -> None:
    tensors = {f"{UP}.weight": mx.zeros((256, 128)), "model.norm.weight": mx.zeros((128,))}
    declared = {"rank": 8, "scale": 20.0}  # mlx-lm notes its defaults
    adapter = save_adapter(tmp_path / "a", tensors, kind="full", lora_parameters=declared)
    found = adapter_facts(adapter)
    assert (found.fine_tune_type, found.rank, found.scale) == ("full", None, None)
    assert found.targets == {"up_proj": 1, "norm": 1}


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_delta_is_what_fusing_changes(tmp_path: Path, kind: str) -> None:
    base = make_model(tmp_path / "base", dtype=mx.float32)
    if kind == "full":
        mx.random.seed(3)
        new = {f"{UP}.weight": mx.random.normal((256, 128))}
        adapter = save_adapter(tmp_path / "adapter", new, kind="full")
    else:
        adapter = make_adapter(tmp_path / "adapter", base, kind=kind, keys=["mlp.up_proj"])
    fuse(base, adapter, tmp_path / "f", dequantize=True, dtype="float32")
    delta = next(d for d in adapter_facts(adapter, model=base).deltas if d.module == UP)
    before = dict(load_model(base)[0].named_modules())[UP]
    after = mx.load(str(tmp_path / "f" / "model.safetensors"))[f"{UP}.weight"]
    change = np.array(after) - np.array(dequantized(before))
    assert delta.delta_rms == pytest.approx(np.sqrt(np.square(change).mean()), rel=1e-3)
    steps = np.array(before.scales)
    assert delta.step_rms == pytest.approx(np.sqrt(np.square(steps).mean()), rel=1e-4)
    assert delta.delta_steps == pytest.approx(delta.delta_rms / delta.step_rms)
    assert (delta.format, delta.rank) == ("4-bit group 64", None if kind == "full" else 4)


def test_the_delta_of_experts_is_that_of_all_together(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", QWEN3_MOE, bits=None)
    adapter = make_adapter(tmp_path / "adapter", base, keys=EXPERTS[:1])
    delta = adapter_facts(adapter, model=base).deltas[0]
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    a, b = (np.array(tensors[f"{delta.module}.{leaf}"]) for leaf in ("lora_a", "lora_b"))
    assert delta.delta_rms == pytest.approx(np.sqrt(np.square(2.0 * b @ a).mean()), rel=1e-5)
    assert (delta.format, delta.step_rms, delta.delta_steps) == ("BF16", None, None)


def test_the_delta_of_a_full_fine_tune_of_experts(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", QWEN3_MOE)
    name = "model.layers.1.mlp.switch_mlp.down_proj"
    before = dequantized(dict(load_model(base)[0].named_modules())[name])
    change = mx.random.normal(before.shape)
    new = {f"{name}.weight": before + change}
    (delta,) = adapter_facts(save_adapter(tmp_path / "a", new, kind="full"), model=base).deltas
    assert delta.delta_rms == pytest.approx(mx.sqrt(mx.square(change).mean()).item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4"])
def test_the_step_of_a_codebook_is_its_scale(tmp_path: Path, mode: str) -> None:
    options = NVFP4 if mode == "nvfp4" else {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    base = make_model(tmp_path / "base", **options)
    adapter = make_adapter(tmp_path / "adapter", base, keys=["mlp.up_proj"])
    delta = next(d for d in adapter_facts(adapter, model=base).deltas if d.module == UP)
    module = dict(load_model(base)[0].named_modules())[UP]
    # All codes of the number one: what is dequantized then is the scales.
    ones = mx.full(module.weight.shape, 0x22222222, mx.uint32)
    values = mx.dequantize(
        ones,
        module.scales,
        group_size=options["group_size"],
        bits=4,
        mode=mode,
        dtype=mx.float32,
    )
    assert delta.step_rms == pytest.approx(np.sqrt(np.square(np.array(values)).mean()), rel=1e-5)


# --- refusals ---------------------------------------------------------------------------------


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a model"):
        inspect(tmp_path)
    base = make_model(tmp_path / "base")
    moe = make_model(tmp_path / "moe", QWEN3_MOE)
    adapter = make_adapter(tmp_path / "adapter", moe, keys=EXPERTS)
    with pytest.raises(AdapterError):
        inspect(adapter, model=base)


def test_the_facts_are_json(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    for found, kind in ((inspect(base), "model"), (inspect(adapter, model=base), "adapter")):
        value = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert value["kind"] == kind
        assert set(value) == {"kind", *found.__dataclass_fields__}
