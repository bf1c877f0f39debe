"""Models as they are run, against mlx-lm's own way of running them."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.utils import load_adapters, load_model
from support.models import run_model, run_teacher
from support.tiny import (
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

from mlx_fusekit import fuse, samples
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.errors import AdapterError, CheckpointError
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.machine import memory_bytes
from mlx_fusekit.running import exact as exact_weights
from mlx_fusekit.running.shared import RunningBase

FORMATS: dict[str, dict[str, Any]] = {
    "affine-3": {"bits": 3},
    "affine-4": {"bits": 4},
    "affine-4-float16": {"bits": 4, "dtype": mx.float16},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    "bfloat16": {"bits": None},
}
GLOBAL = {"nvfp4-global": {**FORMATS["nvfp4"], "global_scale": True}}
EXPERTS = [f"mlp.switch_mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
KINDS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "lora": (LLAMA, "lora", LINEARS),
    "dora": (LLAMA, "dora", LINEARS),
    "embedding": (LLAMA, "lora", ["self_attn.q_proj", "model.embed_tokens"]),
    "experts": (QWEN3_MOE, "lora", [*EXPERTS, "mlp.gate", "lm_head"]),
}
CASES = [("lora", name) for name in FORMATS] + [("experts", name) for name in GLOBAL]
CASES += [
    (k, n) for k in KINDS if k != "lora" for n in ("affine-3", "affine-4", "mxfp4", "bfloat16")
]
# mlx-lm's DoRA of an embedding takes the packed width of a quantized one for its own.
KINDS["dora-embedding"] = (LLAMA, "dora", ["self_attn.q_proj", "model.embed_tokens"])
CASES += [("dora-embedding", "bfloat16")]

on_cpu = pytest.mark.skipif(
    mx.default_device().type != mx.cpu, reason="only the CPU backend runs models in float32"
)


def mlx_lm_teacher(base: Path, adapter: Path, kind: str, keys: list[str]) -> Any:
    """Base and adapter as mlx-lm runs them, in float32 where that is how we run them."""
    model: Any = teacher_layers(base, kind, keys, num_layers=2, rank=4, scale=2.0)
    model.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    if mx.default_device().type != mx.cpu:
        return model
    doras = {name: m for name, m in model.named_modules() if isinstance(m, DoRALinear)}
    # Norms are those of the weights as they were dequantized in 16 bits.
    ratios = {name: layer.m / adapted_norm(layer) for name, layer in doras.items()}
    model = in_float32(model)
    for name, module in model.named_modules():
        if name in ratios:
            module.m = ratios[name] * adapted_norm(module)
    return model


def adapted_norm(layer: DoRALinear) -> mx.array:
    adapted = layer._dequantized_weight() + (layer.scale * layer.lora_b.T) @ layer.lora_a.T
    return mx.linalg.norm(adapted.astype(mx.float32), axis=1)


def difference(first: Any, second: Any) -> float:
    return mx.abs(logits(first) - logits(second)).max().item()


@pytest.mark.parametrize("name", [*FORMATS, *GLOBAL])
def test_a_model_runs_with_its_exact_weights(tmp_path: Path, name: str) -> None:
    config = QWEN3_MOE if name in GLOBAL else LLAMA
    base = make_model(tmp_path / "base", config, **{**FORMATS, **GLOBAL}[name])
    loaded = run_model(base)
    reference: Any = load_model(base)[0]
    if loaded.exact:
        reference = in_float32(reference)
        types = {a.dtype for _, a in tree_flatten(loaded.model.parameters())}
        assert types == {mx.float32}
    assert not loaded.model.training
    assert difference(loaded.model, reference) < 1e-5


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_teacher_is_mlx_lms(tmp_path: Path, kind: str, name: str) -> None:
    config, fine_tune_type, keys = KINDS[kind]
    base = make_model(tmp_path / "base", config, **{**FORMATS, **GLOBAL}[name])
    adapter = make_adapter(tmp_path / "adapter", base, kind=fine_tune_type, keys=keys)
    reference = mlx_lm_teacher(base, adapter, fine_tune_type, keys)
    teacher = run_teacher(base, adapter)
    assert difference(teacher.model, reference) < 1e-4
    assert difference(run_model(base).model, reference) > 1e-2
    assert not any(m.training for _, m in teacher.model.named_modules())


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_teacher_without_its_adapter_is_the_base(tmp_path: Path, kind: str, name: str) -> None:
    config, fine_tune_type, keys = KINDS[kind]
    base = make_model(tmp_path / "base", config, **{**FORMATS, **GLOBAL}[name])
    adapter = make_adapter(tmp_path / "adapter", base, kind=fine_tune_type, keys=keys)
    teacher = run_teacher(base, adapter)
    before = logits(teacher.model)
    with teacher.without_adapter() as bare:
        assert difference(bare, run_model(base).model) < 1e-5
    assert mx.array_equal(logits(teacher.model), before)


@pytest.mark.parametrize("name", ["affine-4", "mxfp4", "bfloat16"])
def test_stored_formats_run_as_mlx_lm_runs_them(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Metal and CUDA do, and the CPU when float32 does not fit: mlx-lm's load, nearly."""
    monkeypatch.setattr(exact_weights, "memory_bytes", lambda: 1000)
    base = make_model(tmp_path / "base", **FORMATS[name])
    adapter = make_adapter(tmp_path / "adapter", base)
    teacher = run_teacher(base, adapter)
    assert not teacher.exact
    reference = load_adapters(load_model(base)[0], str(adapter))
    reference.eval()
    types = {type(m) for _, m in reference.named_modules()}
    assert {type(m) for _, m in teacher.model.named_modules()} == types
    noise = 0.01 * mx.abs(logits(reference)).max().item()
    assert difference(teacher.model, reference) < noise
    assert difference(run_model(base).model, reference) > noise


