"""Fusing tiny real models, against mlx-lm's own unfused forward pass."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.utils import load_model
from support.tiny import (
    EXPERTS,
    LINEARS,
    LLAMA,
    QWEN3_MOE,
    in_float32,
    logits,
    make_adapter,
    make_model,
    save_adapter,
    teacher_layers,
)

from mlx_fusekit import fuse, prepare_fuse
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.errors import AdapterError, ConfigurationError, OutputError
from mlx_fusekit.fusing.options import FuseOptions

AFFINE: dict[str, dict[str, Any]] = {
    f"affine-{bits}-{group}": {"bits": bits, "group_size": group}
    for bits, group in [(2, 64), (3, 64), (4, 32), (4, 64), (4, 128), (5, 64), (6, 32), (8, 64)]
}
CODEBOOK: dict[str, dict[str, Any]] = {
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}
SCALES: dict[str, dict[str, Any]] = {
    "affine-4-float16": {"bits": 4, "dtype": mx.float16},
    "affine-4-float32": {"bits": 4, "dtype": mx.float32},
}
DENSE: dict[str, dict[str, Any]] = {
    "float16": {"bits": None, "dtype": mx.float16},
    "bfloat16": {"bits": None, "dtype": mx.bfloat16},
    "float32": {"bits": None, "dtype": mx.float32},
}
MIXED = {
    "mixed": {"bits": 4, "mixed": {"down_proj": {"bits": 8, "group_size": 32}, "k_proj": False}}
}
FORMATS = {**AFFINE, **CODEBOOK, **SCALES, **DENSE, **MIXED}
GLOBAL = {"nvfp4-global": {**CODEBOOK["nvfp4"], "global_scale": True}}

KINDS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "lora": (LLAMA, "lora", LINEARS),
    "dora": (LLAMA, "dora", LINEARS),
    "embedding": (LLAMA, "lora", ["self_attn.q_proj", "model.embed_tokens"]),
    "experts": (QWEN3_MOE, "lora", [*EXPERTS, "mlp.gate", "lm_head"]),
}
#: One format of each way through: words of a power of two bits and of others, codebooks, dense,
#: and modules that differ.
SOME = ["affine-3-64", "affine-4-64", "mxfp4", "nvfp4", "bfloat16", "mixed"]
CASES = [("lora", name) for name in FORMATS] + [("experts", name) for name in GLOBAL]
CASES += [(kind, name) for kind in KINDS if kind != "lora" for name in SOME]
# mlx-lm's DoRA of an embedding takes the packed width of a quantized one for its own.
KINDS["dora-embedding"] = (LLAMA, "dora", ["self_attn.q_proj", "model.embed_tokens"])
CASES += [("dora-embedding", name) for name in DENSE]


def teacher(base: Path, adapter: Path, kind: str, keys: list[str]) -> Any:
    """Base and adapter as mlx-lm runs them, in float32."""
    model = teacher_layers(base, kind, keys, num_layers=2, rank=4, scale=2.0)
    model.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    ratios = {
        n: m.m / adapted_norm(m) for n, m in model.named_modules() if isinstance(m, DoRALinear)
    }
    model = in_float32(model)
    for name, module in model.named_modules():
        if name in ratios:  # norms are those of the weights as they were dequantized in 16 bits
            module.m = ratios[name] * adapted_norm(module)
    return model


def adapted_norm(layer: DoRALinear) -> mx.array:
    adapted = layer._dequantized_weight() + (layer.scale * layer.lora_b.T) @ layer.lora_a.T
    return mx.linalg.norm(adapted.astype(mx.float32), axis=1)


def loaded(folder: Path) -> Any:
    return in_float32(load_model(folder)[0])


def difference(first: Any, second: Any) -> float:
    return mx.abs(logits(first) - logits(second)).max().item()


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors = Checkpoint.open(folder).tensors.values()
    return {t.name: (t.dtype, t.shape, t.read().tobytes()) for t in tensors}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_fused_equals_teacher(tmp_path: Path, kind: str, name: str) -> None:
    """Dequantized in float32 it is the teacher; in the base's format, nearer than the base."""
    config, fine_tune_type, keys = KINDS[kind]
    base = make_model(tmp_path / "base", config, **{**FORMATS, **GLOBAL}[name])
    adapter = make_adapter(tmp_path / "adapter", base, kind=fine_tune_type, keys=keys)
    reference = teacher(base, adapter, fine_tune_type, keys)

    fuse(base, adapter, tmp_path / "wide", dequantize=True, dtype="float32")
    assert difference(loaded(tmp_path / "wide"), reference) < 1e-4

    report = fuse(base, adapter, tmp_path / "fused")
    assert sum(report.modules.values()) == len(set(_merged_modules(tmp_path / "fused")))
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "fused")
    assert {n: (t.dtype, t.shape) for n, t in before.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in after.tensors.items()
    }
    fused_error = difference(loaded(tmp_path / "fused"), reference)
    base_error = difference(loaded(base), reference)
    if name != "affine-2-64":  # rounding random weights to four values drowns any update
        assert fused_error < base_error
    if name in DENSE:
        assert fused_error < base_error / 50


