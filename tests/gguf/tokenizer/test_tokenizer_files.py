"""Chat templates, and folders without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tokenizer_folders import (
    ROWS,
    Json,
    byte_folder,
    byte_level,
    write_folder,
)

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary


class TestChatTemplates:
    def _read(self, tmp_path: Path, byte_model: Json, settings: Json) -> Vocabulary:
        folder = byte_folder(tmp_path, byte_model, tokenizer_config=settings)
        return read_vocabulary(folder, ROWS)

    def test_text(self, tmp_path: Path, byte_model: Json) -> None:
        read = self._read(tmp_path, byte_model, {"chat_template": "{{ x }}"})
        assert read.chat_templates == {"default": "{{ x }}"}

    def test_list(self, tmp_path: Path, byte_model: Json) -> None:
        templates = [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}]
        read = self._read(tmp_path, byte_model, {"chat_template": templates})
        assert read.chat_templates == {"default": "d", "tool_use": "t"}

    def test_file_wins(self, tmp_path: Path, byte_model: Json) -> None:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r")
        (tmp_path / "chat_template.jinja").write_text("file")
        read = self._read(tmp_path, byte_model, {"chat_template": "settings"})
        assert read.chat_templates == {"default": "file", "rag": "r"}

    @pytest.mark.parametrize("value", [7, ["x"], [{"name": "default"}]])
    def test_refuses_what_is_none(self, tmp_path: Path, byte_model: Json, value: Any) -> None:
        with pytest.raises(CheckpointError, match="chat_template is neither"):
            self._read(tmp_path, byte_model, {"chat_template": value})

    def test_refuses_a_link_out_of_the_folder(self, tmp_path: Path, byte_model: Json) -> None:
        (tmp_path / "secret").write_text("s")
        folder = byte_folder(tmp_path / "model", byte_model)
        (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match="leads out of the model's folder"):
            read_vocabulary(folder, ROWS)


class TestFolder:
    def test_refuses_a_folder_without_a_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="has neither tokenizer"):
            read_vocabulary(write_folder(tmp_path, config={}), ROWS)

    @pytest.mark.parametrize(
        "content", [{}, {"model": 7}, {"model": {"type": "BPE"}}, {"model": {"vocab": {}}}]
    )
    def test_refuses_a_tokenizer_without_tokens(self, tmp_path: Path, content: Json) -> None:
        content = {**content, "pre_tokenizer": byte_level(use_regex=True)}
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            read_vocabulary(write_folder(tmp_path, content), ROWS)
