"""Model and adapter folders of public reports, in miniature: right, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from support.command import exit_code
from support.exportable import make_exportable
from support.tiny import LLAMA, logits, make_adapter, make_model

from mlx_fusekit import export_gguf, fuse, prepare_fuse
from mlx_fusekit.checkpoint.belongings import Step, belongs
from mlx_fusekit.errors import AdapterError, CheckpointError, OutputError

Made = Callable[[Path, Path], Path]
UNTIED = {**LLAMA, "tie_word_embeddings": False}
#: What macOS writes as ``._NAME`` on disks that hold no extended attributes.
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \x00\x02\xb0" + bytes(64)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 model, where fused and unfused may differ by float32 rounding only."""
    return make_model(tmp_path_factory.mktemp("dense") / "model", bits=None, dtype=mx.float32)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapters", dense)


def settings(folder: Path, name: str = "config.json", **changed: Any) -> Path:
    """Change a JSON file of a folder."""
    content = json.loads((folder / name).read_text()) | changed
    (folder / name).write_text(json.dumps(content))
    return folder


def stored(base: Path, target: Path, more: dict[str, mx.array], **metadata: str) -> Path:
    """A copy of a model whose weight file has further tensors, and other metadata."""
    shutil.copytree(base, target)
    (target / "model.safetensors.index.json").unlink()
    weights = mx.load(str(base / "model.safetensors"))
    mx.save_safetensors(str(target / "model.safetensors"), {**weights, **more}, metadata)
    return target


# --- bases --------------------------------------------------------------------------------------


def with_inverse_frequencies(base: Path, target: Path) -> Path:
    """ml-explore/mlx-examples#305: Llama 2 of Hugging Face, ``rotary_emb.inv_freq`` beside."""
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros((16,))}
    return stored(base, target, frequencies, format="pt")


def tied_with_a_head_stored(base: Path, target: Path) -> Path:
    """ml-explore/mlx-lm#1298: ``tie_word_embeddings``, and ``lm_head.weight`` all the same."""
    head = mx.load(str(base / "model.safetensors"))["model.embed_tokens.weight"]
    return stored(base, target, {"lm_head.weight": head}, format="pt")


def dequantized_by_an_old_mlx_lm(base: Path, target: Path) -> Path:
    """ml-explore/mlx-lm#223: dense weights, and ``quantization`` still in the configuration."""
    shutil.copytree(base, target)
    block = {"group_size": 64, "bits": 4}
    return settings(target, quantization=block, quantization_config=block)


def without_metadata(base: Path, target: Path) -> Path:
    """ml-explore/mlx#743: safetensors that say no ``format``."""
    return stored(base, target, {})


def with_numbers_json_has_not(base: Path, target: Path) -> Path:
    """ai-dynamo/dynamo#3043, huggingface/transformers#42959: infinity, bare and tagged."""
    shutil.copytree(base, target)
    tagged = {"__float__": "Infinity"}
    return settings(target, time_step_limit=[0.0, float("inf")], dropout_limit=tagged)


@pytest.mark.parametrize(
    "made",
    [
        with_inverse_frequencies,
        tied_with_a_head_stored,
        dequantized_by_an_old_mlx_lm,
        without_metadata,
        with_numbers_json_has_not,
    ],
)
def test_fused_as_mlx_lm_runs_it(dense: Path, adapter: Path, tmp_path: Path, made: Made) -> None:
    base = made(dense, tmp_path / "base")
    fuse(base, adapter, tmp_path / "fused")
    unfused = load_adapters(load_model(base)[0], str(adapter))
    fused = load_model(tmp_path / "fused")[0]
    assert mx.allclose(logits(fused), logits(unfused), atol=1e-4)
    assert not mx.allclose(logits(fused), logits(load_model(base)[0]), atol=1e-2)


def test_widths_under_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    """Blaizzy/mlx-vlm#1079: per-module widths under names that loading changes."""
    mixed = {"down_proj": {"bits": 8, "group_size": 64}}
    base = make_model(tmp_path / "base", mixed=mixed)
    adapter = make_adapter(tmp_path / "adapters", base)
    config = json.loads((base / "config.json").read_text())
    own = config["quantization"]
    block = {key.replace("model.", "model.language_model."): value for key, value in own.items()}
    assert block != own
    renamed = shutil.copytree(base, tmp_path / "renamed")
    settings(renamed, quantization=block, quantization_config=block)
    for folder in (base, renamed):
        fuse(folder, adapter, tmp_path / f"{folder.name}_fused", requantize="nearest")
    fused = [tmp_path / f"{name}_fused/model.safetensors" for name in ("base", "renamed")]
    assert fused[0].read_bytes() == fused[1].read_bytes()