def _merged_modules(folder: Path) -> list[str]:
    recipe = json.loads((folder / "fusekit.json").read_text())
    return list(recipe["modules"])


@pytest.mark.parametrize(
    "name", ["affine-2-64", "affine-4-64", "affine-6-32", "mxfp4", "nvfp4", "mixed"]
)
def test_wider_bits_are_loaded_and_closer(tmp_path: Path, name: str) -> None:
    base = make_model(tmp_path / "base", **FORMATS[name])
    keys = ["self_attn.q_proj", "mlp.up_proj"]
    adapter = make_adapter(tmp_path / "adapter", base, keys=keys)
    reference = teacher(base, adapter, "lora", keys)
    fuse(base, adapter, tmp_path / "same")
    report = fuse(base, adapter, tmp_path / "wide", bits=8)
    assert report.output_bytes > report.base_bytes
    assert difference(loaded(tmp_path / "wide"), reference) < 0.3 * difference(
        loaded(tmp_path / "same"), reference
    )
    block = json.loads((tmp_path / "wide" / "config.json").read_text())["quantization"]
    widened = {
        path for path, value in block.items() if isinstance(value, dict) and value["bits"] == 8
    }
    assert {path for path in widened if path.endswith(tuple(keys))} == set(
        _merged_modules(tmp_path / "wide")
    )
    untouched = [
        n for n in tensors_of(base) if not n.startswith(tuple(_merged_modules(tmp_path / "wide")))
    ]
    wide, before = tensors_of(tmp_path / "wide"), tensors_of(base)
    assert all(wide[n] == before[n] for n in untouched)


@pytest.mark.parametrize(
    ("kind", "name"),
    # mlx-lm has no DoRA on experts, and global scales on nothing else.
    [("lora", name) for name in (*FORMATS, *GLOBAL)] + [("dora", name) for name in SOME],
)
def test_zero_adapter_changes_no_byte(tmp_path: Path, kind: str, name: str) -> None:
    config, keys = (QWEN3_MOE, EXPERTS) if name in GLOBAL else (LLAMA, LINEARS)
    base = make_model(tmp_path / "base", config, **{**FORMATS, **GLOBAL}[name])
    model = teacher_layers(base, kind, keys, num_layers=2, rank=4, scale=2.0)
    from mlx.utils import tree_flatten

    leaves = ("lora_a", "lora_b", "m")
    fresh = {n: v for n, v in tree_flatten(model.parameters()) if n.rpartition(".")[2] in leaves}
    adapter = save_adapter(tmp_path / "adapter", fresh, kind=kind, keys=keys)
    fuse(base, adapter, tmp_path / "fused")
    assert tensors_of(tmp_path / "fused") == tensors_of(base)
    for file in base.iterdir():
        assert (tmp_path / "fused" / file.name).read_bytes() == file.read_bytes()


