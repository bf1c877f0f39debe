"""SentencePiece vocabularies, from the model file or from tokenizer.json."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizer_folders import (
    ROWS,
    SPACE,
    Json,
    added,
    bpe,
    kinds_of,
    piece_folder,
    piece_json,
    tokenizer_json,
    train_pieces,
    write_folder,
)

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.sentencepiece_model import read_sentencepiece
from mlx_fusekit.gguf.tokenizer.vocabulary import read_vocabulary


def test_model_file_is_read_as_sentencepiece_reads_it(piece_model: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(piece_model))
    ours = read_sentencepiece(piece_model)
    assert ours.bpe
    assert ours.space_prefix
    assert [t.text for t in ours.tokens] == [
        theirs.id_to_piece(i) for i in range(theirs.get_piece_size())
    ]
    assert [t.score for t in ours.tokens] == [
        theirs.get_score(i) for i in range(theirs.get_piece_size())
    ]
    for i, token in enumerate(ours.tokens):
        assert (token.kind == TokenType.UNKNOWN) == theirs.is_unknown(i)
        assert (token.kind == TokenType.CONTROL) == theirs.is_control(i)
        assert (token.kind == TokenType.BYTE) == theirs.is_byte(i)


def test_folder_with_the_model_file_only(tmp_path: Path, piece_model: Path) -> None:
    folder = write_folder(
        tmp_path,
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True},
        added_tokens={"<pad>": 310},
    )
    (folder / "tokenizer.model").write_bytes(piece_model.read_bytes())
    read = read_vocabulary(folder, 312)
    assert (read.model, read.pre, read.space_prefix) == ("llama", None, True)
    assert read.tokens[310].text == "<pad>"
    assert read.tokens[310].kind == TokenType.USER_DEFINED
    assert read.tokens[311].kind == TokenType.UNUSED
    assert (read.special.bos, read.special.eos) == (1, 2)
    assert read.special.add_bos
    assert read.special.add_eos


def test_options_of_the_model_file(tmp_path: Path) -> None:
    path = train_pieces(
        tmp_path / "tokenizer.model",
        add_dummy_prefix=False,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=["<a b>", "  "],
    )
    model = read_sentencepiece(path)
    assert not model.space_prefix
    assert model.normalizes
    read = read_vocabulary(write_folder(tmp_path), 310)
    assert kinds_of(read)["<a b>"] == TokenType.USER_DEFINED
    assert read.notes == ("llama.cpp does not replace characters first",)


def test_refuses_unigram(tmp_path: Path) -> None:
    train_pieces(tmp_path / "tokenizer.model", model_type="unigram", vocab_size=286)
    with pytest.raises(CheckpointError, match="is a unigram model"):
        read_vocabulary(tmp_path, ROWS)


@settings(max_examples=40, deadline=None)
@given(cut=st.floats(0, 0.999), flip=st.integers(0, 255), place=st.floats(0, 0.999))
def test_damaged_model_files_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory,
    piece_model: Path,
    cut: float,
    flip: int,
    place: float,
) -> None:
    data = bytearray(piece_model.read_bytes())
    data[int(place * len(data))] ^= flip
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes(data[: 1 + int(cut * len(data))])
    try:
        read_sentencepiece(path)
    except CheckpointError as error:
        assert str(path) in str(error)


def test_scores_are_ranks_of_the_first_merge(tmp_path: Path) -> None:
    merges = [["a", "b"], [SPACE, "a"], [SPACE + "a", "b"], [SPACE, "ab"], ["b", "c"]]
    read = read_vocabulary(piece_folder(tmp_path, piece_json(merges)), 270)
    scores = {token.text: token.score for token in read.tokens}
    assert scores["ab"] == 0
    assert scores[SPACE + "a"] == -1
    assert scores[SPACE + "ab"] == -2
    assert scores["bc"] == -4
    assert scores["a"] == scores["<0x41>"] == -5
    kinds = kinds_of(read)
    assert kinds["<unk>"] == TokenType.UNKNOWN
    assert kinds["<0x41>"] == TokenType.BYTE
    assert kinds["<s>"] == TokenType.CONTROL
    assert kinds["[PAD269]"] == TokenType.UNUSED
    assert read.notes == ()


def test_says_which_merges_only_llama_cpp_does(tmp_path: Path) -> None:
    # "a"+"bc" also makes "abc", but tokenizer.json does not list it.
    merges = [["a", "b"], ["b", "c"], ["ab", "c"]]
    (note,) = read_vocabulary(piece_folder(tmp_path, piece_json(merges)), 270).notes
    assert note == "llama.cpp merges 1 tokens in ways that Hugging Face does not"


@pytest.mark.parametrize(
    ("prefix", "more"),
    [
        (True, {"normalizer": "prepend"}),
        (False, {"normalizer": "replace"}),
        (True, {"pre_tokenizer": {"prepend_scheme": "first", "split": False}}),
        (True, {"pre_tokenizer": {"prepend_scheme": "always", "split": False}}),
        (False, {"pre_tokenizer": {"prepend_scheme": "never", "split": False}}),
        (True, {"pre_tokenizer": {"add_prefix_space": True}}),
        (False, {"pre_tokenizer": {"add_prefix_space": False}}),
    ],
)
def test_space_prefix(tmp_path: Path, prefix: bool, more: Json) -> None:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizers = {
        "prepend": {"type": "Sequence", "normalizers": [prepend, replace]},
        "replace": replace,
    }
    normalizer = normalizers.get(more.get("normalizer", ""))
    pre = None
    if "pre_tokenizer" in more:
        pre = {"type": "Metaspace", "replacement": SPACE, **more["pre_tokenizer"]}
    model = piece_json([["a", "b"]])
    folder = write_folder(tmp_path, tokenizer_json(model, pre, normalizer=normalizer))
    assert read_vocabulary(folder, 270).space_prefix == prefix


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre": {"type": "Punctuation"}}, "Punctuation"),
        ({"pre": {"type": "Split", "pattern": {"String": "x"}}}, "'x'"),
    ],
)
def test_refuses_other_steps(tmp_path: Path, more: Json, named: str) -> None:
    content = tokenizer_json(piece_json([]), more.pop("pre", None), **more)
    with pytest.raises(CheckpointError, match=named):
        read_vocabulary(write_folder(tmp_path, content), 270)


def test_refuses_a_vocabulary_without_bytes(tmp_path: Path) -> None:
    model = piece_json([])
    del model["vocab"]["<0xE2>"]
    with pytest.raises(CheckpointError, match="no token for the byte 0xE2"):
        read_vocabulary(piece_folder(tmp_path, model), 270)


def test_tab_may_stand_for_its_byte(tmp_path: Path) -> None:
    model = piece_json([])
    model["vocab"]["\t"] = model["vocab"].pop("<0x09>")
    assert "\t" in kinds_of(read_vocabulary(piece_folder(tmp_path, model), 270))


def test_added_tokens_with_spaces(tmp_path: Path) -> None:
    # Found in raw text, a marked space never matches a space: it stays a piece. Found after
    # the normalizer, it does, and llama.cpp looks for the space itself.
    merges = [[SPACE, SPACE]]
    double = SPACE * 2
    raw = added(263, double, special=False)
    read = read_vocabulary(piece_folder(tmp_path / "a", piece_json(merges), raw), 270)
    assert kinds_of(read)[double] == TokenType.NORMAL
    marked = added(263, double, special=False, normalized=True)
    read = read_vocabulary(piece_folder(tmp_path / "b", piece_json(merges), marked), 270)
    assert kinds_of(read)["  "] == TokenType.USER_DEFINED


def test_model_file_gives_the_scores_where_it_agrees(tmp_path: Path, piece_model: Path) -> None:
    pieces = read_sentencepiece(piece_model).tokens
    vocabulary = {token.text: i for i, token in enumerate(pieces)}
    model = bpe(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    folder = piece_folder(tmp_path, model)
    (folder / "tokenizer.model").write_bytes(piece_model.read_bytes())
    read = read_vocabulary(folder, 310)
    assert [t.score for t in read.tokens[3:]] == [t.score for t in pieces[3:]]
    model["vocab"]["other"] = model["vocab"].pop(pieces[-1].text)
    piece_folder(tmp_path, model)
    assert {t.score for t in read_vocabulary(folder, 310).tokens} == {0.0}


@pytest.mark.parametrize("text", ["ab\0c", "[EMPTY_264]"])
def test_refuses_two_tokens_that_read_alike(tmp_path: Path, text: str) -> None:
    # llama.cpp would stop the program: it reads up to a NUL, and names empty tokens.
    model = piece_json([["a", "b"]])
    model["vocab"] |= {text: 265, "\0": 264}
    with pytest.raises(CheckpointError, match="are both"):
        read_vocabulary(piece_folder(tmp_path, model), 270)


def test_tokenizer_json_that_is_neither_kind(tmp_path: Path) -> None:
    model = {"type": "WordPiece", "vocab": {"a": 0}}
    with pytest.raises(CheckpointError, match="is a WordPiece model"):
        read_vocabulary(write_folder(tmp_path, tokenizer_json(model, None)), 10)