def test_the_sample_runs_as_mlx_lm_loads_it() -> None:
    import mlx_lm

    paths = str(samples.model_path()), str(samples.adapter_path())
    reference: Any = mlx_lm.load(paths[0], adapter_path=paths[1])[0]
    reference.set_dtype(mx.float32)  # scales too, so that its kernels round nothing to 16 bits
    teacher = run_teacher(samples.model_path(), samples.adapter_path())
    tokens = mx.array([teacher.tokenizer.encode("How many orders were placed?")])
    wanted, found = (m(tokens).astype(mx.float32) for m in (reference, teacher.model))
    tolerance = 1e-3 if teacher.exact else 0.1 * mx.abs(wanted).max().item()
    assert mx.abs(wanted - found).max().item() < tolerance


def test_lora_adapters_add_up_with_their_weights(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None, dtype=mx.float32)
    keys = [*LINEARS, "model.embed_tokens"]
    first = make_adapter(tmp_path / "first", base, keys=keys, rank=4, seed=1)
    second = make_adapter(tmp_path / "second", base, keys=keys[3:], rank=8, scale=3.0, seed=2)
    weighted = [f"{first}:0.5", f"{second}:-1.5"]
    teacher = run_teacher(base, *weighted)
    fuse(base, weighted, tmp_path / "fused")
    assert difference(teacher.model, run_model(tmp_path / "fused").model) < 1e-4
    assert difference(teacher.model, run_model(base).model) > 1e-2


def test_only_lora_adapters_add_up(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, kind="dora")
    with pytest.raises(AdapterError, match="cannot be weighted or combined"):
        run_teacher(base, adapter, adapter)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["affine-4", "bfloat16"])
