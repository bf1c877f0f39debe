"""Tokenizers of public reports, in miniature: read as mlx-lm reads them, or refused in one line."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer
from support.exportable import VOCABULARY, make_exportable
from support.pretokenizer_families import TEKKEN
from support.tiny import make_adapter
from support.tokenizer_folders import added, read_keys

from mlx_fusekit import export_gguf, prepare_fuse
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.vocabulary import read_vocabulary

PAD = added(VOCABULARY, "<pad>")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_exportable(tmp_path / "model")


def change(folder: Path, name: str, **changed: Any) -> None:
    """Change a JSON file of a folder, or write it."""
    path = folder / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changed))


def of_mistral_only(folder: Path) -> Path:
    """ollama/ollama#13465, ml-explore/mlx-lm#1041: ``tekken.json`` and no other tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    tokens = [*(bytes([i]) for i in range(256)), b"th", b"the"]
    texts = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    content = {
        "config": {
            "pattern": TEKKEN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) + len(texts),
            "default_num_special_tokens": len(texts),
            "version": "v3",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for i, token in enumerate(tokens)
        ],
        "special_tokens": [
            {"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(texts)
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder


def test_a_tokenizer_that_is_tekken_json_calibrates(model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapters", model)
    prepared = prepare_fuse(of_mistral_only(model), adapter, tmp_path / "fused")
    assert load_tokenizer(model).decode(load_tokenizer(model).encode("the")) == "the"
    assert prepared.strategy is not None
    assert prepared.strategy.name == "calibrated"
    assert prepared.notes == ()


def test_a_tokenizer_that_is_tekken_json_can_be_written_for_export(
    model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(CheckpointError, match=r"tekken\.json: .*save_pretrained") as refused:
        export_gguf(of_mistral_only(model), tmp_path / "model.gguf")
    # The cure is what the line says.
    _, _, line = str(refused.value).partition("writes tokenizer.json: ")
    eval(line, {"AutoTokenizer": AutoTokenizer})
    export_gguf(model, tmp_path / "model.gguf")


def padding_in_tokenizer_json(folder: Path) -> None:
    """ggml-org/llama.cpp#6111: a fine-tune's ``<pad>``, for which the embedding has no row."""
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder, "tokenizer", added_tokens=[*tokens, PAD])
    change(folder, "tokenizer_config", pad_token="<pad>")
    change(folder, "generation_config", pad_token_id=VOCABULARY)


def padding_in_added_tokens_json(folder: Path) -> None:
    """OpenNMT/CTranslate2#1415: Llama 2 as it was first published."""
    change(folder, "added_tokens", **{"<pad>": VOCABULARY})


def padding_in_tokenizer_config(folder: Path) -> None:
    """hf-lin/ChatMusician#23: the same, as transformers saves it again."""
    change(folder, "tokenizer_config", added_tokens_decoder={str(VOCABULARY): PAD})


@pytest.mark.parametrize(
    "made", [padding_in_tokenizer_json, padding_in_added_tokens_json, padding_in_tokenizer_config]
)
def test_padding_that_has_no_row_is_left_out(
    model: Path, tmp_path: Path, made: Callable[[Path], None]
) -> None:
    export_gguf(model, tmp_path / "before.gguf")
    made(model)
    assert load_tokenizer(model).get_vocab()["<pad>"] == VOCABULARY
    report = export_gguf(model, tmp_path / "after.gguf")
    assert any("'<pad>' is left out: its id is 1024" in note for note in report.notes)
    before, after = (read_keys(tmp_path / f"{name}.gguf") for name in ("before", "after"))
    assert after["tokenizer.ggml.tokens"] == before["tokenizer.ggml.tokens"]


def test_a_stop_that_has_no_row_is_refused(model: Path) -> None:
    """Left out like padding, the model would never stop."""
    padding_in_tokenizer_json(model)
    change(model, "tokenizer_config", eos_token="<pad>")
    with pytest.raises(CheckpointError, match="token '<pad>' has id 1024"):
        read_vocabulary(model, VOCABULARY)


def extra_tokens_in_a_list(folder: Path) -> None:
    """ml-explore/mlx-lm#661, unslothai/unsloth-zoo#835: as transformers 5 writes them."""
    change(folder, "tokenizer_config", extra_special_tokens=["<|im_start|>", "<|im_end|>"])


def class_that_transformers_4_has_not(folder: Path) -> None:
    """ml-explore/mlx-lm#682: ``TokenizersBackend``."""
    change(folder, "tokenizer_config", tokenizer_class="TokenizersBackend")


def class_that_nobody_has(folder: Path) -> None:
    """huggingface/transformers#47553: a class of the publisher's own."""
    change(folder, "tokenizer_config", tokenizer_class="FancyTokenizer")


@pytest.mark.parametrize(
    "made", [extra_tokens_in_a_list, class_that_transformers_4_has_not, class_that_nobody_has]
)
def test_the_same_vocabulary(model: Path, made: Callable[[Path], None]) -> None:
    before = read_vocabulary(model, VOCABULARY)
    made(model)
    assert read_vocabulary(model, VOCABULARY) == before
    assert load_tokenizer(model).encode("<|im_start|>") == [1]