def on_a_disk_of_another_system(base: Path, target: Path) -> Path:
    """SceneWorks/SceneWorks#1333, lmstudio-ai/mlx-engine#79: ``._NAME`` beside each file."""
    shutil.copytree(base, target)
    for path in [p for p in target.rglob("*") if p.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(APPLE_DOUBLE)
    (target / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    return target


def test_hidden_files_of_macos_stay_behind(tmp_path: Path) -> None:
    base = make_exportable(tmp_path / "base", bits=8)
    adapter = make_adapter(tmp_path / "adapters", base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    base = on_a_disk_of_another_system(base, tmp_path / "copy")
    adapter = on_a_disk_of_another_system(adapter, tmp_path / "copied_adapters")
    report = fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    assert not [p.name for p in (tmp_path / "fused").rglob("*") if p.name.startswith(".")]
    assert (tmp_path / "fused/additional_chat_templates/tool_use.jinja").exists()
    assert not report.left_out
    export_gguf(base, tmp_path / "model.gguf")
    assert b"chat_template.tool_use" in (tmp_path / "model.gguf").read_bytes()
    assert b"Mac OS X" not in (tmp_path / "model.gguf").read_bytes()
    hidden = "additional_chat_templates/._tool_use.jinja"
    assert not any(belongs(hidden, step) for step in Step)


def snapshot_without_a_blob(base: Path, target: Path, gone: str) -> Path:
    """huggingface/huggingface_hub#1388: a snapshot in the cache with a link to nothing."""
    snapshot = target / "models--acme--tiny/snapshots/0123456789"
    blobs = target / "models--acme--tiny/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(base, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (blobs / gone).unlink()
    return snapshot


@pytest.mark.parametrize("gone", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_link_to_nothing_is_named(tmp_path: Path, gone: str) -> None:
    base = make_exportable(tmp_path / "base", bits=None)
    adapter = make_adapter(tmp_path / "adapters", base)
    snapshot = snapshot_without_a_blob(base, tmp_path / "hub", gone)
    with pytest.raises(CheckpointError, match=rf"{gone}: "):
        fuse(snapshot, adapter, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


# --- adapters -----------------------------------------------------------------------------------


def with_full_paths_for_keys(adapter: Path, target: Path) -> Path:
    """unslothai/unsloth-zoo#957: whole paths in ``keys``, and more layers than the model has."""
    shutil.copytree(adapter, target)
    keys = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys}
    return settings(target, "adapter_config.json", num_layers=32, lora_parameters=parameters)


def of_an_older_mlx_lm(adapter: Path, target: Path) -> Path:
    """ml-explore/mlx#1463: ``lora_layers`` where mlx-lm reads ``num_layers`` since 0.19."""
    shutil.copytree(adapter, target)
    config = json.loads((target / "adapter_config.json").read_text())
    config["lora_layers"] = config.pop("num_layers")
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("made", [with_full_paths_for_keys, of_an_older_mlx_lm])
def test_fused_as_the_adapter_was_trained(dense: Path, tmp_path: Path, made: Made) -> None:
    trained = make_adapter(tmp_path / "adapters", dense, keys=["self_attn.q_proj"])
    fuse(dense, made(trained, tmp_path / "made"), tmp_path / "fused")
    unfused = load_adapters(load_model(dense)[0], str(trained))
    fused = load_model(tmp_path / "fused")[0]
    assert mx.allclose(logits(fused), logits(unfused), atol=1e-4)


def with_a_word_for_keys(adapter: Path, target: Path) -> Path:
    """MakazhanAlpamys/Soup#392: ``keys`` is ["auto"], with which mlx-lm once loaded nothing."""
    shutil.copytree(adapter, target)
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["auto"]}
    return settings(target, "adapter_config.json", lora_parameters=parameters)


def with_a_tensor_too_many(adapter: Path, target: Path) -> Path:
    """ml-explore/mlx-lm#1725: a tensor that no LoRA layer has."""
    name = "model.layers.0.self_attn.q_proj.lora_typo"
    shutil.copytree(adapter, target)
    tensors = mx.load(str(target / "adapters.safetensors"))
    mx.eval(tensors)
    mx.save_safetensors(str(target / "adapters.safetensors"), {**tensors, name: mx.zeros((1,))})
    return target


def with_numbered_checkpoints_only(adapter: Path, target: Path) -> Path:
    """MakazhanAlpamys/Soup#634: training that was stopped."""
    shutil.copytree(adapter, target)
    for step in ("0000100", "0000200"):
        shutil.copy(target / "adapters.safetensors", target / f"{step}_adapters.safetensors")
    (target / "adapters.safetensors").unlink()
    return target


def of_an_untied_head(adapter: Path, target: Path) -> Path:
    """thinking-machines-lab/tinker-cookbook#593: an update of ``lm_head`` for a tied model."""
    base = make_model(target.parent / "untied", UNTIED, bits=None)
    return make_adapter(target, base, keys=["self_attn.q_proj", "lm_head"])


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (with_a_word_for_keys, r"is not among lora_parameters\.keys"),
        (with_a_tensor_too_many, "q_proj.lora_typo' is not one that a lora adapter"),
        (with_numbered_checkpoints_only, "to fuse 0000200_adapters.safetensors, copy it"),
        (of_an_untied_head, "lm_head is no module of the base"),
    ],
)
def test_adapters_refused(
    dense: Path, adapter: Path, tmp_path: Path, made: Made, told: str
) -> None:
    with pytest.raises(AdapterError, match=told):
        prepare_fuse(dense, made(adapter, tmp_path / "made"), tmp_path / "fused")


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_too_long(
    dense: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    length: int,
) -> None:
    """EleutherAI/lm-evaluation-harness#3777: a folder named after every setting of a run."""
    target = tmp_path / ("o" * length)
    arguments = ("--model", str(dense), "--adapter-path", str(adapter), "--save-path", str(target))
    assert exit_code(monkeypatch, "fuse", *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert target.name in line
    assert "too long" in line


@pytest.mark.parametrize(
    ("name", "loads"), [("Tiny [4bit]", False), ("100% *new* {漢字} [x?", True)]
)
def test_a_name_that_mlx_lm_takes_for_a_pattern(
    dense: Path, adapter: Path, tmp_path: Path, name: str, loads: bool
) -> None:
    """DominikDoom/a1111-sd-webui-tagcomplete#335, tensorflow/tensorflow#32614: [ ] in names."""
    if loads:
        fuse(dense, adapter, tmp_path / name)
        load_model(tmp_path / name)
        return
    shutil.copytree(dense, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / name)
    with pytest.raises(OutputError, match="mlx-lm takes the brackets for a pattern"):
        prepare_fuse(dense, adapter, tmp_path / name, overwrite=True)