def test_a_full_fine_tune_replaces_parameters(
    tmp_path: Path, name: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr(exact_weights, "memory_bytes", lambda: 1000)
    dense = make_model(tmp_path / "dense", **FORMATS["bfloat16"])
    base = make_model(tmp_path / "base", **FORMATS[name])
    stored = mx.load(str(dense / "model.safetensors"))
    chosen = ("q_proj.weight", "q_proj.bias", "embed_tokens.weight", "norm.weight")
    tensors = {n: 1.1 * v + 0.01 for n, v in stored.items() if n.endswith(chosen)}
    adapter = save_adapter(tmp_path / "adapter", tensors, kind="full")
    teacher = run_teacher(base, adapter)

    reference: Any = load_model(base)[0]
    if teacher.exact:
        reference = in_float32(reference)
    for path, module in reference.named_modules():
        if f"{path}.weight" in tensors and isinstance(
            module, nn.QuantizedLinear | nn.QuantizedEmbedding
        ):
            weight = tensors[f"{path}.weight"]
            new: Any = (
                nn.Embedding(*weight.shape)
                if isinstance(module, nn.QuantizedEmbedding)
                else nn.Linear(*weight.shape[::-1])
            )
            from mlx.utils import tree_unflatten

            reference.update_modules(tree_unflatten([(path, new)]))
    reference.load_weights(list(tensors.items()), strict=False)
    if teacher.exact:
        reference.set_dtype(mx.float32)
    tolerance = 1e-4 if teacher.exact else 0.01 * mx.abs(logits(reference)).max().item()
    assert difference(teacher.model, reference) < tolerance
    with teacher.without_adapter() as bare:
        assert difference(bare, run_model(base).model) < 1e-5
        assert difference(bare, reference) > 10 * tolerance


@on_cpu
def test_a_model_too_large_for_float32_runs_as_stored(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", QWEN3_MOE)
    count = sum(a.size for _, a in tree_flatten(run_model(base).model.parameters()))
    share = 4 * count / memory_bytes()
    assert run_model(base, memory_share=1.01 * share).exact
    stored = run_model(base, memory_share=0.99 * share)
    assert not stored.exact
    assert mx.uint32 in {a.dtype for _, a in tree_flatten(stored.model.parameters())}


def test_what_does_not_load_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        run_model(tmp_path / "nothing")
    base = make_model(tmp_path / "base")
    text = (base / "config.json").read_text().replace('"llama"', '"no-such-model"')
    (base / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="mlx-lm cannot load it"):
        run_model(base)


def test_a_missing_tokenizer_is_said_when_it_is_asked_for(tmp_path: Path) -> None:
    loaded = run_model(make_model(tmp_path / "base"))
    with pytest.raises(CheckpointError, match="tokenizer"):
        _ = loaded.tokenizer


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    other = make_model(tmp_path / "other", {**LLAMA, "intermediate_size": 512})
    adapter = make_adapter(tmp_path / "adapter", other)
    with pytest.raises(AdapterError, match="does not fit the base"):
        run_teacher(base, adapter)


def test_a_tokenizers_own_code_needs_trust(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left to itself, transformers asks on the terminal whether to run it."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(samples.model_path(), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    with pytest.raises(CheckpointError, match="code of its own, which needs --trust-remote-code"):
        _ = run_model(folder).tokenizer
    assert capsys.readouterr().out == ""
    assert not ran.exists()
    assert run_model(folder, trusted=True).tokenizer is not None
    assert ran.exists()


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "full, dense"])
def test_a_base_takes_an_adapter_off_again(tmp_path: Path, kind: str) -> None:
    """What runs with the next one is the very base, and the adapted model is what it is alone."""
    base = make_model(tmp_path / "base", bits=None if "dense" in kind else 4)
    if kind.startswith("full"):
        tensors = {
            "model.layers.1.mlp.up_proj.weight": mx.random.normal((256, 128)) * 0.1,
            "model.norm.weight": 1 + mx.random.normal((128,)) * 0.1,
        }
        folder = save_adapter(tmp_path / "adapter", tensors, kind="full")
    else:
        folder = make_adapter(tmp_path / "adapter", base, kind=kind)
    sources = NamedSources.find(base, folder).open()
    running = RunningBase(LocalFolder(base))
    with running.adapted(sources.adapter) as first:
        with first.without_adapter() as model:
            bare = logits(model)
        assert mx.array_equal(logits(first.model), logits(run_teacher(base, folder).model))
    assert mx.array_equal(logits(first.model), bare)
    with pytest.raises(ValueError, match="stop"), running.adapted(sources.adapter) as second:
        assert second.model is first.model
        assert not mx.array_equal(logits(second.model), bare)
        raise ValueError("stop")
    assert mx.array_equal(logits(first.model), bare)
    kinds = [
        {path: type(module) for path, module in model.named_modules()}
        for model in (first.model, run_model(base).model)
    ]
    assert kinds[0] == kinds[1]
