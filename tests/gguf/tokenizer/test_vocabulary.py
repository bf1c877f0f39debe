"""From tokenizer files to the keys of a GGUF file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFReader, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pretokenizer_families import BLOOM, FAMILIES, SPELLINGS
from support.tokenizer_folders import (
    LLAMA3,
    QWEN2,
    SPACE,
    Json,
    added,
    bpe,
    byte_level,
    digits,
    sequence,
    split,
    tokenizer_json,
    write_folder,
    write_gguf,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.sentencepiece_model import read_sentencepiece
from mlx_fusekit.gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary

TEXTS = [
    "the cat and the dog",
    "a hat, a mat; 12 bats!",
    "then they sat there",
    "été à la plage",
    "whether weather",
]
ROWS = 320


@pytest.fixture(scope="module")
def byte_model() -> Json:
    """A byte-level BPE model of 300 tokens, trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model: Json = json.loads(tokenizer.to_str())["model"]
    return model


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model, trained on the spot by sentencepiece itself."""
    return _train_pieces(tmp_path_factory.mktemp("pieces") / "tokenizer.model")


def _train_pieces(path: Path, **more: Any) -> Path:
    out = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 310, "byte_fallback": True, **more}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=out, minloglevel=2, **options
    )
    path.write_bytes(out.getvalue())
    return path


def _folder(tmp_path: Path, model: Json, pre: Json | None = None, **more: Any) -> Path:
    files = {k: more.pop(k) for k in list(more) if k.endswith(("config", "map"))}
    more.setdefault("added_tokens", [added(0, "<s>"), added(300, "<|im_end|>")])
    pre = pre or byte_level(use_regex=True)
    return write_folder(tmp_path, tokenizer_json(model, pre, **more), **files)


def _pieces(merges: list[list[str]], **more: Any) -> Json:
    """A SentencePiece-like model: unknown token, bytes, letters, and what merges make."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), SPACE, *"abc"]
    texts += ["".join(merge) for merge in merges]
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return bpe(vocabulary, merges, unk_token="<unk>", byte_fallback=True, **more)


def _kinds(vocabulary: Vocabulary) -> dict[str, int]:
    return {token.text: token.kind for token in vocabulary.tokens}


