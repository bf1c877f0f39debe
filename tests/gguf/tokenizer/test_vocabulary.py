"""The keys of a GGUF file that a vocabulary becomes."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader
from support.tokenizer_folders import (
    ROWS,
    Json,
    byte_folder,
    piece_folder,
    piece_json,
    write_gguf,
)

from mlx_fusekit.gguf.tokenizer.vocabulary import read_vocabulary


def _keys(path: Path) -> Json:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


class TestKeys:
    def test_byte_level(self, tmp_path: Path, byte_model: Json) -> None:
        folder = byte_folder(
            tmp_path,
            byte_model,
            tokenizer_config={
                "bos_token": "<s>",
                "chat_template": [
                    {"name": name, "template": name} for name in ("z", "default", "a", "m")
                ],
            },
            generation_config={"eos_token_id": 300},
        )
        read = read_vocabulary(folder, ROWS)
        keys = _keys(write_gguf(read, tmp_path / "v.gguf"))
        assert keys["tokenizer.ggml.model"] == "gpt2"
        assert keys["tokenizer.ggml.pre"] == "gpt-2"
        assert keys["tokenizer.ggml.tokens"] == [t.text for t in read.tokens]
        assert keys["tokenizer.ggml.token_type"] == [int(t.kind) for t in read.tokens]
        assert keys["tokenizer.ggml.merges"] == list(read.merges)
        assert keys["tokenizer.ggml.bos_token_id"] == 0
        assert keys["tokenizer.ggml.eos_token_id"] == keys["tokenizer.ggml.eot_token_id"] == 300
        assert keys["tokenizer.ggml.add_bos_token"] is False
        assert keys["tokenizer.ggml.add_eos_token"] is False
        assert keys["tokenizer.chat_template"] == "default"
        assert keys["tokenizer.chat_template.m"] == "m"
        assert keys["tokenizer.chat_templates"] == ["a", "m", "z"]
        assert "tokenizer.ggml.scores" not in keys
        assert "tokenizer.ggml.padding_token_id" not in keys

    def test_sentencepiece(self, tmp_path: Path) -> None:
        read = read_vocabulary(piece_folder(tmp_path, piece_json([["a", "b"]])), 270)
        keys = _keys(write_gguf(read, tmp_path / "v.gguf"))
        assert keys["tokenizer.ggml.model"] == "llama"
        assert "tokenizer.ggml.pre" not in keys
        assert "tokenizer.ggml.merges" not in keys
        assert keys["tokenizer.ggml.scores"] == [t.score for t in read.tokens]
        assert keys["tokenizer.ggml.unknown_token_id"] == 0
        assert keys["tokenizer.ggml.add_space_prefix"] is False