def test_a_global_scale_grows_with_its_expert(tmp_path: Path) -> None:
    """A weight that outgrows nvfp4's global scale would be clipped."""
    base = make_model(tmp_path / "base", QWEN3_MOE, **GLOBAL["nvfp4-global"])
    name = "model.layers.1.mlp.switch_mlp.up_proj"
    a, b = mx.zeros((4, 4, 128)), mx.zeros((4, 64, 4))
    a[2, 0, 5], b[2, 7, 0] = 1.0, 3.0
    adapter = save_adapter(tmp_path / "adapter", {f"{name}.lora_a": a, f"{name}.lora_b": b})
    fuse(base, adapter, tmp_path / "fused")
    before, after = (mx.load(str(p / "model.safetensors")) for p in (base, tmp_path / "fused"))
    old_scales, new_scales = (w[f"{name}.global_scale"].tolist() for w in (before, after))
    assert [old == new for old, new in zip(old_scales, new_scales, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    fused = dict(_parameters(loaded(tmp_path / "fused")))[f"{name}.weight"]
    old = dict(_parameters(loaded(base)))[f"{name}.weight"]
    assert fused[2, 7, 5].item() == pytest.approx(old[2, 7, 5].item() + 6.0, rel=0.05)
    assert mx.array_equal(fused[1], old[1])


def test_rows_without_update_keep_their_bytes(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, keys=["mlp.up_proj"])
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    for name in list(tensors):
        if name.endswith("lora_b"):
            tensors[name] = mx.where(mx.arange(tensors[name].shape[1]) < 100, 0, tensors[name])
    save_adapter(adapter, tensors, keys=["mlp.up_proj"])
    fuse(base, adapter, tmp_path / "fused")
    before, after = (mx.load(str(p / "model.safetensors")) for p in (base, tmp_path / "fused"))
    for leaf in ("weight", "scales", "biases"):
        name = f"model.layers.1.mlp.up_proj.{leaf}"
        assert mx.array_equal(before[name][:100], after[name][:100])
        assert not mx.array_equal(before[name][100:], after[name][100:])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("affine-4-64", dtype) for dtype in ("float16", "bfloat16", "float32", None)]
    + [(name, dtype) for name in ("bfloat16", "float16") for dtype in ("float16", None)],
)
def test_dequantized_type(tmp_path: Path, name: str, dtype: str | None) -> None:
    base = make_model(tmp_path / "base", **FORMATS[name])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    adapter = make_adapter(tmp_path / "adapter", base)
    fuse(base, adapter, tmp_path / "fused", dequantize=True, dtype=dtype)
    model, config = load_model(tmp_path / "fused")
    assert "quantization" not in config
    stored = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    expected = stored.get(dtype or "", "F16" if name == "float16" else "BF16")
    written = Checkpoint.open(tmp_path / "fused").tensors.values()
    assert {t.dtype for t in written} == {expected}
    assert config["torch_dtype"] == (dtype or "bfloat16")
    reference = teacher(base, adapter, "lora", LINEARS)
    assert difference(in_float32(model), reference) < (1e-4 if dtype == "float32" else 0.2)


@pytest.mark.parametrize("name", ["bfloat16", "affine-4-64", "mxfp4"])
def test_full_fine_tune(tmp_path: Path, name: str) -> None:
    """Full fine-tunes replace what they hold: dense weights, norms, and quantized weights."""
    base = make_model(tmp_path / "base", **FORMATS[name])
    model = loaded(base)
    mx.random.seed(5)
    trained = {
        f"model.layers.1.{leaf}": dict(_parameters(model))[f"model.layers.1.{leaf}"]
        for leaf in ("self_attn.q_proj.weight", "self_attn.q_proj.bias", "input_layernorm.weight")
    }
    trained = {n: v + 0.05 * mx.random.normal(v.shape) for n, v in trained.items()}
    adapter = save_adapter(tmp_path / "adapter", trained, kind="full")
    fuse(base, adapter, tmp_path / "wide", dequantize=True, dtype="float32")
    model.load_weights(list(trained.items()), strict=False)
    assert difference(loaded(tmp_path / "wide"), model) < 1e-4
    fuse(base, adapter, tmp_path / "fused")
    assert difference(loaded(tmp_path / "fused"), model) < difference(loaded(base), model)
    changed = {n for n, v in tensors_of(tmp_path / "fused").items() if tensors_of(base)[n] != v}
    assert {n.rpartition(".")[0] for n in changed} == {n.rpartition(".")[0] for n in trained}


