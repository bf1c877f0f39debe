"""Checkpoints that hold more than text: vision towers, and heads that predict further tokens.

mlx-lm drops them when it loads a model. A fused model keeps them, byte for byte, unless it is told
to be text only.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from support.folders import as_hugging_face, rewritten
from support.tiny import QWEN3_MOE, logits, make_adapter, make_model
from support.tiny_architectures import CONFIGS
from support.tiny_architectures import make_model as make_architecture

from mlx_fusekit import fuse
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.sanitized import beside_text, open_base
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.gguf.models.architectures import lay_out
from mlx_fusekit.verifying.structure import Check, check_structure

KEYS = ["self_attn.q_proj", "mlp.up_proj"]
NORMS = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")


def vision(prefix: str) -> dict[str, mx.array]:
    mx.random.seed(11)
    return {
        f"{prefix}.patch_embed.proj.weight": mx.random.normal((8, 3, 2, 4, 4)),
        f"{prefix}.blocks.0.attn.qkv.weight": mx.random.normal((24, 8)),
        f"{prefix}.merger.norm.weight": mx.random.normal((8,)).astype(mx.float16),
    }


def further_head() -> dict[str, mx.array]:
    mx.random.seed(12)
    names = ("fc", "layers.0.self_attn.q_proj", "layers.0.input_layernorm", "norm")
    return {f"mtp.{name}.weight": mx.random.normal((8, 8)) for name in names}


def qwen3_5_from_hugging_face(folder: Path) -> Path:
    """As transformers saves it: its own names, convolutions and norms, vision, a further head."""
    make_architecture(folder, "qwen3_5")
    raw = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        if name.endswith("conv1d.weight"):
            value = value.moveaxis(1, 2)
        elif name.endswith(NORMS) and "linear_attn" not in name:
            value = value - 1.0
        name = name.replace("language_model.model.", "model.language_model.")
        raw[name.removeprefix("language_model.")] = value
    as_hugging_face(folder, raw | vision("model.visual") | further_head())
    config = json.loads((folder / "config.json").read_text())
    config |= {"vision_config": {"depth": 1}, "image_token_id": 90, "video_token_id": 91}
    config["architectures"] = ["Qwen3_5ForConditionalGeneration"]
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def qwen3_vl_from_hugging_face(folder: Path, **of: Any) -> Path:
    text = {**CONFIGS["qwen3"], "model_type": "qwen3_vl_text"}
    make_model(folder, {"model_type": "qwen3_vl", "text_config": text}, bits=None, dtype=mx.float32)
    weights = mx.load(str(folder / "model.safetensors"))
    raw = {
        name.removeprefix("language_model.").replace("model.", "model.language_model.", 1): value
        for name, value in weights.items()
    }
    as_hugging_face(folder, raw | vision("model.visual"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"vision_config": {"depth": 1}, "image_token_id": 90}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def qwen3_vl_from_mlx_vlm(folder: Path) -> Path:
    """MLX's names, with the vision tower beside them."""
    base = folder.parent / "text"
    text = {**CONFIGS["qwen3"], "model_type": "qwen3_vl_text"}
    make_model(base, {"model_type": "qwen3_vl", "text_config": text}, bits=None, dtype=mx.float32)
    rewritten(base, folder, lambda tensors: tensors.update(vision("vision_tower")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"depth": 1}}))
    return folder


def experts_from_hugging_face(folder: Path) -> Path:
    """Experts are stacked when they are loaded, so that none of them is dropped; a head is."""
    from support.folders import unstacked

    make_model(folder, QWEN3_MOE, bits=None, dtype=mx.float32)
    return as_hugging_face(folder, unstacked(mx.load(str(folder / "model.safetensors"))))


BASES = {
    "qwen3_5": (qwen3_5_from_hugging_face, "mtp (4), model.visual (3)", 7),
    "qwen3_vl": (qwen3_vl_from_hugging_face, "visual (3)", 3),
    "mlx_vlm": (qwen3_vl_from_mlx_vlm, "vision_tower (3)", 3),
}


@pytest.fixture(params=BASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, str, int]:
    make, words, count = BASES[request.param]
    base = make(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, keys=KEYS)
    return base, adapter, words, count


def structure(base: Path, adapter: Path, fused: Path) -> dict[str, Check]:
    sources = NamedSources.find(base, adapter).open()
    checks = check_structure(sources.base, sources.adapter, Checkpoint.open(fused))
    return {check.name: check for check in checks}


def check_runs(base: Path, adapter: Path, fused: Path) -> None:
    """The fused model gives what base and adapter give in mlx-lm."""
    teacher = load_adapters(load_model(base)[0], str(adapter))
    found, wanted = logits(load_model(fused)[0]), logits(teacher)
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=5e-4)


