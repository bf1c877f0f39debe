"""Files of text to calibrate and to measure on, and what an adapter was trained on."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.tuner.datasets import load_local_dataset
from mlx_lm.utils import load_tokenizer
from support.command import exit_code

from mlx_fusekit import fuse, samples, verify
from mlx_fusekit.bench.workload import text_prompt
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.texts.data import read_sequences, training_data
from mlx_fusekit.texts.items import Features

Item = dict[str, Any]
BASE, ADAPTER = samples.model_path(), samples.adapter_path()
COMPLETIONS: list[Item] = [
    {"prompt": f"How many {thing}s are there?", "completion": f"SELECT COUNT(*) FROM {thing};"}
    for thing in ("car", "book", "café", "house")
]
CHATS: list[Item] = [
    {
        "messages": [
            {"role": "user", "content": item["prompt"]},
            {"role": "assistant", "content": item["completion"]},
        ]
    }
    for item in COMPLETIONS
]
PROSE = "[1] says that {this} is so, in 3 volumes.\n\n[2] does not.\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BASE)


def lines(items: list[Item]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def trained_on(items: list[Item], folder: Path, tokenizer: Any, **features: Any) -> list[Any]:
    """Token ids and the answer's start, of each item as mlx-lm trains on it."""
    (folder / "as_mlx_lm_has_it").mkdir()
    (folder / "as_mlx_lm_has_it" / "train.jsonl").write_text(lines(items), "utf-8")
    config = SimpleNamespace(mask_prompt=True, **features)
    data = load_local_dataset(folder / "as_mlx_lm_has_it", tokenizer, config)[0]
    return [data.process(data[at]) for at in range(len(data))]


def same(sequences: list[Any], trained: list[Any]) -> bool:
    """Whether sequences are what mlx-lm trains on, but for what follows the end-of-turn token."""
    assert len(sequences) == len(trained)
    return all(
        sequence.scored == start and list(sequence.tokens) == tokens[: len(sequence.tokens)]
        for sequence, (tokens, start) in zip(sequences, trained, strict=True)
    ) and all(sequence.is_answer for sequence in sequences)


# --- items, as they lie on disk ---------------------------------------------------------------


def lines_named_ndjson(folder: Path, items: list[Item]) -> Path:
    return written(folder / "data.ndjson", lines(items))


def lines_named_in_capitals(folder: Path, items: list[Item]) -> Path:
    return written(folder / "DATA.JSONL", lines(items))


def lines_named_json(folder: Path, items: list[Item]) -> Path:
    return written(folder / "data.json", lines(items))


def lines_named_txt(folder: Path, items: list[Item]) -> Path:
    return written(folder / "data.txt", lines(items))


def lines_without_a_suffix(folder: Path, items: list[Item]) -> Path:
    return written(folder / "data", lines(items))


def lines_of_windows(folder: Path, items: list[Item]) -> Path:
    return written(folder / "data.jsonl", "\ufeff" + lines(items).replace("\n", "\r\n"))


def array_in_one_line(folder: Path, items: list[Item]) -> Path:
    return written(folder / "data.json", json.dumps(items))


def array_over_lines(folder: Path, items: list[Item]) -> Path:
    return written(folder / "data.json", json.dumps(items, indent=2))


def array_named_jsonl(folder: Path, items: list[Item]) -> Path:
    return written(folder / "data.jsonl", json.dumps(items))


def array_named_txt(folder: Path, items: list[Item]) -> Path:
    return written(folder / "data.txt", json.dumps(items))


def folder_with_train_json(folder: Path, items: list[Item]) -> Path:
    written(folder / "train.json", json.dumps(items))
    written(folder / "valid.jsonl", lines(items[:1]))
    return folder


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("items", [COMPLETIONS, CHATS], ids=["completions", "chats"])
@pytest.mark.parametrize(
    "case",
    [
        lines_named_ndjson,
        lines_named_in_capitals,
        lines_named_json,
        lines_named_txt,
        lines_without_a_suffix,
        lines_of_windows,
        array_in_one_line,
        array_over_lines,
        array_named_jsonl,
        array_named_txt,
        folder_with_train_json,
    ],
)
def test_items_are_read_as_mlx_lm_trains_on_them(
    case: Callable[..., Path], items: list[Item], tmp_path: Path, tokenizer: Any
) -> None:
    found = read_sequences(case(tmp_path, items), tokenizer)
    assert same(found, trained_on(items, tmp_path, tokenizer))


