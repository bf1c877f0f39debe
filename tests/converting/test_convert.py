"""Adapters from one form to the other and back: the same update, for mlx-lm and for us."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_adapters, load_model
from support.command import run
from support.peft import pair, random, write_peft
from support.teachers import ARCHITECTURES
from support.tiny import (
    EXPERTS,
    LINEARS,
    LLAMA,
    QWEN3_MOE,
    in_float32,
    logits,
    make_adapter,
    make_model,
)

from mlx_fusekit import convert_adapter, fuse
from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.errors import AdapterError, ConfigurationError, OutputError

UNTIED = LLAMA | {"tie_word_embeddings": False}
#: By name: configuration, how the base is stored, kind and keys of the adapter.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str, list[str]]] = {
    "lora": (LLAMA, {}, "lora", LINEARS),
    "dora": (LLAMA, {}, "dora", LINEARS),
    "embedding": (LLAMA, {}, "lora", ["self_attn.q_proj", "model.embed_tokens"]),
    "head": (UNTIED, {"bits": None}, "lora", ["mlp.up_proj", "lm_head"]),
    "experts": (QWEN3_MOE, {}, "lora", [*EXPERTS, "mlp.gate", "self_attn.q_proj"]),
    "gates": (QWEN3_MOE, {}, "lora", EXPERTS[:1]),
    "some layers": (LLAMA, {}, "lora", LINEARS[:2]),
    "mixtral": (*ARCHITECTURES["mixtral"][:1], {}, "lora", ARCHITECTURES["mixtral"][1]),
    "gemma3n": (*ARCHITECTURES["gemma3n"][:1], {}, "lora", LINEARS[:3]),
    "phi3": (*ARCHITECTURES["phi3"][:1], {}, "lora", ARCHITECTURES["phi3"][1]),
}


def fused(base: Path, adapter: Path, target: Path) -> dict[str, np.ndarray]:
    fuse(base, adapter, target, dequantize=True, dtype="float32")
    return {name: np.array(a) for name, a in mx.load(str(target / "model.safetensors")).items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(other[name], values, rtol=0, atol=2e-6, err_msg=name)


def run_by_mlx_lm(base: Path, adapter: Path) -> Any:
    model = load_model(base)[0]
    return in_float32(load_adapters(model, str(adapter)))


@pytest.mark.parametrize("name", KINDS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    config, stored, kind, keys = KINDS[name]
    base = make_model(tmp_path / "base", config, **stored)
    layers = 1 if name == "some layers" else 2
    adapter = make_adapter(tmp_path / "a", base, kind=kind, keys=keys, num_layers=layers)
    there = convert_adapter(base, adapter, tmp_path / "peft", "peft")
    assert there.difference < 1e-6
    assert open_adapter(tmp_path / "peft").kind == kind
    back = convert_adapter(base, tmp_path / "peft", tmp_path / "mlx", "mlx")
    assert back.difference < 1e-6
    before = fused(base, adapter, tmp_path / "1")
    assert_same(before, fused(base, tmp_path / "peft", tmp_path / "2"))
    assert_same(before, fused(base, tmp_path / "mlx", tmp_path / "3"))
    if name in ("lora", "dora", "embedding", "head", "some layers"):
        one, other = (mx.load(str(tmp_path / n / "adapters.safetensors")) for n in ("a", "mlx"))
        assert one.keys() == other.keys()
        assert all(mx.array_equal(one[key], other[key]) for key in one)
    reference, converted = (run_by_mlx_lm(base, tmp_path / n) for n in ("a", "mlx"))
    assert mx.abs(logits(reference) - logits(converted)).max().item() < 1e-4


def test_the_settings_are_what_peft_reads(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    keys = ["self_attn.q_proj", "mlp.up_proj"]
    adapter = make_adapter(tmp_path / "a", base, keys=keys, num_layers=2, rank=4, scale=2.5)
    convert_adapter(base, adapter, tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 10)
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert config["base_model_name_or_path"] == "base", "no path of this machine"
    one = make_adapter(tmp_path / "b", base, keys=keys[:1], num_layers=1)
    convert_adapter(base, one, tmp_path / "last", "peft")
    config = json.loads((tmp_path / "last" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def whole(tmp_path: Path, more: dict[str, Any]) -> Path:
    """A PEFT adapter with patterns and a saved head."""
    stored = mx.load(str(make_model(tmp_path / "same", UNTIED, bits=None) / "model.safetensors"))
    head = np.array(stored["lm_head.weight"].astype(mx.float32)) + random(96, 128)
    q, up = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    tensors = {**pair(q, 128, 128), **pair(up, 256, 128, rank=6), "lm_head.weight": head}
    return write_peft(
        tmp_path / "peft",
        {**tensors, **more},
        rank_pattern={"up_proj": 6},
        alpha_pattern={"up_proj": 3},
        modules_to_save=["lm_head", "norm"],
        bias="lora_only",
    )


@pytest.mark.parametrize("bits", [None, 4])
def test_what_was_saved_whole(tmp_path: Path, bits: int | None) -> None:
    """mlx-lm runs it too, as LoRA of full rank."""
    base = make_model(tmp_path / "base", UNTIED, bits=bits)
    adapter = whole(tmp_path, {})
    report = convert_adapter(base, adapter, tmp_path / "mlx", "mlx")
    assert "lm_head: saved as a whole" in report.warnings[-1]
    convert_adapter(base, tmp_path / "mlx", tmp_path / "back", "peft")
    convert_adapter(base, adapter, tmp_path / "same form", "peft")
    before = fused(base, adapter, tmp_path / "1")
    for place, form in enumerate(("mlx", "back", "same form")):
        assert_same(before, fused(base, tmp_path / form, tmp_path / f"fused {place}"))
    model = in_float32(load_model(tmp_path / "1")[0])
    found = logits(run_by_mlx_lm(base, tmp_path / "mlx"))
    assert mx.abs(logits(model) - found).max().item() < 1e-3


def test_norms_and_biases(tmp_path: Path) -> None:
    """Which mlx-lm does not load beside LoRA, and we do."""
    base = make_model(tmp_path / "base", UNTIED)
    more = {
        "model.layers.1.self_attn.q_proj.base_layer.bias": random(128),
        "model.norm.weight": random(128) + 1,
    }
    adapter = whole(tmp_path, more)
    report = convert_adapter(base, adapter, tmp_path / "mlx", "mlx")
    assert "fuse this one to run it" in report.warnings[-1]
    assert open_adapter(tmp_path / "mlx").mlx_lm_config is None
    convert_adapter(base, tmp_path / "mlx", tmp_path / "back", "peft")
    before = fused(base, adapter, tmp_path / "1")
    assert_same(before, fused(base, tmp_path / "mlx", tmp_path / "2"))
    assert_same(before, fused(base, tmp_path / "back", tmp_path / "3"))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_numbers_keep_their_type(tmp_path: Path, dtype: mx.Dtype) -> None:
    base = make_model(tmp_path / "base")
    tensors = {
        n: mx.array(v).astype(dtype)
        for n, v in pair("model.layers.0.mlp.up_proj", 256, 128).items()
    }
    adapter = write_peft(tmp_path / "peft", tensors)
    convert_adapter(base, adapter, tmp_path / "mlx", "mlx")
    assert {a.dtype for a in mx.load(str(tmp_path / "mlx/adapters.safetensors")).values()} == {
        dtype
    }
    convert_adapter(base, f"{adapter}:0.3", tmp_path / "weighted", "mlx")
    weighted = mx.load(str(tmp_path / "weighted/adapters.safetensors"))
    assert mx.float32 in {a.dtype for a in weighted.values()}, "0.3 of it has no such number"


def test_several_become_one(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", dtype=mx.float32, bits=None)
    first = make_adapter(tmp_path / "first", base, keys=LINEARS, rank=4, seed=1)
    second = make_adapter(tmp_path / "second", base, keys=LINEARS[2:], rank=8, scale=3.0, seed=2)
    both = [f"{first}:0.5", str(second)]
    report = convert_adapter(base, both, tmp_path / "sum", "peft")
    assert (report.rank, report.scale, report.energy) == (12, 1.0, None)
    fuse(base, both, tmp_path / "wanted")
    fuse(base, tmp_path / "sum", tmp_path / "found")
    wanted, found = (
        {n: np.array(a) for n, a in mx.load(str(tmp_path / f / "model.safetensors")).items()}
        for f in ("wanted", "found")
    )
    assert_same(wanted, found)

    whole = convert_adapter(base, both, tmp_path / "whole", "mlx", combine="ties", energy=1.0)
    assert whole.energy == pytest.approx(1, abs=1e-6)
    fuse(base, both, tmp_path / "ties", combine="ties")
    fuse(base, tmp_path / "whole", tmp_path / "as lora")
    wanted, found = (
        {n: np.array(a) for n, a in mx.load(str(tmp_path / f / "model.safetensors")).items()}
        for f in ("ties", "as lora")
    )
    assert_same(wanted, found)


def test_a_lower_rank_keeps_what_it_says(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", dtype=mx.float32, bits=None)
    adapter = make_adapter(tmp_path / "a", base, keys=LINEARS[:1], rank=8)
    report = convert_adapter(base, adapter, tmp_path / "cut", "mlx", rank=3)
    before, full, cut = (
        Checkpoint.open(folder).tensors["model.layers.0.self_attn.q_proj.weight"].read()
        for folder in (
            base,
            Path(fuse(base, adapter, tmp_path / "1").save_path),
            Path(fuse(base, tmp_path / "cut", tmp_path / "2").save_path),
        )
    )
    values = np.linalg.svd((full - before).astype(np.float64), compute_uv=False)
    share = np.square(values[:3]).sum() / np.square(values).sum()
    energies = report.energies["model.layers.0.self_attn.q_proj"]
    assert energies == pytest.approx(share, rel=1e-3)
    lost = np.square(cut - full).sum() / np.square(full - before).sum()
    assert 1 - lost == pytest.approx(share, rel=1e-3)
    assert report.rank == 3


def test_refusals_write_nothing(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base)
    dora = make_adapter(tmp_path / "dora", base, kind="dora")
    target = tmp_path / "out"

    def refused(error: type[Exception], message: str, *named: Any, **asked: Any) -> None:
        with pytest.raises(error, match=message):
            convert_adapter(base, named, target, **{"to": "peft", **asked})
        assert not target.exists()

    refused(ConfigurationError, "--to gguf: choose mlx or peft", adapter, to="gguf")
    refused(ConfigurationError, "--combine ties: has no low rank", adapter, adapter, combine="ties")
    refused(ConfigurationError, "--rank 0: must be 1 or more", adapter, rank=0)
    refused(ConfigurationError, "--energy 2: must be a share", adapter, energy=2)
    refused(ConfigurationError, "exclude each other", adapter, rank=1, energy=0.5)
    refused(AdapterError, "DoRA, which scales the base's rows", dora, rank=2)
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    for overwrite, why in [(False, "exists already"), (True, "no adapter's folder")]:
        with pytest.raises(OutputError, match=why):
            convert_adapter(base, adapter, target, "peft", overwrite=overwrite)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_the_command(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base)
    named = ["--model", base, "--adapter-path", adapter, "--save-path", tmp_path / "p"]
    arguments = ["convert-adapter", *map(str, named), "--to", "peft"]
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    assert "PEFT's form" in first.stdout
    again = run(*arguments, "--rank", "2", "--overwrite", "--json")
    report = json.loads(again.stdout)
    assert (report["rank"], report["to"]) == (2, "peft")
    assert 0 < report["energy"] < 1
