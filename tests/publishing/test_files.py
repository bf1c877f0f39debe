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
    os.mkfifo(fused / "pipe")
    model = PublishedModel.open(fused)
    assert model.names == before
    left_out = {item.name: item.reason for item in model.left_out}
    for name, reason in strays.items():
        assert left_out.pop(name).startswith(reason)
    assert left_out == {
        "checkpoint-100/": "a folder",
        "notes.md": "not part of a model",
        "pipe": "not part of a model",
    }


def test_chat_templates_in_their_folder(fused: Path) -> None:
    templates = fused / "additional_chat_templates"
    (templates / "old").mkdir(parents=True)
    (templates / "tools.jinja").write_text("{{ tools }}")
    (templates / "draft.md").write_text("a draft")
    (templates / "._tools.jinja").write_text("of macOS")
    (templates / ".secret.jinja").write_text("{{ secret }}")
    model = PublishedModel.open(fused)
    assert f"{templates.name}/tools.jinja" in model.names
    assert model.left_out == (
        LeftOut(f"{templates.name}/._tools.jinja", "hidden"),
        LeftOut(f"{templates.name}/.secret.jinja", "hidden"),
        LeftOut(f"{templates.name}/draft.md", "not part of a model"),
        LeftOut(f"{templates.name}/old/", "a folder"),
    )


def test_code_goes_where_it_is_trusted(fused: Path) -> None:
    (fused / "modeling_tiny.py").write_text("x = 1\n")
    assert "modeling_tiny.py" not in PublishedModel.open(fused).names
    assert "modeling_tiny.py" in PublishedModel.open(fused, trust_remote_code=True).names


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "extra.gguf", "README.md", "config.json", "tokenizer.json", "fusekit.json",
     "model.safetensors.index.json", WEIGHTS, "additional_chat_templates/tools.jinja"],
)  # fmt: skip
def test_a_link_out_of_the_folder(fused: Path, tmp_path: Path, name: str) -> None:
    path, secret = fused / name, tmp_path / "secret"
    secret.write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    refused(fused, f"{name}: a link that leads out of")


def test_a_path_of_this_machine(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = (fused / "config.json").read_text()
    for path in ("/home/somebody/models/llama", str(fused)):
        changed = {**json.loads(config), "_name_or_path": path}
        (fused / "config.json").write_text(json.dumps(changed))
        refused(fused, 'config.json: tells a path of this .*, at "_name_or_path"; remove it before')
    (fused / "config.json").write_text(config)
    (fused / "README.md").write_text("Trained in /home/somebody/work.")
    refused(fused, "README.md: tells a path of this")


TEXTS = (
    "LICENSE", "NOTICE.txt", "README.md", "Modelfile", "chat_template.jinja", "modeling_tiny.py",
    "additional_chat_templates/tools.jinja", "tokenizer.model", "USE_POLICY.md",
)  # fmt: skip
JSONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "fusekit.json",
    "preprocessor_config.json", "model.safetensors.index.json",
)  # fmt: skip


@pytest.mark.parametrize("secret", ["see file:///home/jane/runs.", "hf_aB3" + "dE5fG7hI9j" * 4])
@pytest.mark.parametrize("name", [*TEXTS, *JSONS])
def test_every_file_is_searched(
    fused: Path, monkeypatch: pytest.MonkeyPatch, name: str, secret: str
) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    path = fused / name
    path.parent.mkdir(exist_ok=True)
    if name in JSONS:
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**held, "chat": [{"deep": {secret: 1}}]}))
    elif name == "Modelfile":
        make_gguf(fused / "model.gguf")
        path.write_text(f'FROM ./model.gguf\nSYSTEM "{secret}"')
    else:
        path.write_text(f"One line.\n{secret}\n")
    with pytest.raises(CheckpointError) as caught:
        PublishedModel.open(fused, trust_remote_code=True)
    text = str(caught.value)
    assert text.startswith(f"{path}: tells a ")
    assert text.endswith("; remove it before publishing")
    assert "in line 2" in text or 'at "chat.deep.' in text
    assert "\n" not in text
    assert "dE5fG7hI9j" not in text


def test_the_metadata_of_weights_is_searched(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    monkeypatch.setenv("HOME", "/home/jane")
    tensors = mx.load(str(fused / WEIGHTS))
    metadata = {"format": "mlx", "from": "made of /home/jane/base"}
    mx.save_safetensors(str(fused / WEIGHTS), tensors, metadata)
    refused(fused, f'{WEIGHTS}: its __metadata__ tells a path of this machine .*, at "from"')


@pytest.mark.parametrize("value", ["/home/jane/imatrix.dat", ["en", "/home/jane/text.txt"]])
def test_the_metadata_of_gguf_files_is_searched(
    fused: Path, monkeypatch: pytest.MonkeyPatch, value: str | list[str]
) -> None:
    """llama.cpp writes where it found the importance matrix."""
    monkeypatch.setenv("HOME", "/home/jane")
    make_gguf(fused / "model.gguf", **{"tokenizer.ggml.tokens": ["/home/jane/x"]})
    PublishedModel.open(fused)
    make_gguf(fused / "model.gguf", **{"quantize.imatrix.file": value})
    refused(fused, 'model.gguf: its metadata tells a path .*, at "quantize.imatrix.file"')


def make_gguf(path: Path, **metadata: str | list[str]) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_tensor("output.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_usual_texts_go(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    texts = {
        "LICENSE": "On Debian, see /usr/share/common-licenses/Apache-2.0.",
        "chat_template.jinja": "{{ 'Run it in /home/user/project, or in /tmp/out.' }}",
        "vocab.json": '{"/root": 1, "/home": 2, "/root/a": 3}',
        "added_tokens.json": '{"/root": 1, "root": 2}',
    }
    for name, text in texts.items():
        (fused / name).write_text(text)
    assert texts.keys() <= set(PublishedModel.open(fused).names)


def test_what_is_missing_is_told(fused: Path) -> None:
    assert PublishedModel.open(fused).warnings == ()
    (fused / "fusekit.json").unlink()
    (fused / "tokenizer.json").unlink()
    recipe, tokenizer = PublishedModel.open(fused).warnings
    assert "there is no fusekit.json" in recipe
    assert "there is no tokenizer" in tokenizer
