"""llama.cpp tokenizes what we export as Hugging Face's tokenizers do."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from gguf import TokenType
from support.pretokenizer_families import FAMILIES, QWEN35
from support.tokenizer_folders import (
    LLAMA3,
    QWEN2,
    SPACE,
    Json,
    added,
    bpe,
    byte_level,
    byte_level_folder,
    digits,
    load,
    read_keys,
    sentencepiece_folder,
    sequence,
    split,
    tokenizer_json,
    write_folder,
    write_gguf,
)
from support.tokenizer_strings import all_strings, is_composed
from tokenizers import pre_tokenizers, trainers

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.model_facts import loadable_name
from mlx_fusekit.gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary
from mlx_fusekit.running.llamacpp import LlamaCpp
from mlx_fusekit.samples import model_path

if TYPE_CHECKING:
    from fetch_smollm2 import ModelFolders

pytest.importorskip("llama_cpp")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROWS = 2_500


@pytest.fixture(scope="module")
def vocabularies() -> Path:
    """The folder of llama.cpp's own vocabulary files."""
    from fetch_gguf_fixtures import fetch_vocabularies

    return fetch_vocabularies()


@pytest.fixture(scope="module")
def gemma3() -> Path:
    """Gemma 3 270M as a GGUF file."""
    from fetch_gguf_fixtures import fetch_gemma3

    return fetch_gemma3()


def _compare(
    folder: Path, rows: int, strings: Sequence[str], *, composed: bool = False
) -> tuple[Vocabulary, Path]:
    """Export a folder's tokenizer; llama.cpp and Hugging Face must cut all strings alike.

    Args:
        composed: whether Hugging Face composes characters (NFC) first, which llama.cpp does not.
    """
    assert len(set(strings)) >= 300
    vocabulary = read_vocabulary(folder, rows)
    path = write_gguf(vocabulary, folder / "vocabulary.gguf")
    theirs = load(folder)
    with LlamaCpp(path, vocabulary_only=True) as llama:
        assert llama.vocabulary_size == rows
        for string in strings:
            text = unicodedata.normalize("NFC", string) if composed else string
            for special in (False, True):
                expected = theirs.encode(text, add_special_tokens=special).ids
                assert llama.tokenize(text, add_special=special) == expected, repr(string)
    return vocabulary, path


def _assert_like_original(original: Path, ours: Path, strings: Sequence[str]) -> None:
    with (
        LlamaCpp(original, vocabulary_only=True) as first,
        LlamaCpp(ours, vocabulary_only=True) as second,
    ):
        for string in strings:
            assert second.tokenize(string) == first.tokenize(string), repr(string)


def _control_tokens(keys: Json, count: int = 10) -> list[str]:
    kinds = keys["tokenizer.ggml.token_type"]
    control = [t for t, k in zip(keys["tokenizer.ggml.tokens"], kinds, strict=True) if k == 3]
    return control[:count]


def test_smollm2(smollm2: ModelFolders, tmp_path: Path) -> None:
    folder = _copy(smollm2.four_bit, tmp_path)
    vocabulary, _ = _compare(folder, 49152, all_strings(SPECIAL))
    assert vocabulary.pre == "smollm"
    assert vocabulary.notes == ()
    assert (vocabulary.special.bos, vocabulary.special.eos, vocabulary.special.eot) == (1, 2, 2)
    assert "default" in vocabulary.chat_templates


def test_sample(tmp_path: Path) -> None:
    vocabulary, _ = _compare(_copy(model_path(), tmp_path), 1024, all_strings(SPECIAL))
    assert vocabulary.pre == "smollm"
    assert vocabulary.special.stops == (2, 0)


def _copy(source: Path, folder: Path) -> Path:
    """The files of a model folder but its weights."""
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_gemma3(gemma3: Path, tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, gemma3, prepend=False, by_id=True)
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<unused7>"]
    strings = all_strings(special)
    vocabulary, ours = _compare(folder, 262_144, strings)
    assert vocabulary.model == "llama"
    assert not vocabulary.space_prefix
    assert vocabulary.special.add_bos
    assert vocabulary.notes == ()
    # llama.cpp's converter takes runs of spaces greedily, Hugging Face merges them.
    short = [s for s in strings if " " * 32 not in s]
    _assert_like_original(gemma3, ours, short)


