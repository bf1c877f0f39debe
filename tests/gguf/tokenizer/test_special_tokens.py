"""Which tokens have a role, whatever file says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tokenizer_folders import (
    ROWS,
    Json,
    added,
    byte_folder,
    byte_level,
    tokenizer_json,
    write_folder,
)

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary


class TestSpecialTokens:
    EXTRA = (
        added(300, "<|end_of_text|>"),
        added(301, "<|eot_id|>"),
        added(302, "<|eom_id|>"),
        added(303, "<|stop|>"),
        added(304, "<|halt|>"),
    )

    def _read(self, tmp_path: Path, model: Json, **files: Any) -> Vocabulary:
        tokens = [added(0, "<s>"), *self.EXTRA]
        return read_vocabulary(byte_folder(tmp_path, model, added_tokens=tokens, **files), ROWS)

    def test_first_of_a_list_is_eos_and_the_end_of_turn_eot(
        self, tmp_path: Path, byte_model: Json
    ) -> None:
        read = self._read(
            tmp_path,
            byte_model,
            generation_config={"eos_token_id": [300, 302, 301]},
            tokenizer_config={"eos_token": "<|eot_id|>", "bos_token": {"content": "<s>"}},
        )
        assert (read.special.eos, read.special.eot, read.special.eom) == (300, 301, 302)
        assert read.special.bos == 0
        assert read.special.stops == (300, 302, 301)
        assert read.stop_texts == ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        assert read.notes == ()

    def test_every_file_counts(self, tmp_path: Path, byte_model: Json) -> None:
        read = self._read(
            tmp_path,
            byte_model,
            config={"eos_token_id": 300, "text_config": {"bos_token_id": 0, "pad_token_id": 303}},
            special_tokens_map={"eos_token": "<|eot_id|>", "unk_token": "<s>"},
        )
        assert (read.special.eos, read.special.eot) == (300, 301)
        assert (read.special.bos, read.special.pad, read.special.unk) == (0, 303, 0)

    def test_stops_that_llama_cpp_does_not_know(self, tmp_path: Path, byte_model: Json) -> None:
        ids = [300, 303, 304]
        read = self._read(tmp_path, byte_model, generation_config={"eos_token_id": ids})
        assert read.special.eom == 303
        assert read.notes == ("llama.cpp does not stop at '<|halt|>'",)

    @pytest.mark.parametrize("value", [ROWS, -1, True, "7", 1.5, [5, ROWS]])
    @pytest.mark.parametrize("file", ["generation_config", "config"])
    def test_refuses_ids_out_of_range(
        self, tmp_path: Path, byte_model: Json, value: Any, file: str
    ) -> None:
        with pytest.raises(CheckpointError, match=rf"{file}\.json: eos_token_id is"):
            self._read(tmp_path, byte_model, **{file: {"eos_token_id": value}})

    def test_no_padding_token(self, tmp_path: Path, byte_model: Json) -> None:
        read = self._read(tmp_path, byte_model, config={"pad_token_id": -1})
        assert read.special.pad is None

    def test_refuses_an_end_that_is_no_token(self, tmp_path: Path, byte_model: Json) -> None:
        with pytest.raises(CheckpointError, match=r"eos_token '<nope>' is none of"):
            self._read(tmp_path, byte_model, tokenizer_config={"eos_token": "<nope>"})

    @pytest.mark.parametrize(
        ("before", "after", "adds", "notes"),
        [
            (["<s>"], [], (True, False), 0),
            (["<s>"], ["<|eot_id|>"], (True, True), 0),
            ([], [], (False, False), 0),
            (["<|stop|>", "<s>"], [], (False, False), 1),
            ([], ["<|halt|>"], (False, False), 1),
        ],
    )
    def test_template_says_what_goes_around_a_text(
        self,
        tmp_path: Path,
        byte_model: Json,
        before: list[str],
        after: list[str],
        adds: tuple[bool, bool],
        notes: int,
    ) -> None:
        single = [
            *({"SpecialToken": {"id": t, "type_id": 0}} for t in before),
            {"Sequence": {"id": "A", "type_id": 0}},
            *({"SpecialToken": {"id": t, "type_id": 0}} for t in after),
        ]
        post = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
        tokenizer = tokenizer_json(
            byte_model,
            byte_level(use_regex=True),
            added_tokens=[added(0, "<s>"), *self.EXTRA],
            post_processor={"type": "Sequence", "processors": [byte_level(), post]},
        )
        folder = write_folder(
            tmp_path,
            tokenizer,
            tokenizer_config={
                "bos_token": "<s>",
                "eos_token": "<|eot_id|>",
                # The template counts.
                "add_bos_token": not adds[0],
            },
        )
        read = read_vocabulary(folder, ROWS)
        assert (read.special.add_bos, read.special.add_eos) == adds
        assert len(read.notes) == notes

    def test_settings_count_without_a_template(self, tmp_path: Path, byte_model: Json) -> None:
        both = {"bos_token": "<s>", "add_bos_token": True}
        assert self._read(tmp_path / "a", byte_model, tokenizer_config=both).special.add_bos
        alone = {"add_bos_token": True}
        assert not self._read(tmp_path / "b", byte_model, tokenizer_config=alone).special.add_bos
