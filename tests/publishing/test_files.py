"""Which files of a folder are published, and which folders are not."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.publishing.files import LeftOut, PublishedModel

WEIGHTS = "model.safetensors"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        PublishedModel.open(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such model folder"),
        (lambda f: (f / "config.json").unlink(), "config.json: the file is missing"),
        (lambda f: (f / WEIGHTS).unlink(), f"names {WEIGHTS}, which is not there"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), WEIGHTS),
        (lambda f: shutil.copy(f / WEIGHTS, f / "model-2.safetensors"), "is in both"),
        (lambda f: (f / "model.gguf").write_bytes(b"not a GGUF file"), "model.gguf: is no GGUF"),
    ],
)
def test_what_is_no_complete_model(fused: Path, spoil: Any, message: str) -> None:
    spoil(fused)
    refused(fused, message)


def test_a_model_that_is_not_fused(fused: Path) -> None:
    import mlx.core as mx

    tensors = mx.load(str(fused / WEIGHTS))
    tensors["model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((4, 4))
    mx.save_safetensors(str(fused / WEIGHTS), tensors, {"format": "mlx"})
    (fused / "model.safetensors.index.json").unlink()
    refused(fused, "lora_a.*fuse it first")


def test_only_what_belongs_to_a_model_goes(fused: Path, tmp_path: Path) -> None:
    strays = {
        ".env": "hidden",
        "adapters.safetensors": "of an adapter",
        "0000100_adapters.safetensors": "of an adapter",
        "adapter_config.json": "of an adapter",
        "optimizer.safetensors": "a state of training",
        "training_args.bin": "a state of training",
        "pytorch_model.bin": "pickled",
        "model.pt": "pickled",
        "train.jsonl": "not part of a model",
        "secrets.json": "not part of a model",
        "notes.txt": "not part of a model",
        "modeling_tiny.py": "code",
        "Modelfile": "its FROM names no GGUF file",
    }
    before = PublishedModel.open(fused).names
    for name in strays:
        (fused / name).write_text("FROM ./model.gguf")
    (fused / "checkpoint-100").mkdir()
    (fused / "checkpoint-100" / WEIGHTS).write_text("x")
    (tmp_path / "private.txt").write_text("private")
    (fused / "notes.md").symlink_to(tmp_path / "private.txt")
    os.mkfifo(fused / "vocab.txt")
    model = PublishedModel.open(fused)
    assert model.names == before
    left_out = {item.name: item.reason for item in model.left_out}
    for name, reason in strays.items():
        assert left_out.pop(name).startswith(reason)
    assert left_out == {
        "checkpoint-100/": "a folder",
        "notes.md": "not part of a model",
        "vocab.txt": "not part of a model",
    }


def test_chat_templates_in_their_folder(fused: Path) -> None:
    templates = fused / "additional_chat_templates"
    (templates / "old").mkdir(parents=True)
    (templates / "tools.jinja").write_text("{{ tools }}")
    (templates / "draft.md").write_text("a draft")
    model = PublishedModel.open(fused)
    assert f"{templates.name}/tools.jinja" in model.names
    assert model.left_out == (
        LeftOut(f"{templates.name}/draft.md", "not part of a model"),
        LeftOut(f"{templates.name}/old/", "a folder"),
    )


def test_code_goes_where_it_is_trusted(fused: Path) -> None:
    (fused / "modeling_tiny.py").write_text("x = 1\n")
    assert "modeling_tiny.py" not in PublishedModel.open(fused).names
    assert "modeling_tiny.py" in PublishedModel.open(fused, trust_remote_code=True).names


@pytest.mark.parametrize("name", ["LICENSE", "extra.gguf"])
def test_a_link_out_of_the_folder(fused: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    (fused / name).symlink_to(tmp_path / "secret")
    refused(fused, "a link that leads out of")


def test_a_path_of_this_machine(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = (fused / "config.json").read_text()
    for path in ("/home/somebody/models/llama", str(fused)):
        changed = {**json.loads(config), "_name_or_path": path}
        (fused / "config.json").write_text(json.dumps(changed))
        refused(fused, "config.json: tells a path of this")
    (fused / "config.json").write_text(config)
    (fused / "README.md").write_text("Trained in /home/somebody/work.")
    refused(fused, "README.md: tells a path of this")


def test_what_is_missing_is_told(fused: Path) -> None:
    assert PublishedModel.open(fused).warnings == ()
    (fused / "fusekit.json").unlink()
    (fused / "tokenizer.json").unlink()
    recipe, tokenizer = PublishedModel.open(fused).warnings
    assert "there is no fusekit.json" in recipe
    assert "there is no tokenizer" in tokenizer
