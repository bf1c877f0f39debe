"""Byte-level vocabularies: tokens, merges, and what only one side does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from support.tokenizer_folders import (
    QWEN2,
    ROWS,
    Json,
    added,
    byte_folder,
    byte_level,
    sequence,
    split,
)

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.vocabulary import read_vocabulary


def test_tokens_keep_their_ids_and_get_types(tmp_path: Path, byte_model: Json) -> None:
    extra = [added(0, "<s>"), added(300, "<|im_end|>"), added(301, "<think>", special=False)]
    read = read_vocabulary(byte_folder(tmp_path, byte_model, added_tokens=extra), 304)
    expected = {i: text for text, i in byte_model["vocab"].items()}
    assert [t.text for t in read.tokens[:300]] == [expected[i] for i in range(300)]
    assert read.tokens[0].kind == read.tokens[300].kind == TokenType.CONTROL
    assert read.tokens[301].kind == TokenType.USER_DEFINED
    assert [t.text for t in read.tokens[302:]] == ["[PAD302]", "[PAD303]"]
    assert {t.kind for t in read.tokens[302:]} == {TokenType.UNUSED}
    assert {t.kind for t in read.tokens[1:300]} == {TokenType.NORMAL}
    assert (read.model, read.pre) == ("gpt2", "gpt-2")


def test_both_ways_to_write_merges(tmp_path: Path, byte_model: Json) -> None:
    pairs = [m if isinstance(m, list) else m.split(" ") for m in byte_model["merges"]]
    joined = [" ".join(pair) for pair in pairs]
    as_pairs = read_vocabulary(byte_folder(tmp_path / "a", {**byte_model, "merges": pairs}), ROWS)
    as_texts = read_vocabulary(byte_folder(tmp_path / "b", {**byte_model, "merges": joined}), ROWS)
    assert as_pairs.merges == as_texts.merges == tuple(joined)


@pytest.mark.parametrize("merge", [["t", "zzz"], "t h e", ["t"], 7, ["zz", "zz"]])
def test_refuses_merges_of_unknown_tokens(tmp_path: Path, byte_model: Json, merge: Any) -> None:
    merges = [*byte_model["merges"], merge]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: merge .* does not join"):
        read_vocabulary(byte_folder(tmp_path, {**byte_model, "merges": merges}), ROWS)


def test_padding_does_not_repeat_a_token(tmp_path: Path, byte_model: Json) -> None:
    extra = [added(0, "<s>"), added(300, "[PAD301]")]
    read = read_vocabulary(byte_folder(tmp_path, byte_model, added_tokens=extra), 302)
    assert read.tokens[301].text == "[[PAD301]]"


def test_refuses_more_tokens_than_rows(tmp_path: Path, byte_model: Json) -> None:
    with pytest.raises(CheckpointError, match=r"id 280, but the embedding has 280 rows"):
        read_vocabulary(byte_folder(tmp_path, byte_model, added_tokens=[added(0, "<s>")]), 280)


def test_added_token_beyond_the_embedding_is_refused_too(tmp_path: Path, byte_model: Json) -> None:
    with pytest.raises(CheckpointError, match=r"'<\|im_end\|>' has id 300"):
        read_vocabulary(byte_folder(tmp_path, byte_model), 300)


def test_image_token_of_a_multimodal_sibling_is_left_out(tmp_path: Path, byte_model: Json) -> None:
    extra = [added(0, "<s>"), added(300, "<image_soft_token>")]
    read = read_vocabulary(byte_folder(tmp_path, byte_model, added_tokens=extra), 300)
    assert len(read.tokens) == 300


def test_refuses_an_added_token_on_anothers_id(tmp_path: Path, byte_model: Json) -> None:
    with pytest.raises(CheckpointError, match=r"'<x>' has id 5, which is that of"):
        read_vocabulary(byte_folder(tmp_path, byte_model, added_tokens=[added(5, "<x>")]), ROWS)


def test_the_first_id_of_an_added_text_counts(tmp_path: Path, byte_model: Json) -> None:
    extra = [added(300, "<x>"), added(301, "<x>")]
    read = read_vocabulary(byte_folder(tmp_path, byte_model, added_tokens=extra), 302)
    assert [t.text for t in read.tokens[300:]] == ["<x>", "[PAD301]"]


def test_refuses_two_tokens_with_one_id(tmp_path: Path, byte_model: Json) -> None:
    vocabulary = {**byte_model["vocab"], "zzzz": 7}
    with pytest.raises(CheckpointError, match="'zzzz' the id 7, which is no free id"):
        read_vocabulary(byte_folder(tmp_path, {**byte_model, "vocab": vocabulary}), ROWS)


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel", None])
def test_refuses_other_models(tmp_path: Path, byte_model: Json, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"byte-level {kind} model"):
        read_vocabulary(byte_folder(tmp_path, {**byte_model, "type": kind}), ROWS)


def test_says_where_characters_are_composed_first(tmp_path: Path, byte_model: Json) -> None:
    folder = byte_folder(tmp_path, byte_model, normalizer={"type": "NFC"})
    assert any("NFC" in note for note in read_vocabulary(folder, ROWS).notes)


def test_says_which_tokens_only_one_side_takes_whole(tmp_path: Path, byte_model: Json) -> None:
    # A token that no merges make: whole only where merges are ignored for words.
    model = {**byte_model, "vocab": {**byte_model["vocab"], "qzqz": 300}}
    model["ignore_merges"] = True
    folder = byte_folder(
        tmp_path, model, sequence(split(QWEN2), byte_level()), added_tokens=[added(0, "<s>")]
    )
    (note,) = read_vocabulary(folder, ROWS).notes
    assert note.startswith("1 tokens, as 'qzqz', that Hugging Face takes whole")


def test_says_where_added_tokens_take_spaces_along(tmp_path: Path, byte_model: Json) -> None:
    folder = byte_folder(tmp_path, byte_model, added_tokens=[added(300, "<x>", rstrip=True)])
    assert "'<x>'" in read_vocabulary(folder, ROWS).notes[0]