def test_what_is_not_text_comes_along_as_it_is(case: Any, tmp_path: Path) -> None:
    base, adapter, words, count = case
    report = fuse(base, adapter, tmp_path / "fused")
    stored, fused = Checkpoint.open(base), Checkpoint.open(tmp_path / "fused")
    beside = beside_text(open_base(base))
    assert len(beside) == count
    assert not open_base(base).lost
    for name in beside:
        before = stored.tensors.get(name) or stored.tensors[f"model.{name}"]
        assert fused.tensors[name].dtype == before.dtype
        assert np.array_equal(fused.tensors[name].read(), before.read())
    assert fused.config["vision_config"] == {"depth": 1}
    check_runs(base, adapter, tmp_path / "fused")
    assert all(check.ok for check in structure(base, adapter, tmp_path / "fused").values())
    if open_base(base).converted:
        assert any(words in warning for warning in report.warnings)
    old = any("mlx-lm before 0.32" in warning for warning in report.warnings)
    assert old == ("mtp" in words)


def test_text_only(case: Any, tmp_path: Path) -> None:
    base, adapter, words, _ = case
    report = fuse(base, adapter, tmp_path / "fused", text_only=True)
    assert f"--text-only leaves out {words}" in report.warnings
    fused = Checkpoint.open(tmp_path / "fused")
    assert not beside_text(open_base(base)) & set(fused.tensors)
    promises = [key for key in fused.config if key.startswith(("vision", "image", "video"))]
    assert not promises
    assert "mtp_num_hidden_layers" not in fused.config.get("text_config", {})
    assert not (tmp_path / "fused" / "preprocessor_config.json").exists()
    check_runs(base, adapter, tmp_path / "fused")
    same = structure(base, adapter, tmp_path / "fused")["same tensors as the base"]
    assert same.ok
    assert f"text only: without {words}" in same.detail


def test_a_model_that_lost_its_vision_and_still_promises_it(case: Any, tmp_path: Path) -> None:
    base, adapter, *_ = case
    fuse(base, adapter, tmp_path / "fused", text_only=True)
    shutil.copy(base / "config.json", tmp_path / "fused" / "config.json")
    same = structure(base, adapter, tmp_path / "fused")["same tensors as the base"]
    assert not same.ok
    assert "missing: " in same.detail


def test_a_changed_vision_tower_is_seen(tmp_path: Path) -> None:
    base = qwen3_5_from_hugging_face(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, keys=KEYS)
    fuse(base, adapter, tmp_path / "fused")
    name = "model.visual.merger.norm.weight"
    changed = rewritten(
        tmp_path / "fused", tmp_path / "changed", lambda t: t.update({name: t[name] + 1})
    )
    untouched = structure(base, adapter, changed)["untouched tensors byte-identical"]
    assert not untouched.ok
    assert name in untouched.detail


def test_fused_again(tmp_path: Path) -> None:
    """A fused model is a base like any other."""
    base = qwen3_5_from_hugging_face(tmp_path / "base")
    first, second = (
        make_adapter(tmp_path / n, base, keys=KEYS, seed=s) for n, s in (("a", 1), ("b", 2))
    )
    fuse(base, first, tmp_path / "one")
    fuse(tmp_path / "one", second, tmp_path / "two")
    fused, stored = Checkpoint.open(tmp_path / "two"), Checkpoint.open(base)
    for name in beside_text(open_base(base)):
        assert np.array_equal(fused.tensors[name].read(), stored.tensors[name].read())
    check_runs(tmp_path / "one", second, tmp_path / "two")


def test_experts_are_none_of_it(tmp_path: Path) -> None:
    base = experts_from_hugging_face(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"])
    report = fuse(base, adapter, tmp_path / "text", text_only=True)
    assert "--text-only leaves out nothing: all is text" in report.warnings
    assert not open_base(base).beside
    fuse(base, adapter, tmp_path / "fused")
    assert not [name for name in Checkpoint.open(tmp_path / "fused").tensors if ".experts." in name]


def test_an_adapter_of_the_vision_tower(tmp_path: Path) -> None:
    base = qwen3_vl_from_mlx_vlm(tmp_path / "base")
    module = "vision_tower.blocks.0.attn.qkv"
    tensors = {f"{module}.lora_a": mx.ones((8, 2)), f"{module}.lora_b": mx.ones((2, 24))}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), tensors)
    config = {"num_layers": -1, "lora_parameters": {"rank": 2, "scale": 1.0}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"changes vision_tower.* is beside the text"):
        fuse(base, adapter, tmp_path / "fused", text_only=True)


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("make", [qwen3_5_from_hugging_face, qwen3_vl_from_hugging_face])
def test_gguf_holds_the_text_model_and_says_what_was_left(
    tmp_path: Path, make: Any, text_only: bool
) -> None:
    base = make(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, keys=KEYS)
    fuse(base, adapter, tmp_path / "fused", text_only=text_only)
    for folder in (tmp_path / "base", tmp_path / "fused"):
        notes = lay_out(open_base(folder)).notes
        said = any("a text model is exported, without " in note for note in notes)
        assert said == (folder.name == "base" or not text_only)