class TestByteLevel:
    def test_tokens_keep_their_ids_and_get_types(self, tmp_path: Path, byte_model: Json) -> None:
        extra = [added(0, "<s>"), added(300, "<|im_end|>"), added(301, "<think>", special=False)]
        read = read_vocabulary(_folder(tmp_path, byte_model, added_tokens=extra), 304)
        expected = {i: text for text, i in byte_model["vocab"].items()}
        assert [t.text for t in read.tokens[:300]] == [expected[i] for i in range(300)]
        assert read.tokens[0].kind == read.tokens[300].kind == TokenType.CONTROL
        assert read.tokens[301].kind == TokenType.USER_DEFINED
        assert [t.text for t in read.tokens[302:]] == ["[PAD302]", "[PAD303]"]
        assert {t.kind for t in read.tokens[302:]} == {TokenType.UNUSED}
        assert {t.kind for t in read.tokens[1:300]} == {TokenType.NORMAL}
        assert (read.model, read.pre) == ("gpt2", "gpt-2")

    def test_both_ways_to_write_merges(self, tmp_path: Path, byte_model: Json) -> None:
        pairs = [m if isinstance(m, list) else m.split(" ") for m in byte_model["merges"]]
        joined = [" ".join(pair) for pair in pairs]
        as_pairs = read_vocabulary(_folder(tmp_path / "a", {**byte_model, "merges": pairs}), ROWS)
        as_texts = read_vocabulary(_folder(tmp_path / "b", {**byte_model, "merges": joined}), ROWS)
        assert as_pairs.merges == as_texts.merges == tuple(joined)

    @pytest.mark.parametrize("merge", [["t", "zzz"], "t h e", ["t"], 7, ["zz", "zz"]])
    def test_refuses_merges_of_unknown_tokens(
        self, tmp_path: Path, byte_model: Json, merge: Any
    ) -> None:
        merges = [*byte_model["merges"], merge]
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: merge .* does not join"):
            read_vocabulary(_folder(tmp_path, {**byte_model, "merges": merges}), ROWS)

    def test_padding_does_not_repeat_a_token(self, tmp_path: Path, byte_model: Json) -> None:
        extra = [added(0, "<s>"), added(300, "[PAD301]")]
        read = read_vocabulary(_folder(tmp_path, byte_model, added_tokens=extra), 302)
        assert read.tokens[301].text == "[[PAD301]]"

    def test_refuses_more_tokens_than_rows(self, tmp_path: Path, byte_model: Json) -> None:
        with pytest.raises(CheckpointError, match=r"id 280, but the embedding has 280 rows"):
            read_vocabulary(_folder(tmp_path, byte_model, added_tokens=[added(0, "<s>")]), 280)

    def test_added_token_beyond_the_embedding_is_refused_too(
        self, tmp_path: Path, byte_model: Json
    ) -> None:
        with pytest.raises(CheckpointError, match=r"'<\|im_end\|>' has id 300"):
            read_vocabulary(_folder(tmp_path, byte_model), 300)

    def test_image_token_of_a_multimodal_sibling_is_left_out(
        self, tmp_path: Path, byte_model: Json
    ) -> None:
        extra = [added(0, "<s>"), added(300, "<image_soft_token>")]
        read = read_vocabulary(_folder(tmp_path, byte_model, added_tokens=extra), 300)
        assert len(read.tokens) == 300

    def test_refuses_an_added_token_on_anothers_id(self, tmp_path: Path, byte_model: Json) -> None:
        with pytest.raises(CheckpointError, match=r"'<x>' has id 5, which is that of"):
            read_vocabulary(_folder(tmp_path, byte_model, added_tokens=[added(5, "<x>")]), ROWS)

    def test_the_first_id_of_an_added_text_counts(self, tmp_path: Path, byte_model: Json) -> None:
        extra = [added(300, "<x>"), added(301, "<x>")]
        read = read_vocabulary(_folder(tmp_path, byte_model, added_tokens=extra), 302)
        assert [t.text for t in read.tokens[300:]] == ["<x>", "[PAD301]"]

    def test_refuses_two_tokens_with_one_id(self, tmp_path: Path, byte_model: Json) -> None:
        vocabulary = {**byte_model["vocab"], "zzzz": 7}
        with pytest.raises(CheckpointError, match="'zzzz' the id 7, which is no free id"):
            read_vocabulary(_folder(tmp_path, {**byte_model, "vocab": vocabulary}), ROWS)

    @pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel", None])
    def test_refuses_other_models(self, tmp_path: Path, byte_model: Json, kind: str) -> None:
        with pytest.raises(CheckpointError, match=f"byte-level {kind} model"):
            read_vocabulary(_folder(tmp_path, {**byte_model, "type": kind}), ROWS)

    def test_says_where_characters_are_composed_first(
        self, tmp_path: Path, byte_model: Json
    ) -> None:
        folder = _folder(tmp_path, byte_model, normalizer={"type": "NFC"})
        assert any("NFC" in note for note in read_vocabulary(folder, ROWS).notes)

    def test_says_which_tokens_only_one_side_takes_whole(
        self, tmp_path: Path, byte_model: Json
    ) -> None:
        # A token that no merges make: whole only where merges are ignored for words.
        model = {**byte_model, "vocab": {**byte_model["vocab"], "qzqz": 300}}
        model["ignore_merges"] = True
        folder = _folder(tmp_path, model, _single(QWEN2), added_tokens=[added(0, "<s>")])
        (note,) = read_vocabulary(folder, ROWS).notes
        assert note.startswith("1 tokens, as 'qzqz', that Hugging Face takes whole")

    def test_says_where_added_tokens_take_spaces_along(
        self, tmp_path: Path, byte_model: Json
    ) -> None:
        folder = _folder(tmp_path, byte_model, added_tokens=[added(300, "<x>", rstrip=True)])
        assert "'<x>'" in read_vocabulary(folder, ROWS).notes[0]


def _single(regex: str) -> Json:
    return sequence(split(regex), byte_level())


