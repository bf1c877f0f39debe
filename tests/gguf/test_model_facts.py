"""What a GGUF file tells people of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, Metadata
from support.tokenizer_folders import Json, read_keys, write_folder

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.model_facts import add_facts, loadable_name, read_model_facts
from mlx_fusekit.hub import LocalFolder

CARD = """---
model_name: Kind Llama
license: [apache-2.0, mit]
license_name: kind-license
license_link: https://example.org/LICENSE
language:
- en
- de
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- sql
- text-generation
base_model: meta-llama/Llama-3.2-1B-Instruct
---
# A model
"""


def _read(folder: Path, card: str | None = None, repo_id: str | None = None, **files: Any) -> Any:
    write_folder(folder, **files)
    if card is not None:
        (folder / "README.md").write_text(card, "utf-8")
    return read_model_facts(LocalFolder(folder, repo_id, "abc" if repo_id else None))


def _keys(tmp_path: Path, facts: Metadata, tokens: tuple[str, ...] = ()) -> Json:
    writer = GGUFWriter(tmp_path / "facts.gguf", "llama")
    add_facts(facts, writer, tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    keys = read_keys(tmp_path / "facts.gguf")
    return {k: v for k, v in keys.items() if k.startswith("general.")}


def test_from_a_model_card(tmp_path: Path) -> None:
    facts = _read(tmp_path / "m", CARD, "mlx-community/Kind-4bit", config={"quantization": {}})
    assert _keys(tmp_path, facts) == {
        "general.architecture": "llama",
        "general.name": "Kind Llama",
        "general.organization": "mlx-community",
        "general.quantized_by": "mlx-community",
        "general.license": "apache-2.0, mit",
        "general.license.name": "kind-license",
        "general.license.link": "https://example.org/LICENSE",
        "general.source.url": "https://huggingface.co/mlx-community/Kind-4bit",
        "general.source.repo_url": "https://huggingface.co/mlx-community/Kind-4bit",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Llama 3.2 1B Instruct",
        "general.base_model.0.organization": "meta-llama",
        "general.base_model.0.repo_url": "https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct",
        "general.tags": ["sql", "text-generation"],
        "general.languages": ["en", "de"],
    }


def test_from_a_recipe(tmp_path: Path) -> None:
    recipe = {
        "base": {"id": "mlx-community/Qwen3-4B-4bit"},
        "adapters": [{"id": "me/sql-lora"}, {"id": "style"}],
    }
    facts = _read(
        tmp_path / "fused-model",
        CARD.replace("model_name: Kind Llama\n", ""),
        fusekit=recipe,
    )
    assert facts.name == "fused-model"
    assert facts.base_models == [
        {
            "name": "Qwen3 4B 4bit",
            "organization": "mlx-community",
            "repo_url": "https://huggingface.co/mlx-community/Qwen3-4B-4bit",
        }
    ]
    assert facts.description == (
        "mlx-community/Qwen3-4B-4bit with me/sql-lora and style fused into it by mlx-fusekit."
    )
    assert facts.source_url is None
    assert facts.quantized_by is None


def test_a_folder_without_anything(tmp_path: Path) -> None:
    assert _read(tmp_path / "bare") == Metadata(name="bare")
    assert _keys(tmp_path, Metadata(name="bare")) == {
        "general.architecture": "llama",
        "general.name": "bare",
    }


@pytest.mark.parametrize(
    "path",
    ["/home/me/model", "~/model", "./model", "../model", "C:\\me\\model", "file:///x", "\\\\h\\s"],
)
def test_no_local_path_anywhere(tmp_path: Path, path: str) -> None:
    keys = ("model_name", "license", "license_name", "license_link", "language", "description")
    front = "".join(f"{key}: '{path}'\n" for key in (*keys, "pipeline_tag", "quantized_by"))
    card = f"---\n{front}tags: ['{path}', good]\nbase_model: ['{path}', a/b/c]\n---\n"
    recipe = {"base": {"id": path}, "adapters": [{"id": path}]}
    facts = _read(
        tmp_path / "m", card, fusekit=recipe, config={"_name_or_path": path, "quantization": {}}
    )
    assert facts == Metadata(name="m", tags=["good"])


@pytest.mark.parametrize(
    "card",
    [
        "no front matter",
        "---\n: [\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: 7\ntags: {a: b}\nlanguage: [1, null]\nbase_model: 3\n---\n",
        "---\n---\n",
    ],
)
def test_a_useless_card_says_nothing(tmp_path: Path, card: str) -> None:
    assert _read(tmp_path / "m", card) == Metadata(name="m")


def test_texts_are_bounded_and_on_one_line(tmp_path: Path) -> None:
    card = "---\ndescription: |\n  one\n  two " + "x" * 5000 + "\n---\n"
    description = _read(tmp_path / "m", card).description
    assert description.startswith("one two xxx")
    assert len(description) == 2000


@pytest.mark.parametrize("recipe", [[], {"base": 7}])
def test_refuses_a_damaged_recipe(tmp_path: Path, recipe: Any) -> None:
    with pytest.raises(CheckpointError, match=r"fusekit\.json"):
        _read(tmp_path / "m", fusekit=recipe)


def test_names_that_llama_cpp_stumbles_over(tmp_path: Path) -> None:
    assert loadable_name("My-phi3-tune", ()) == "My-Phi 3-tune"
    assert loadable_name("Phi-3-mini", ("<s>", "</s>", "<unk>")) == "Phi 3-mini"
    tokens = ("<s>", "</s>", "<unk>", "<|endoftext|>")
    assert loadable_name("Phi-3-mini", tokens) == "Phi-3-mini"
    assert _keys(tmp_path, Metadata(name="phi-3"))["general.name"] == "Phi 3"
