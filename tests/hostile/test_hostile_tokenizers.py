"""Tokenizers of strangers: each is refused in one line, or works, in little time and memory."""

import base64
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.limits import in_little
from support.sweep_values import SENSELESS, places, replaced

from mlx_fusekit import samples
from mlx_fusekit.adapters.fitting import token_names
from mlx_fusekit.bench.workload import text_prompt
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running.loading import run_model
from mlx_fusekit.running.tokenizers import tokenizer_of
from mlx_fusekit.texts.data import read_sequences
from mlx_fusekit.texts.generate import generate_sequences
from mlx_fusekit.texts.tokens import token_rows

SAMPLE = samples.model_path()
ROWS = 1024
#: Makes something else of the folder of a good tokenizer.
Change = Callable[[Path], Any]
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
DIGITS = "9" * 5000
LAST = {
    "id": ROWS,
    "content": "<last>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


def raw(content: bytes | str, name: str = TOKENIZER) -> Change:
    content = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(content)


def changed(name: str = TOKENIZER, **changes: Any) -> Change:
    """Other values of a JSON object, its others as they are."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))

    return change


def of_model(**changes: Any) -> Change:
    """The same of the tokenizer's model."""

    def change(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        content["model"] |= changes
        (folder / TOKENIZER).write_text(json.dumps(content))

    return change


def of_vocabulary(**ids: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        content["model"]["vocab"] |= ids
        (folder / TOKENIZER).write_text(json.dumps(content))

    return change


def added(*tokens: Any) -> Change:
    """More added tokens."""

    def change(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        content["added_tokens"] += tokens
        (folder / TOKENIZER).write_text(json.dumps(content))

    return change


def many_added(count: int) -> Change:
    return added(*({**LAST, "id": ROWS + n, "content": f"<{n}>"} for n in range(count)))


def moved(by: int) -> Change:
    """All tokens but the added ones have other ids."""

    def change(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {
            token: number + (by if number > 2 else 0) for token, number in vocabulary.items()
        }
        (folder / TOKENIZER).write_text(json.dumps(content))

    return change


def split_by(regex: str) -> Change:
    return changed(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }
    )


def template(token: Any, number: Any) -> Change:
    """One that puts a token before each text."""
    parts = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<x>": {"id": "<x>", "ids": [number], "tokens": ["<x>"]}}
    return changed(
        post_processor={
            "type": "TemplateProcessing",
            "single": parts,
            "pair": [*parts, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": special,
        }
    )


def in_place(name: str, make: Callable[[Path], Any]) -> Change:
    """Something else than a file under its name."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def slow(*changes: Change) -> Change:
    """As before ``tokenizer.json``."""
    return both(changed(SETTINGS, tokenizer_class="GPT2Tokenizer"), without(TOKENIZER), *changes)


def model(kind: str, **parts: Any) -> Change:
    return changed(model={"type": kind, **parts}, pre_tokenizer=None, decoder=None)


CHARSMAP = base64.b64encode(b"\xff\xff\xff\x7f" + bytes(9)).decode()

#: By name: what makes it of a good one, and a word of why it is refused.
HOSTILE: dict[str, tuple[Change, str]] = {
    # tokenizer.json as a whole
    "none": (without(TOKENIZER, SETTINGS), "there is none"),
    "nothing": (raw(b""), "tokenizer.json"),
    "a list": (raw("[]"), "JSON object"),
    "null": (raw("null"), "JSON object"),
    "an empty object": (raw("{}"), "cannot be loaded"),
    "cut off": (raw(SAMPLE.joinpath(TOKENIZER).read_bytes()[:9999]), "not valid JSON"),
    "random bytes": (raw(bytes(range(256)) * 9), "not valid JSON"),
    "UTF-16": (raw("{}".encode("utf-16")), "byte order mark"),
    "100,000 brackets": (raw("[" * 100_000), "nested too deeply"),
    "an id of 5,000 digits": (raw(f'{{"model": {{"vocab": {{"a": {DIGITS}}}}}}}'), "digits"),
    "half of a pair": (raw('{"model": "\\ud800"}'), "surrogate"),
    "a million values": (raw('{"a": [' + "1," * 10_000_001 + "1]}"), "values"),
    "a folder": (in_place(TOKENIZER, Path.mkdir), "folder|directory"),
    # Its model
    "no model": (changed(model=None), "cannot be loaded"),
    "a model that is a list": (changed(model=[]), "cannot be loaded"),
    "an unknown model": (of_model(type="Nope"), "cannot be loaded"),
    "no tokens": (of_model(vocab={}, merges=[]), "cannot be loaded|no tokens"),
    "tokens in a list": (of_model(vocab=["a", "b"]), "cannot be loaded"),
    "an id in quotes": (of_vocabulary(a="7"), "cannot be loaded"),
    "an id of 4.5": (of_vocabulary(a=4.5), "cannot be loaded"),
    "a negative id": (of_vocabulary(a=-1), "cannot be loaded"),
    "an id of 4,000,000,000": (of_vocabulary(zzz=4_000_000_000), "far more"),
    "an id of 2**40": (of_vocabulary(zzz=2**40), "far more"),
    "an id of 10**400": (of_vocabulary(zzz=10**400), "far more"),
    "merges of what is no token": (of_model(merges=[["q", "nope"]]), "cannot be loaded"),
    "merges of three": (of_model(merges=["a b c"]), "cannot be loaded"),
    "merges of numbers": (of_model(merges=[[1, 2]]), "cannot be loaded"),
    "merges that are an object": (of_model(merges={"a": "b"}), "cannot be loaded"),
    "no unknown token": (model("WordLevel", vocab={"a": 5}, unk_token="?"), "Missing .UNK."),
    "words of pieces": (
        model(
            "WordPiece",
            vocab={"a": 5},
            unk_token="?",
            continuing_subword_prefix="##",
            max_input_chars_per_word=9,
        ),
        "Missing .UNK.",
    ),
    "scores in quotes": (model("Unigram", vocab=[["a", "1"]], unk_id=0), "cannot be loaded"),
    "an unknown piece that is not there": (
        model("Unigram", vocab=[["a", 1.0]], unk_id=9),
        "cannot be loaded",
    ),
    "no pieces": (model("Unigram", vocab=[], unk_id=None), "unk_id"),
    "no piece for a letter": (
        model("Unigram", vocab=[["zzz", 1.0]], unk_id=None),
        "unk_id",
    ),
    # Its steps
    "an unknown step": (changed(pre_tokenizer={"type": "Nope"}), "cannot be loaded"),
    "a step that is a number": (changed(normalizer=5), "cannot be loaded"),
    "half an expression": (split_by("("), "cannot be loaded"),
    "an expression without end": (split_by(r"(a+)+$"), "does not work"),
    "words without end": (split_by(r"(\w+\s*)+$"), "does not work"),
    "an expression of a million brackets": (split_by("(" * 9999 + ")" * 9999), "cannot be"),
    "a map of characters that is none": (
        changed(normalizer={"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
        "cannot be loaded|does not work",
    ),
    "a map of no characters": (
        changed(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
        "cannot be loaded|does not work",
    ),
    "steps that make much of little": (
        changed(
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "x"},
                    *[{"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 99}] * 8,
                ],
            }
        ),
        "normalizer makes a text more than 1000 times",
    ),
    "a step that makes much of nothing": (
        changed(
            normalizer={"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 1_000_000}
        ),
        "normalizer makes a text more than 1000 times",
    ),
    "replacing nothing": (
        changed(normalizer={"type": "Replace", "pattern": {"Regex": ""}, "content": "xx"}),
        "does not work",
    ),
    "a decoder that makes much of little": (
        changed(
            decoder={
                "type": "Sequence",
                "decoders": [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 99}]
                * 8,
            }
        ),
        "decoder makes a text more than 1000 times",
    ),
    "steps in steps": (
        raw('{"normalizer":' + '{"type":"Sequence","normalizers":[' * 400 + "]}" * 400 + "}"),
        "cannot be loaded|nested",
    ),
    "an unknown decoder": (changed(decoder={"type": "Nope"}), "cannot be loaded"),
    "a template of no token": (template("<y>", 3), "does not work"),
    "a template of a negative token": (template("<x>", -3), "cannot be loaded"),
    # Added tokens
    "an added token without text": (added({"id": 7}), "cannot be loaded"),
    "an added token that is text": (added("<x>"), "cannot be loaded"),
    "an added id in quotes": (added({**LAST, "id": "7"}), "cannot be loaded"),
    "an added id of 4,000,000,000": (added({**LAST, "id": 4_000_000_000}), "far more"),
    "added tokens in an object": (changed(added_tokens={"<x>": 3}), "cannot be loaded"),
    "100,000 added tokens": (many_added(100_000), "100003 added tokens"),
    "a token of a megabyte": (added({**LAST, "content": "a" * 1_000_000}), "1000000 characters"),
    # Tokens without a row
    "text of tokens without a row": (moved(ROWS), "for a text, and .* 1024 rows"),
    "a template of a token without a row": (template("<x>", ROWS), "token 1024 for a text"),
    "an end without a row": (
        both(added(LAST), changed(SETTINGS, eos_token="<last>")),
        "token 1024 as eos_token",
    ),
    "a beginning without a row": (
        both(added(LAST), changed(SETTINGS, bos_token="<last>")),
        "token 1024 as bos_token",
    ),
    # tokenizer_config.json
    "settings that are a list": (raw("[]", SETTINGS), "tokenizer_config.json: must hold"),
    "settings that are cut off": (raw("{", SETTINGS), "tokenizer_config.json: not valid"),
    "settings in a folder": (in_place(SETTINGS, Path.mkdir), "tokenizer_config.json"),
    "a class that is none": (
        both(changed(SETTINGS, tokenizer_class="NopeTokenizer"), without(TOKENIZER)),
        "cannot be loaded|there is none",
    ),
    "a class that is a list": (changed(SETTINGS, tokenizer_class=["x"]), "cannot be loaded"),
    "a class in code": (
        changed(SETTINGS, auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own"),
        "trust-remote-code|cannot be loaded",
    ),
    "an end that is a number": (changed(SETTINGS, eos_token=5), "cannot be loaded"),
    "an end that is a list": (changed(SETTINGS, eos_token=["a"]), "cannot be loaded"),
    "decoded tokens that are a list": (
        changed(SETTINGS, added_tokens_decoder=["a"]),
        "cannot be loaded",
    ),
    "a decoded token of 10**18": (
        changed(SETTINGS, added_tokens_decoder={"1" + "0" * 18: {"content": "a"}}),
        "far more",
    ),
    "a length that is text": (changed(SETTINGS, model_max_length="x"), "does not work"),
    "padding that is up": (changed(SETTINGS, padding_side="up"), "cannot be loaded"),
    "more tokens that are numbers": (
        changed(SETTINGS, extra_special_tokens=[5]),
        "cannot be loaded",
    ),
    "a template of an unknown type": (
        changed(SETTINGS, chat_template_type="../nope"),
        "cannot be loaded",
    ),
    "a parser of an unknown type": (changed(SETTINGS, tool_parser_type="os.path"), "cannot be"),
    # The other files
    "special tokens in a list": (raw("[1]", "special_tokens_map.json"), "special_tokens_map"),
    "added tokens in a list": (raw("[1]", "added_tokens.json"), "added_tokens.json"),
    "added tokens of 10**12": (raw('{"a": 1000000000000}', "added_tokens.json"), "far more"),
    "a list of words": (slow(raw("[]", "vocab.json"), raw("", "merges.txt")), "vocab.json"),
    "words of 10**12": (
        slow(raw('{"a": 1000000000000}', "vocab.json"), raw("", "merges.txt")),
        "far more",
    ),
    "words without merges": (slow(raw('{"a": 0}', "vocab.json")), "cannot be loaded|not work"),
    "merges that are no text": (
        slow(raw('{"a": 0}', "vocab.json"), raw(b"\xff\xfe\xfd", "merges.txt")),
        "cannot be loaded|not work",
    ),
    "a SentencePiece model of random bytes": (
        both(
            changed(SETTINGS, tokenizer_class="LlamaTokenizer"),
            without(TOKENIZER),
            raw(bytes(range(256)) * 9, "tokenizer.model"),
        ),
        "cannot be loaded|not work",
    ),
    "a chat template that is no text": (raw(b"\xff\xfe\xfd", "chat_template.jinja"), "cannot be"),
}
#: What works, as it does in mlx-lm.
READ: dict[str, Change] = {
    "as it is": lambda _: None,
    "a token without a row that no text has": added(LAST),
    "9,000 added tokens": many_added(9000),
    "a hole before the last id": of_vocabulary(zzz=99_999),
    "padding to a billion": changed(
        padding={
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        }
    ),
    # An id of its own: of two tokens with one id, some versions of tokenizers keep either.
    "control characters": of_vocabulary(**{"\x1b[2J\n": 99_998}),
    "an empty token": added({**LAST, "content": ""}),
    "two ids of a token": added({**LAST, "id": 5}, {**LAST, "id": 6}),
    "older files beside it": both(
        raw('{"eos_token": "<|im_end|>"}', "special_tokens_map.json"),
        raw('{"<|im_end|>": 2}', "added_tokens.json"),
        raw("[]", "vocab.json"),
        raw(b"\xff", "merges.txt"),
        raw("{", "generation_config.json"),
    ),
    "no settings": without(SETTINGS),
    "a chat template that is a number": both(
        changed(SETTINGS, chat_template=5), without("chat_template.jinja")
    ),
    "a chat template in a folder": in_place("chat_template.jinja", Path.mkdir),
    "a FIFO for a chat template": in_place("chat_template.jinja", os.mkfifo),
}
#: The token ids that end a text, as ``config.json`` has them.
ENDS = {
    "text": "2",
    "true": True,
    "an object": {"a": 1},
    "a list of text": ["<|im_end|>"],
    "a list of lists": [[2]],
    "4.5": 4.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
}


#: Settings that transformers and what it calls take for the path of a file to read, be it a pipe, a
#: device without end or a file of the user's; and what of them it does not take for one.
PATHS: dict[str, Any] = {
    "vocab": "/dev/zero",
    "merges": "../merges.txt",
    "init_inputs": [1, "/dev/zero"],
    "sp_model_kwargs": {"model_file": "/dev/zero"},
    "fast_tokenizer_files": ["tokenizer.json", "../tokenizer.1.0.json"],
}
NO_PATHS: dict[str, Any] = {
    "vocab": None,
    "merges": None,
    "init_inputs": [],
    "sp_model_kwargs": {"enable_sampling": True, "alpha": 0.1},
    "fast_tokenizer_files": ["tokenizer.json"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (TOKENIZER, SETTINGS, "chat_template.jinja"):
        shutil.copy(SAMPLE / name, tmp_path / name)
    return tmp_path


def load(folder: Path, config: dict[str, Any] | None = None) -> Any:
    return tokenizer_of(LocalFolder(folder, "model"), config or {}, ROWS)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What is imported for the first tokenizer takes time that is not a stranger's."""
    tokenizer_of(LocalFolder(SAMPLE, "model"), {}, ROWS).encode("a")


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_a_line(name: str, folder: Path) -> None:
    change, word = HOSTILE[name]
    change(folder)
    with in_little(), pytest.raises(CheckpointError, match=word) as refused:
        load(folder)
    told = str(refused.value)
    assert told.startswith(str(folder))
    assert len(told.splitlines()) == 1
    assert len(told) < 1000


@pytest.mark.parametrize("name", READ)
def test_it_works(name: str, folder: Path) -> None:
    READ[name](folder)
    with in_little():
        tokenizer = load(folder)
    assert tokenizer.decode(tokenizer.encode("SELECT 42")).strip() == "SELECT 42"


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("key", PATHS)
def test_settings_lead_to_no_other_file(key: str, folder: Path) -> None:
    changed(SETTINGS, **{key: PATHS[key]})(folder)
    named = f"{SETTINGS}: {key} names the file '"
    with in_little(), pytest.raises(CheckpointError, match=re.escape(named)):
        load(folder)


def test_settings_that_are_no_paths_are_read(folder: Path) -> None:
    changed(SETTINGS, **NO_PATHS)(folder)
    assert load(folder).encode("SELECT")


@pytest.mark.parametrize("name", ENDS)
def test_ends_that_are_no_ids_are_refused(name: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id is"):
        load(folder, {"eos_token_id": ENDS[name]})


@pytest.mark.parametrize("ends", [2, [2, 0], 2.0, None, [], -1, 10**9])
def test_ends_that_are_ids_are_read(ends: Any, folder: Path) -> None:
    """No text gets them, so that they need no row."""
    assert load(folder, {"eos_token_id": ends}).eos_token_id == 2


@pytest.mark.parametrize("name", [SETTINGS, TOKENIZER])
def test_a_value_of_any_kind_at_any_key_works_or_is_refused(name: str, folder: Path) -> None:
    good = json.loads((SAMPLE / name).read_text())
    if name == TOKENIZER:  # all but the many tokens, which are of one kind
        good["model"] |= {"vocab": {"<|endoftext|>": 0, "a": 3, "b": 4}, "merges": []}
    works = refused = 0
    for changed in replaced(good, SENSELESS[::3]):
        (folder / name).write_text(json.dumps(changed))
        try:
            load(folder)
            works += 1
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1
            assert len(str(error)) < 1000
            refused += 1
    assert works > len(list(places(good))) / 2
    assert refused > len(list(places(good)))


@pytest.fixture
def speaking(folder: Path) -> Path:
    """A model whose chat template writes a token that it has no row for."""
    shutil.copytree(SAMPLE, folder, dirs_exist_ok=True)
    added(LAST)(folder)
    turns = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(turns + "<last>")
    return folder


def test_no_token_without_a_row_comes_of_text(speaking: Path, tmp_path: Path) -> None:
    running = run_model(LocalFolder(speaking, "model"))
    tokenizer = running.tokenizer
    assert tokenizer.encode("SELECT")
    with pytest.raises(CheckpointError, match=r"token 1024 for a text, .* 1024 rows"):
        tokenizer.encode("SELECT <last>")
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for item in ({"messages": turns}, {"prompt": "a", "completion": "b"}, {"text": "<last>"}):
        chats.write_text(json.dumps(item) + "\n")
        with pytest.raises(CheckpointError, match="token 1024"):
            read_sequences(chats, tokenizer)
    with pytest.raises(CheckpointError, match="token 1024"):
        text_prompt("a", tokenizer)
    with pytest.raises(CheckpointError, match="token 1024"):
        generate_sequences(running.model, tokenizer, tokens=64, seed=0)


def test_a_model_writes_no_token_without_a_row(folder: Path) -> None:
    """Plain text begins with any of the tokenizer's tokens, of those that have a row."""
    shutil.copytree(SAMPLE, folder, dirs_exist_ok=True)
    more = {**LAST, "special": False}
    added(*({**more, "id": ROWS + n, "content": f"word{n}"} for n in range(9000)))(folder)
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**settings, "bos_token": None}))
    running = run_model(LocalFolder(folder, "model"))
    texts = generate_sequences(running.model, running.tokenizer, tokens=400, seed=0, chat_share=0.0)
    assert texts
    assert max(token for text in texts for token in text.tokens) < ROWS


def test_rows_are_those_of_the_embedding() -> None:
    running = run_model(LocalFolder(SAMPLE, "model"))
    assert token_rows(running.model, running.config) == ROWS
    assert token_rows(running.model, {"vocab_size": 7}) == ROWS
    assert token_rows(lambda tokens: tokens, {"vocab_size": 7}) is None


@pytest.mark.parametrize("content", ["[" * 100_000, '{"added_tokens": [5]}', "[]", f"[{DIGITS}]"])
def test_names_of_tokens_are_told_where_the_tokenizer_is_read(content: str, folder: Path) -> None:
    (folder / TOKENIZER).write_text(content)
    with in_little():
        assert token_names(range(3, 5), folder) == "3 to 4"