def test_one_object_over_lines_is_one_item(tmp_path: Path, tokenizer: Any) -> None:
    for name in ("one.json", "one.txt"):
        file = written(tmp_path / name, json.dumps(CHATS[0], indent=4))
        assert read_sequences(file, tokenizer) == read_sequences(
            written(tmp_path / "one.jsonl", lines(CHATS[:1])), tokenizer
        )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.md", PROSE),
        ("notes.txt", PROSE),
        ("notes", PROSE),
        ("song.txt", "[Verse 1]\nHello, it is me.\n"),
        ("error.md", '{"error": "x"} is what the server says.\n\nThen it ends.\n'),
        ("template.txt", "{{ name }}, welcome\nto {{ place }}.\n"),
        ("brackets.txt", "[" * 5000),
        ("old mac.txt", "One line\rand another.\r"),
    ],
)
def test_prose_stays_prose(name: str, text: str, tmp_path: Path, tokenizer: Any) -> None:
    found = read_sequences(written(tmp_path / name, text), tokenizer, max_length=100_000)
    assert tokenizer.decode(found[0].tokens) == text.replace("\r", "\n")
    assert not found[0].is_answer


def test_characters_beyond_the_first_plane_are_whole(tmp_path: Path, tokenizer: Any) -> None:
    file = written(tmp_path / "data.jsonl", '{"text": "a\\ud83d\\ude00b\\u0000"}\n')
    (sequence,) = read_sequences(file, tokenizer)
    assert tokenizer.decode(sequence.tokens).startswith("a\N{GRINNING FACE}b\0")


# --- what is refused --------------------------------------------------------------------------


GOOD = lines(COMPLETIONS)
BROKEN_ARRAY = json.dumps(COMPLETIONS, indent=2).replace("},", "}", 1)
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:5d\nsize 12\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + '{"prompt": \n' + GOOD, ":5: not JSON (Expecting value); write {"),
        ("a.ndjson", PROSE, ":1: not JSON ("),
        ("a.txt", GOOD.replace("}\n", "\n", 1), ":1: not JSON (Expecting ',' delimiter); write"),
        ("a.json", BROKEN_ARRAY, ":6: not JSON (Expecting ',' delimiter); write"),
        ("a.txt", BROKEN_ARRAY, ":6: not JSON (Expecting ',' delimiter); write"),
        ("a.txt", json.dumps(CHATS[0], indent=1) * 2, ":12: not JSON (Extra data); write {"),
        ("a.json", "[" * 5000, ":1: not JSON (nested too deeply); write {"),
        (
            "a.jsonl",
            '{"text": 1' + "0" * 5000 + "}",
            ":1: not JSON (a number of too many",
        ),
        ("a.json", '"hello"', ": not a JSON object; write {"),
        ("a.json", '["one", "two"]', ": item 1: not a JSON object; write {"),
        ("a.txt", '["one", "two"]', ": item 1: not a JSON object; write {"),
        (
            "a.json",
            json.dumps([*CHATS, {"instruction": ""}]),
            ": item 5: none of mlx-lm's",
        ),
        ("a.json", json.dumps({"data": CHATS}), ":1: none of mlx-lm's formats; write {"),
        ("a.json", json.dumps({"text": ["one", "two"]}), ':1: "text" must be a string; write {'),
        ("a.json", "[]", ": holds no text; name a file with"),
        ("a.json", "\n", ": holds no text; name a file with"),
        ("a.csv", "prompt,completion\na,b\n", ": a table, which is not read; write {"),
        ("a.TSV", "prompt\tcompletion\na\tb\n", ": a table, which is not read; write {"),
        ("a.parquet", b"PAR1\x15\x00\x00PAR1", ": a Parquet file; write its rows as JSON lines"),
        ("a.xlsx", b"PK\x03\x04\x14\x00\x00", ": a ZIP archive or a spreadsheet; unpack it, or"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode()), ": compressed with gzip; unpack it with gun"),
        ("a.txt", GOOD.encode("utf-16"), ": UTF-16 text; convert it to UTF-8 (iconv"),
        ("a.txt", PROSE.encode("utf-16-le"), ": not UTF-8 text at byte 1; convert it to UTF-8"),
        ("a.txt", b"text\0text", ": not UTF-8 text at byte 4; convert it to UTF-8"),
        ("a.txt", "naïve".encode("latin-1"), ": not UTF-8 text at byte 2; convert it to UTF-8"),
        ("a.txt", LFS_POINTER, ": a Git LFS pointer in place of the file; fetch that with git lfs"),
        ("a.jsonl", GOOD + '{"text": "a\\ud800b"}\n', ":5: holds '\\ud800', half of a surrogate"),
        ("a.json", '[{"prompt": "", "completion": "\\udc00"}]', ": item 1: holds '\\udc00', half"),
    ],
)
def test_what_is_no_text_is_one_line(
    name: str, content: str | bytes, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    file = written(tmp_path / name, content)
    with pytest.raises(ConfigurationError) as caught:
        read_sequences(file, tokenizer)
    assert str(caught.value).startswith(f"{file}{message}")
    assert "\n" not in str(caught.value)


def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "data.json", '[{"text": "\\ud800"}]')
    arguments = "verify", "--reference", str(BASE), "--fused", str(BASE), "--data", str(file)
    assert exit_code(monkeypatch, *arguments) == 1
    assert f"{file}: item 1: holds" in "".join(capsys.readouterr().err.split("\n"))