def _parameters(model: Any) -> Any:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_nearest_is_not_worse_than_mlx_lm_fuse(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", dtype=mx.float32)
    adapter = make_adapter(tmp_path / "adapter", base, strength=0.002)
    reference = teacher(base, adapter, "lora", LINEARS)
    student = teacher_layers(base, "lora", LINEARS, 2, 4, 2.0)
    student.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    from mlx.utils import tree_unflatten

    student.update_modules(
        tree_unflatten([(n, m.fuse()) for n, m in student.named_modules() if hasattr(m, "fuse")])
    )
    fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    ours = dict(_parameters(loaded(tmp_path / "fused")))
    theirs, exact = dict(_parameters(in_float32(student))), dict(_parameters(reference))

    def error(weights: dict[str, mx.array]) -> float:
        layers = [n for n in weights if n.endswith("proj.weight")]
        fused = {n: exact.get(n) for n in layers}
        for n in layers:
            linear = n.removesuffix("weight")
            delta = 2.0 * exact[f"{linear}lora_b"].T @ exact[f"{linear}lora_a"].T
            fused[n] = exact[f"{linear}linear.weight"] + delta
        return sum(mx.square(weights[n] - fused[n]).sum().item() for n in layers)

    assert 0 < error(ours) <= error(theirs) * 1.001


def test_several_adapters_add_up(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None, dtype=mx.float32)
    first = make_adapter(tmp_path / "one", base, seed=1)
    second = make_adapter(tmp_path / "two", base, keys=["mlp.up_proj"], seed=2)
    before = dict(_parameters(load_model(base)[0]))
    report = fuse(base, [first, f"{second}:-0.5"], tmp_path / "fused")
    assert report.weights == (1.0, -0.5)
    after = dict(_parameters(load_model(tmp_path / "fused")[0]))
    a, b = (mx.load(str(p / "adapters.safetensors")) for p in (first, second))
    up, q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"

    def delta(adapter: dict[str, mx.array], module: str) -> mx.array:
        return 2.0 * (adapter[f"{module}.lora_a"] @ adapter[f"{module}.lora_b"]).T

    assert mx.allclose(
        after[f"{up}.weight"], before[f"{up}.weight"] + delta(a, up) - 0.5 * delta(b, up), atol=1e-6
    )
    assert mx.allclose(after[f"{q}.weight"], before[f"{q}.weight"] + delta(a, q), atol=1e-6)


def test_a_dora_adapter_cannot_be_weighted(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, kind="dora")
    with pytest.raises(AdapterError, match="dora adapter cannot be weighted"):
        prepare_fuse(base, f"{adapter}:0.5", tmp_path / "fused")


def test_the_result_does_not_depend_on_threads_or_clones(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    for name, options in {"a": {"workers": 1}, "b": {"workers": 5}, "c": {"clone": False}}.items():
        prepare_fuse(base, adapter, tmp_path / name).run(**options)
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    for name in ("b", "c"):
        assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == files


def test_companions_come_along_and_code_stays(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    data = ["tokenizer.model", "tokenizer.json", "chat_template.jinja", "generation_config.json"]
    for name in [*data, "LICENSE", "modeling_x.py", "README.md", "training.pt", ".env"]:
        (base / name).write_text("{}" if name.endswith("json") else name)
    adapter = make_adapter(tmp_path / "adapter", base)
    report = fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    for name in [*data, "LICENSE"]:
        assert (tmp_path / "fused" / name).read_bytes() == (base / name).read_bytes()
    assert set(report.left_out) == {"modeling_x.py", "README.md", "training.pt"}
    present = {path.name for path in (tmp_path / "fused").iterdir()}
    assert not present & {"modeling_x.py", "README.md", "training.pt", ".env"}
    options = {"requantize": "nearest", "trust_remote_code": True}
    trusted = fuse(base, adapter, tmp_path / "trusted", **options)
    assert "modeling_x.py" not in trusted.left_out
    assert (tmp_path / "trusted" / "modeling_x.py").exists()


def test_a_link_out_of_the_base_is_not_followed(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    (tmp_path / "secret.json").write_text("{}")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(ValueError, match=r"tokenizer\.json: a link that leads out"):
        fuse(base, adapter, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_the_recipe_has_no_path_of_this_machine(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    fuse(base, adapter, tmp_path / "fused", seed=7)
    text = (tmp_path / "fused" / "fusekit.json").read_text()
    assert str(tmp_path) not in text
    recipe = json.loads(text)
    assert recipe["seed"] == 7
    assert recipe["base"]["id"] == "base"
    import hashlib

    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    assert recipe["base"]["sha256"]["model.safetensors"] == digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "have 4 bits already"),
        ({"bits": 7}, "--bits 7"),
        ({"bits": -1}, "--bits -1"),
        ({"bits": 8, "dequantize": True}, "exclude each other"),
        ({"dtype": "float16"}, "goes with --dequantize"),
        ({"dtype": "int8", "dequantize": True}, "--dtype int8"),
        ({"requantize": "calibrated"}, "--requantize calibrated: .* has no tokenizer"),
        ({"requantize": "nearset"}, "--requantize nearset: choose auto"),
        ({"outtype": "q8_0"}, "--outtype q8_0 is for the file of --export-gguf"),
        ({"max_kl": 0.1}, "has no tokenizer"),
        ({"max_kl": 0.1, "requantize": "nearest"}, "--max-kl goes with"),
        ({"max_kl": -1.0}, "--max-kl -1.0"),
        ({"max_kl": float("nan")}, "--max-kl nan"),
        ({"max_growth": -0.1}, "--max-growth -0.1"),
        ({"max_growth": 0.1, "requantize": "calibrated"}, "--max-growth goes with"),
        ({"calibration": "missing.jsonl"}, "--calibration missing.jsonl: there is no such"),
        ({"calibration": "x", "requantize": "nearest"}, "--calibration goes with"),
        ({"calibration_tokens": 0}, "--calibration-tokens 0"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(ConfigurationError, match=message):
        fuse(base, adapter, tmp_path / "fused", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_bits_widen_what_is_narrower_only(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", **MIXED["mixed"])
    adapter = make_adapter(tmp_path / "adapter", base)
    report = fuse(base, adapter, tmp_path / "fused", bits=6)
    assert report.modules == {"6-bit group 64": 10, "8-bit group 32": 2, "bfloat16": 2}
    reference = teacher(base, adapter, "lora", LINEARS)
    assert difference(loaded(tmp_path / "fused"), reference) < 0.5


@pytest.mark.parametrize("name", ["affine-4-64", "affine-4-32", "mixed", "nvfp4"])
def test_a_silent_configuration(tmp_path: Path, name: str) -> None:
    """The shapes say how a base is quantized; the result says it too, so that mlx-lm loads it."""
    base = make_model(tmp_path / "base", **FORMATS[name])
    adapter = make_adapter(tmp_path / "adapter", base)
    fuse(base, adapter, tmp_path / "told")
    config = json.loads((base / "config.json").read_text())
    silent = {k: v for k, v in config.items() if not k.startswith("quantization")}
    (base / "config.json").write_text(json.dumps(silent))
    fuse(base, adapter, tmp_path / "fused")
    assert difference(load_model(tmp_path / "fused")[0], load_model(tmp_path / "told")[0]) == 0


def test_bits_of_a_dense_base(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None)
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(ConfigurationError, match="not quantized"):
        fuse(base, adapter, tmp_path / "fused", bits=8)


def test_float16_overflow_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None, dtype=mx.float16)
    adapter = make_adapter(tmp_path / "adapter", base, scale=2.0, strength=5e6)
    with pytest.raises(AdapterError, match="too large for F16"):
        fuse(base, adapter, tmp_path / "fused")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_missing_disk_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="make room"):
        fuse(base, adapter, tmp_path / "fused")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_sharded_bases_keep_their_files(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    split(base)
    adapter = make_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"])
    fuse(base, adapter, tmp_path / "fused")
    for name in ("model.safetensors.index.json", "config.json"):
        assert (tmp_path / "fused" / name).read_bytes() == (base / name).read_bytes()
    reference = teacher(base, adapter, "lora", ["self_attn.q_proj"])
    assert difference(loaded(tmp_path / "fused"), reference) < difference(loaded(base), reference)


def split(folder: Path) -> None:
    """Split a single-file model into three shards with an index."""
    weights = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        part = {name: weights[name] for name in names[shard::3]}
        mx.save_safetensors(str(folder / file), part, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_large_results_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_fusekit.merging.layout.LARGEST_FILE_BYTES", 300_000)
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    report = fuse(base, adapter, tmp_path / "fused", dequantize=True, dtype="float32")
    assert len(report.files) > 2
    assert (
        difference(load_model(tmp_path / "fused")[0], teacher(base, adapter, "lora", LINEARS))
        < 1e-4
    )


def test_values_are_merged_in_float32(tmp_path: Path) -> None:
    """One rounding at the end: a bfloat16 weight is the float32 sum, rounded once."""
    base = make_model(tmp_path / "base", bits=None)
    adapter = make_adapter(tmp_path / "adapter", base)
    fuse(base, adapter, tmp_path / "fused")
    before, after = (mx.load(str(p / "model.safetensors")) for p in (base, tmp_path / "fused"))
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    name = "model.layers.0.mlp.down_proj"
    a, b = (np.array(tensors[f"{name}.{leaf}"]).astype(np.float64) for leaf in ("lora_a", "lora_b"))
    exact = np.array(before[f"{name}.weight"].astype(mx.float32)) + 2.0 * (a @ b).T
    nearest = mx.array(exact.astype(np.float32)).astype(mx.bfloat16)
    assert (after[f"{name}.weight"] != nearest).mean().item() < 1e-3


def test_its_defaults_are_those_of_preparing() -> None:
    given = inspect.signature(fuse).parameters
    options = {field.name: field.default for field in dataclasses.fields(FuseOptions)}
    assert {name: given[name].default for name in options} == options
    shared = inspect.signature(prepare_fuse).parameters.keys() - {"options"}
    assert given.keys() - options.keys() - shared == {"progress"}