#: llama.cpp's vocabulary files, the pre-tokenizer that the family's tokenizer.json has, and more.
BYTE_LEVEL: dict[str, tuple[str, Json, Json]] = {
    "gpt-2": ("gpt-2", byte_level(use_regex=True), {}),
    "mpt": ("gpt-2", byte_level(use_regex=True), {}),
    "gpt-neox": ("gpt-2", byte_level(use_regex=True), {}),
    "aquila": ("gpt-2", byte_level(use_regex=True), {}),
    "starcoder": ("smollm", sequence(digits(), byte_level(use_regex=True)), {}),
    "refact": ("smollm", sequence(digits(), byte_level(use_regex=True)), {}),
    "command-r": (
        "smollm",
        sequence(digits(), byte_level(use_regex=True)),
        {"normalizer": {"type": "NFC"}},
    ),
    "llama-bpe": (
        "llama-bpe",
        sequence(split(LLAMA3), byte_level()),
        {"model": {"ignore_merges": True}},
    ),
    "qwen2": (
        "qwen2",
        sequence(split(QWEN2), byte_level()),
        {"normalizer": {"type": "NFC"}},
    ),
    "qwen35": (
        "qwen35",
        sequence(split(QWEN35), byte_level()),
        {"normalizer": {"type": "NFC"}},
    ),
    "falcon": ("falcon", FAMILIES["falcon"], {}),
    "deepseek-llm": ("deepseek-llm", FAMILIES["deepseek-llm"], {}),
    "deepseek-coder": ("deepseek-coder", FAMILIES["deepseek-coder"], {}),
}
#: Files that were written before pre-tokenizers had names, so llama.cpp cuts them wrongly.
_WITHOUT_PRE = ("gpt-neox", "aquila")


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_families(vocabularies: Path, tmp_path: Path, name: str) -> None:
    original = vocabularies / f"ggml-vocab-{name}.gguf"
    pre, pre_tokenizer, more = BYTE_LEVEL[name]
    keys = read_keys(original)
    folder = byte_level_folder(tmp_path, original, pre_tokenizer, **more)
    strings = all_strings(_control_tokens(keys))
    rows = len(keys["tokenizer.ggml.tokens"])
    vocabulary, ours = _compare(folder, rows, strings, composed="normalizer" in more)
    assert vocabulary.pre == pre
    assert [t.text for t in vocabulary.tokens] == keys["tokenizer.ggml.tokens"]
    if name not in _WITHOUT_PRE:
        _assert_like_original(original, ours, strings)


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "baichuan"])
def test_sentencepiece_families(vocabularies: Path, tmp_path: Path, name: str) -> None:
    original = vocabularies / f"ggml-vocab-{name}.gguf"
    keys = read_keys(original)
    folder = sentencepiece_folder(tmp_path, original, prepend=True)
    # Phi-3's special tokens take the white space after them along, but only in models so named.
    strings = all_strings([] if name == "phi-3" else _control_tokens(keys))
    rows = len(keys["tokenizer.ggml.tokens"])
    vocabulary, ours = _compare(folder, rows, strings)
    assert [t.text for t in vocabulary.tokens] == keys["tokenizer.ggml.tokens"]
    _assert_like_original(original, ours, strings)