class TestPreTokenizers:
    @pytest.mark.parametrize(
        ("name", "pre"), [*FAMILIES.items(), *SPELLINGS], ids=lambda v: v if v is str else None
    )
    def test_found_by_structure(
        self, tmp_path: Path, byte_model: Json, name: str, pre: Json
    ) -> None:
        settings = {"bos_token": "<s>"}
        folder = _folder(tmp_path, byte_model, pre, tokenizer_config=settings)
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
        self,
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
        folder = _folder(tmp_path, model, pre, tokenizer_config=settings)
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
        self, tmp_path: Path, byte_model: Json, pre: Json, named: str
    ) -> None:
        with pytest.raises(CheckpointError, match=r"llama\.cpp has no pre-tokenizer") as caught:
            read_vocabulary(_folder(tmp_path, byte_model, pre), ROWS)
        assert named in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["Lowercase", "StripAccents", "Prepend"])
    def test_refuses_normalizers(self, tmp_path: Path, byte_model: Json, kind: str) -> None:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": kind}]}
        with pytest.raises(CheckpointError, match=f"the normalizer {kind}"):
            read_vocabulary(_folder(tmp_path, byte_model, normalizer=normalizer), ROWS)


class TestSentencePiece:
    def test_model_file_is_read_as_sentencepiece_reads_it(self, piece_model: Path) -> None:
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

    def test_folder_with_the_model_file_only(self, tmp_path: Path, piece_model: Path) -> None:
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

    def test_options_of_the_model_file(self, tmp_path: Path) -> None:
        path = _train_pieces(
            tmp_path / "tokenizer.model",
            add_dummy_prefix=False,
            normalization_rule_name="nmt_nfkc",
            user_defined_symbols=["<a b>", "  "],
        )
        model = read_sentencepiece(path)
        assert not model.space_prefix
        assert model.normalizes
        read = read_vocabulary(write_folder(tmp_path), 310)
        assert _kinds(read)["<a b>"] == TokenType.USER_DEFINED
        assert read.notes == ("llama.cpp does not replace characters first",)

    def test_refuses_unigram(self, tmp_path: Path) -> None:
        _train_pieces(tmp_path / "tokenizer.model", model_type="unigram", vocab_size=286)
        with pytest.raises(CheckpointError, match="is a unigram model"):
            read_vocabulary(tmp_path, ROWS)

    @settings(max_examples=40, deadline=None)
    @given(cut=st.floats(0, 0.999), flip=st.integers(0, 255), place=st.floats(0, 0.999))
    def test_damaged_model_files_are_refused_or_read(
        self,
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

    def test_scores_are_ranks_of_the_first_merge(self, tmp_path: Path) -> None:
        merges = [["a", "b"], [SPACE, "a"], [SPACE + "a", "b"], [SPACE, "ab"], ["b", "c"]]
        read = read_vocabulary(_piece_folder(tmp_path, _pieces(merges)), 270)
        scores = {token.text: token.score for token in read.tokens}
        assert scores["ab"] == 0
        assert scores[SPACE + "a"] == -1
        assert scores[SPACE + "ab"] == -2
        assert scores["bc"] == -4
        assert scores["a"] == scores["<0x41>"] == -5
        kinds = _kinds(read)
        assert kinds["<unk>"] == TokenType.UNKNOWN
        assert kinds["<0x41>"] == TokenType.BYTE
        assert kinds["<s>"] == TokenType.CONTROL
        assert kinds["[PAD269]"] == TokenType.UNUSED
        assert read.notes == ()

    def test_says_which_merges_only_llama_cpp_does(self, tmp_path: Path) -> None:
        # "a"+"bc" also makes "abc", but tokenizer.json does not list it.
        merges = [["a", "b"], ["b", "c"], ["ab", "c"]]
        (note,) = read_vocabulary(_piece_folder(tmp_path, _pieces(merges)), 270).notes
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
    def test_space_prefix(self, tmp_path: Path, prefix: bool, more: Json) -> None:
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
        model = _pieces([["a", "b"]])
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
    def test_refuses_other_steps(self, tmp_path: Path, more: Json, named: str) -> None:
        content = tokenizer_json(_pieces([]), more.pop("pre", None), **more)
        with pytest.raises(CheckpointError, match=named):
            read_vocabulary(write_folder(tmp_path, content), 270)

    def test_refuses_a_vocabulary_without_bytes(self, tmp_path: Path) -> None:
        model = _pieces([])
        del model["vocab"]["<0xE2>"]
        with pytest.raises(CheckpointError, match="no token for the byte 0xE2"):
            read_vocabulary(_piece_folder(tmp_path, model), 270)

    def test_tab_may_stand_for_its_byte(self, tmp_path: Path) -> None:
        model = _pieces([])
        model["vocab"]["\t"] = model["vocab"].pop("<0x09>")
        assert "\t" in _kinds(read_vocabulary(_piece_folder(tmp_path, model), 270))

    def test_added_tokens_with_spaces(self, tmp_path: Path) -> None:
        # Found in raw text, a marked space never matches a space: it stays a piece. Found after
        # the normalizer, it does, and llama.cpp looks for the space itself.
        merges = [[SPACE, SPACE]]
        double = SPACE * 2
        raw = added(263, double, special=False)
        read = read_vocabulary(_piece_folder(tmp_path / "a", _pieces(merges), raw), 270)
        assert _kinds(read)[double] == TokenType.NORMAL
        marked = added(263, double, special=False, normalized=True)
        read = read_vocabulary(_piece_folder(tmp_path / "b", _pieces(merges), marked), 270)
        assert _kinds(read)["  "] == TokenType.USER_DEFINED

    def test_model_file_gives_the_scores_where_it_agrees(
        self, tmp_path: Path, piece_model: Path
    ) -> None:
        pieces = read_sentencepiece(piece_model).tokens
        vocabulary = {token.text: i for i, token in enumerate(pieces)}
        model = bpe(vocabulary, [], unk_token="<unk>", byte_fallback=True)
        folder = _piece_folder(tmp_path, model)
        (folder / "tokenizer.model").write_bytes(piece_model.read_bytes())
        read = read_vocabulary(folder, 310)
        assert [t.score for t in read.tokens[3:]] == [t.score for t in pieces[3:]]
        model["vocab"]["other"] = model["vocab"].pop(pieces[-1].text)
        _piece_folder(tmp_path, model)
        assert {t.score for t in read_vocabulary(folder, 310).tokens} == {0.0}

    @pytest.mark.parametrize("text", ["ab\0c", "[EMPTY_264]"])
    def test_refuses_two_tokens_that_read_alike(self, tmp_path: Path, text: str) -> None:
        # llama.cpp would stop the program: it reads up to a NUL, and names empty tokens.
        model = _pieces([["a", "b"]])
        model["vocab"] |= {text: 265, "\0": 264}
        with pytest.raises(CheckpointError, match="are both"):
            read_vocabulary(_piece_folder(tmp_path, model), 270)

    def test_tokenizer_json_that_is_neither_kind(self, tmp_path: Path) -> None:
        model = {"type": "WordPiece", "vocab": {"a": 0}}
        with pytest.raises(CheckpointError, match="is a WordPiece model"):
            read_vocabulary(write_folder(tmp_path, tokenizer_json(model, None)), 10)


def _piece_folder(folder: Path, model: Json, *more: Json) -> Path:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    extra = [added(1, "<s>"), added(2, "</s>"), *more]
    return write_folder(folder, tokenizer_json(model, None, normalizer=replace, added_tokens=extra))


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
        return read_vocabulary(_folder(tmp_path, model, added_tokens=tokens, **files), ROWS)

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


class TestChatTemplates:
    def _read(self, tmp_path: Path, byte_model: Json, settings: Json) -> Vocabulary:
        folder = _folder(tmp_path, byte_model, tokenizer_config=settings)
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
        folder = _folder(tmp_path / "model", byte_model)
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


def _keys(path: Path) -> Json:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


class TestKeys:
    def test_byte_level(self, tmp_path: Path, byte_model: Json) -> None:
        folder = _folder(
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
        read = read_vocabulary(_piece_folder(tmp_path, _pieces([["a", "b"]])), 270)
        keys = _keys(write_gguf(read, tmp_path / "v.gguf"))
        assert keys["tokenizer.ggml.model"] == "llama"
        assert "tokenizer.ggml.pre" not in keys
        assert "tokenizer.ggml.merges" not in keys
        assert keys["tokenizer.ggml.scores"] == [t.score for t in read.tokens]
        assert keys["tokenizer.ggml.unknown_token_id"] == 0
        assert keys["tokenizer.ggml.add_space_prefix"] is False
