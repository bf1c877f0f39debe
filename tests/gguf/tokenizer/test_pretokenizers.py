"""llama.cpp's name of a pre-tokenizer, or why it has none."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.pretokenizer_families import BLOOM, FAMILIES, SPELLINGS
from support.tokenizer_folders import (
    LLAMA3,
    QWEN2,
    ROWS,
    Json,
    byte_folder,
    byte_level,
    digits,
    sequence,
    split,
)

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.vocabulary import read_vocabulary


def _single(regex: str) -> Json:
    return sequence(split(regex), byte_level())


@pytest.mark.parametrize(
    ("name", "pre"), [*FAMILIES.items(), *SPELLINGS], ids=lambda v: v if v is str else None
)
def test_found_by_structure(tmp_path: Path, byte_model: Json, name: str, pre: Json) -> None:
    settings = {"bos_token": "<s>"}
    folder = byte_folder(tmp_path, byte_model, pre, tokenizer_config=settings)
    assert read_vocabulary(folder, ROWS).pre == name


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "bos", "cleans", "name"),
    [
        (_single(LLAMA3), True, True, None, "llama-bpe"),
        (_single(LLAMA3), False, True, None, "smaug-bpe"),
        (_single(LLAMA3), True, False, None, "glm4"),
        (_single(LLAMA3), False, False, None, "chatglm-bpe"),
        (_single(QWEN2), False, True, True, "stablelm2"),
        (_single(QWEN2), False, True, False, "qwen2"),
        (sequence(digits(), byte_level(use_regex=True)), False, True, True, "starcoder"),
        (sequence(digits(), byte_level(use_regex=True)), False, True, False, "smollm"),
        (_single(BLOOM), False, True, False, "poro-chat"),
        (_single(BLOOM), False, True, True, "bloom"),
    ],
)
def test_side_effects_tell_those_of_one_structure_apart(
    tmp_path: Path,
    byte_model: Json,
    pre: Json,
    ignore_merges: bool,
    bos: bool,
    cleans: bool | None,
    name: str,
) -> None:
    settings = {"bos_token": "<s>" if bos else None, "clean_up_tokenization_spaces": cleans}
    model = {**byte_model, "ignore_merges": ignore_merges}
    folder = byte_folder(tmp_path, model, pre, tokenizer_config=settings)
    assert read_vocabulary(folder, ROWS).pre == name


@pytest.mark.parametrize(
    ("pre", "named"),
    [
        (_single(r"\w+|\W+"), r"split \w+|\W+, then bytes"),
        (sequence(byte_level(use_regex=True, add_prefix_space=True)), "space in front"),
        (sequence(split(QWEN2, "MergedWithNext"), byte_level()), "split MergedWithNext"),
        (sequence(digits(individual=False), byte_level()), "digits in runs"),
        (_single(LLAMA3.replace("{1,3}", "{1,4}")), "{1,4}"),
        (_single(LLAMA3.replace(r"[\r\n]*", "")), "split"),
        (byte_level(), "(bytes)"),
        (sequence({"type": "BertPreTokenizer"}, byte_level()), "BertPreTokenizer"),
    ],
)
def test_refuses_an_unknown_one_and_says_what_it_does(
    tmp_path: Path, byte_model: Json, pre: Json, named: str
) -> None:
    with pytest.raises(CheckpointError, match=r"llama\.cpp has no pre-tokenizer") as caught:
        read_vocabulary(byte_folder(tmp_path, byte_model, pre), ROWS)
    assert named in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["Lowercase", "StripAccents", "Prepend"])
def test_refuses_normalizers(tmp_path: Path, byte_model: Json, kind: str) -> None:
    normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": kind}]}
    with pytest.raises(CheckpointError, match=f"the normalizer {kind}"):
        read_vocabulary(byte_folder(tmp_path, byte_model, normalizer=normalizer), ROWS)