def test_gemma4_is_sentencepiece_too(vocabularies: Path, tmp_path: Path) -> None:
    original = vocabularies / "ggml-vocab-gemma-4.gguf"
    keys = read_keys(original)
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    merges = [_cut(merge) for merge in keys["tokenizer.ggml.merges"]]
    model = bpe(
        {text: i for i, text in enumerate(tokens)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    extra = [
        added(i, text, special=kinds[i] == TokenType.CONTROL)
        for i, text in enumerate(tokens)
        if kinds[i] in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    content = tokenizer_json(model, None, normalizer=replace, added_tokens=extra)
    _, ours = _compare(write_folder(tmp_path, content), len(tokens), all_strings())
    _assert_like_original(original, ours, all_strings())


def _cut(merge: str) -> list[str]:
    """The two parts of a merge; the first may begin with a space."""
    cut = merge.index(" ", 1)
    return [merge[:cut], merge[cut + 1 :]]


#: What llama.cpp is known to cut otherwise (each such entry says so in its notes).
_LIMITS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(
        ("tekken", "gpt-4o", "kimi-k2"),
        lambda s: any(unicodedata.category(c).startswith("M") for c in s),
    ),
    "tiny_aya": lambda s: re.search(r"\s\s\d", s) is not None,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_pre_tokenizers(tmp_path: Path, name: str) -> None:
    """A model trained with the pre-tokenizer of each family is cut alike in llama.cpp."""
    pre_tokenizer = FAMILIES[name]
    model = _trained(tmp_path, pre_tokenizer)
    extra = [added(len(model["vocab"]), "<s>")]
    content = tokenizer_json(model, pre_tokenizer, added_tokens=extra)
    folder = write_folder(tmp_path, content, tokenizer_config={"bos_token": "<s>"})
    limit = _LIMITS.get(name, lambda _: False)
    strings = [s for s in all_strings(["<s>"]) if not limit(s)]
    vocabulary, _ = _compare(folder, ROWS, strings)
    assert vocabulary.pre == name
    assert bool(vocabulary.notes) == (name in _LIMITS)


@pytest.mark.parametrize("name", _LIMITS)
def test_limits_of_llama_cpp_are_still_there(tmp_path: Path, name: str) -> None:
    """Once this fails, llama.cpp has got better, and the note in the table can go."""
    model = _trained(tmp_path, FAMILIES[name])
    folder = write_folder(tmp_path, tokenizer_json(model, FAMILIES[name]))
    with pytest.raises(AssertionError):
        _compare(folder, ROWS, all_strings())


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_words_that_merges_do_not_make(tmp_path: Path, ignore_merges: bool) -> None:
    model = _trained(tmp_path, sequence(split(LLAMA3), byte_level()))
    model["ignore_merges"] = ignore_merges
    for word in ("hello", "\u0120don", "SELECT"):
        model["vocab"].setdefault(word, len(model["vocab"]))
    content = tokenizer_json(model, sequence(split(LLAMA3), byte_level()))
    folder = write_folder(tmp_path, content, tokenizer_config={"bos_token": "!"})
    vocabulary, _ = _compare(folder, ROWS, [*all_strings(), "hello don SELECT", " don"])
    assert vocabulary.pre == ("llama-bpe" if ignore_merges else "smaug-bpe")


def _trained(folder: Path, pre_tokenizer: Json) -> Json:
    empty = write_folder(folder / "empty", tokenizer_json(bpe({}, []), pre_tokenizer))
    tokenizer = load(empty)
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 10,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_strings() * 2, trainer)
    model: Json = json.loads(tokenizer.to_str())["model"]
    return model


def test_text_that_hugging_face_composes(vocabularies: Path, tmp_path: Path) -> None:
    """What the note on NFC says: only text that is not composed differs."""
    original = vocabularies / "ggml-vocab-qwen2.gguf"
    _, pre_tokenizer, more = BYTE_LEVEL["qwen2"]
    folder = byte_level_folder(tmp_path, original, pre_tokenizer, **more)
    rows = len(read_keys(original)["tokenizer.ggml.tokens"])
    _compare(folder, rows, [s for s in all_strings() if is_composed(s)])
    with pytest.raises(AssertionError):
        _compare(folder, rows, all_strings())


def test_names_that_llama_cpp_stumbles_over(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(model_path(), 1024)
    name = "a Phi-3 tune"
    with pytest.raises(CheckpointError):
        LlamaCpp(write_gguf(vocabulary, tmp_path / "a.gguf", name), vocabulary_only=True)
    safe = loadable_name(name, [token.text for token in vocabulary.tokens])
    LlamaCpp(write_gguf(vocabulary, tmp_path / "b.gguf", safe), vocabulary_only=True).close()
