"""A file of the user's that a stranger's folder links to reaches nothing that is made or said."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import exit_code

from mlx_fusekit import samples

SECRET = "canary-5d1f3b"
BASE = (
    "config.json",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tools.jinja",
    "preprocessor_config.json",
    "fusekit.json",
    "hf_quant_config.json",
    "Modelfile",
    "LICENSE",
    "NOTICE",
    "README.md",
    "notes.md",
    "train.jsonl",
    "other.json",
    "other.txt",
    ".env",
)
ADAPTER = ("adapter_config.json", "tokenizer.json", "fusekit.json", "README.md", "LICENSE")


def hide(path: Path, outside: Path) -> None:
    """Move what a file holds, with the secret in it, out of the folder; a link takes its place."""
    content = path.read_text("utf-8") if path.exists() else "{}" if path.suffix == ".json" else ""
    if path.suffix == ".json":
        text = json.dumps({**json.loads(content), "model_type_of": SECRET})
    else:
        text = f"{content}\n{SECRET}\n"
    hidden = outside / path.name
    hidden.write_text(text, "utf-8")
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(hidden)


def made(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def commands(base: Path, adapter: Path, out: Path) -> list[tuple[str, ...]]:
    sources = ("--model", str(base), "--adapter-path", str(adapter))
    fused = str(out / "fused")
    return [
        ("inspect", str(base)),
        ("inspect", str(adapter)),
        ("fuse", *sources, "--save-path", fused, "--requantize", "nearest"),
        ("export-lora", *sources, "--gguf-path", str(out / "lora.gguf")),
        ("convert-adapter", *sources, "--save-path", str(out / "peft"), "--to", "peft"),
        ("diff", str(base), str(base)),
        ("export-gguf", "--model", str(base), "--gguf-path", str(out / "m.gguf"), "--modelfile"),
        ("publish", "--path", str(base), "--repo", "me/name", "--dry-run"),
        ("publish", "--path", fused, "--repo", "me/name", "--dry-run"),
    ]


@pytest.mark.parametrize(
    ("of", "name"), [("base", name) for name in BASE] + [("adapter", name) for name in ADAPTER]
)
def test_behind_a_link(
    of: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    base = Path(shutil.copytree(samples.model_path(), tmp_path / "base"))
    adapter = Path(shutil.copytree(samples.adapter_path(), tmp_path / "adapter"))
    outside, out = tmp_path / "home", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    hide(tmp_path / of / name, outside)
    for arguments in commands(base, adapter, out):
        exit_code(monkeypatch, *arguments)
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert [path for path in made(out) if SECRET.encode() in path.read_bytes()] == []


def test_the_canary_sings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The same files in the folder itself do reach what is made, so that they would be seen."""
    base = Path(shutil.copytree(samples.model_path(), tmp_path / "base"))
    (tmp_path / "home").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("chat_template.jinja", "config.json", "LICENSE"):
        hide(base / name, tmp_path / "home")
        (tmp_path / "home" / name).replace(base / name)
    for arguments in commands(base, samples.adapter_path(), tmp_path / "out"):
        exit_code(monkeypatch, *arguments)
    found = {path.name for path in made(tmp_path / "out") if SECRET.encode() in path.read_bytes()}
    assert found >= {"chat_template.jinja", "config.json", "LICENSE"}