def test_a_prompt_of_other_bytes_is_one_line(tokenizer: Any) -> None:
    """As Python hands on what a terminal wrote in Latin-1."""
    prompt = "naïve".encode("latin-1").decode("utf-8", "surrogateescape")
    with pytest.raises(ConfigurationError, match="--prompt: not UTF-8 text; convert"):
        text_prompt(prompt, tokenizer)


# --- an adapter's training data ---------------------------------------------------------------


def named_as(items: list[Item], names: dict[str, str]) -> list[Item]:
    """Items with other keys, and with mlx-lm's own for what they are not."""
    decoys = {"prompt": "not", "messages": "this", "text": "one"}
    return [decoys | {names[key]: value for key, value in item.items()} for item in items]


def adapter_of(folder: Path, items: list[Item], **config: Any) -> Path:
    """The sample's adapter as if it had been trained on these, which lie beside it."""
    shutil.copytree(ADAPTER, folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "data"} | config))
    (folder / "data").mkdir()
    written(folder / "data" / "train.jsonl", lines(items))
    return folder / "adapter"


def config_of(adapter: Path) -> Item:
    config: Item = json.loads((adapter / "adapter_config.json").read_text())
    return config


PAIR = {"prompt_feature": "input", "completion_feature": "output"}


@pytest.mark.parametrize(
    ("items", "features"),
    [
        (named_as(COMPLETIONS, {"prompt": "input", "completion": "output"}), PAIR),
        (named_as(CHATS, {"messages": "chosen"}), {"chat_feature": "chosen"}),
        # Both are there: mlx-lm takes the pair; without one of its keys the conversation.
        ([pair | chat for pair, chat in zip(COMPLETIONS, CHATS, strict=True)], {}),
        (
            [pair | chat for pair, chat in zip(COMPLETIONS, reversed(CHATS), strict=True)],
            {"prompt_feature": "input"},
        ),
        (
            [pair | chat for pair, chat in zip(COMPLETIONS, reversed(CHATS), strict=True)],
            {"completion_feature": None},
        ),
    ],
)
def test_training_data_is_read_by_the_keys_it_was_trained_with(
    items: list[Item], features: Item, tmp_path: Path, tokenizer: Any
) -> None:
    adapter = adapter_of(tmp_path, items, **features)
    data = training_data(config_of(adapter), adapter)
    assert data is not None
    found = read_sequences(data.folder, tokenizer, features=(data.features,))
    assert same(found, trained_on(items, tmp_path, tokenizer, **features))


def test_text_of_another_key(tmp_path: Path, tokenizer: Any) -> None:
    items: list[Item] = [{"body": "SELECT 1;", "text": "a title"}]
    data = load_local_dataset(
        adapter_of(tmp_path, items).parent / "data", tokenizer, SimpleNamespace(text_feature="body")
    )[0]
    features = Features.trained_on({"text_feature": "body"})
    (found,) = read_sequences(tmp_path / "data", tokenizer, features=(features,))
    assert list(found.tokens) == data.process(items[0])[0]


def test_fuse_and_verify_read_such_data(tmp_path: Path) -> None:
    items = named_as(CHATS, {"messages": "chosen"})
    adapter = adapter_of(tmp_path, items, chat_feature="chosen")
    report = fuse(BASE, f"{adapter}:0.15", tmp_path / "fused", calibration_tokens=64)
    assert report.calibration is not None
    assert report.calibration.source == "the adapter's training data (data/train.jsonl)"
    data = written(tmp_path / "test.json", json.dumps(items))
    compared = verify(BASE, f"{adapter}:0.15", tmp_path / "fused", data=data)
    assert compared.sequences == len(items)
    assert compared.exact_match_reference is not None


def test_keys_that_the_lines_lack_are_said_in_one_line(tmp_path: Path, tokenizer: Any) -> None:
    adapter = adapter_of(tmp_path, COMPLETIONS, **PAIR)
    data = training_data(config_of(adapter), adapter)
    assert data is not None
    with pytest.raises(ConfigurationError) as caught:
        read_sequences(data.folder, tokenizer, features=(data.features,))
    assert str(caught.value) == (
        f"{data.folder}/train.jsonl:1: has none of the keys that the adapter's configuration names "
        '("input" and "output", "messages" or "text"); '
        "correct its features, or name the text with --calibration"
    )
    # A file that the user names may have mlx-lm's own keys too.
    found = read_sequences(data.folder, tokenizer, features=(data.features, Features()))
    assert same(found, trained_on(COMPLETIONS, tmp_path, tokenizer))


def test_features_that_are_no_keys_are_in_no_line() -> None:
    odd = {"prompt_feature": None, "completion_feature": 3, "text_feature": ["text"]}
    assert Features.trained_on(odd) == Features(None, None, "messages", None)
    assert Features.trained_on({}) == Features()
