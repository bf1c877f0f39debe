"""Data files of strangers: refused in one line, or read; long ones in little time and memory."""

import codecs
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer
from support.limits import in_little
from support.sweep_values import SENSELESS, replaced

from mlx_fusekit import samples
from mlx_fusekit.bench.workload import text_prompt
from mlx_fusekit.errors import ConfigurationError, FusekitError
from mlx_fusekit.texts import chat, data
from mlx_fusekit.texts.chat import encode_item, shortened
from mlx_fusekit.texts.data import check_text, read_sequences

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}


def text(content: str, name: str = "data.jsonl") -> Callable[[Path], Path]:
    return raw(content.encode("utf-8", "surrogatepass"), name)


def raw(content: bytes, name: str = "data.jsonl") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def items(*values: object) -> Callable[[Path], Path]:
    return text("".join(json.dumps(value) + "\n" for value in values))


def chat_of(*messages: object, **more: object) -> Callable[[Path], Path]:
    return items({"messages": messages, **more})


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "data.jsonl")
    return folder / "data.jsonl"


def folder_of_a_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "train.jsonl")
    return folder


def link_to_itself(folder: Path) -> Path:
    (folder / "data.jsonl").symlink_to("data.jsonl")
    return folder / "data.jsonl"


def link_to_nothing(folder: Path) -> Path:
    (folder / "data.jsonl").symlink_to("gone")
    return folder / "data.jsonl"


def nested(depth: int) -> str:
    return '{"messages": [{"role": "user", "content": %s}]}' % ("[" * depth + "]" * depth)


#: By name, what makes it, and a word of why it is refused.
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "NaN for a text": (text('{"text": NaN}\n'), "string"),
    "infinity for a prompt": (text('{"prompt": Infinity, "completion": "a"}\n'), "string"),
    "half a surrogate pair": (text('{"text": "\\ud800 and more"}\n'), "surrogate"),
    "half a pair in a role": (
        text('{"messages": [{"role": "\\ud800", "content": "a"}]}\n'),
        "surrogate",
    ),
    "half a pair as bytes": (raw(b'{"text": "\xed\xa0\x80"}\n'), "UTF-8"),
    "an integer of 5,000 digits": (text('{"text": %s}\n' % ("9" * 5000)), "digits"),
    "100,000 brackets": (text("[" * 100_000), "nested too deeply"),
    "900 brackets in a message": (text(nested(900) + "\n"), "nested too deeply"),
    "150 brackets in a message": (text(nested(150) + "\n"), "nested too deeply"),
    "a FIFO": (fifo, "name a"),
    "a folder of a FIFO": (folder_of_a_fifo, "train.jsonl"),
    "an empty folder": (lambda folder: folder, "train.jsonl"),
    "a device without end": (lambda _: Path("/dev/zero"), "name a"),
    "a link to itself": (link_to_itself, "name a"),
    "a link to nothing": (link_to_nothing, "name a"),
    "a name that is too long": (lambda folder: folder / ("a" * 300), "name"),
    "a name with a NUL": (lambda folder: folder / "a\0b", "name a"),
    "random bytes": (raw(random.Random(0).randbytes(9999), "data.txt"), "UTF-8"),
    "UTF-16": (raw(codecs.BOM_UTF16_LE + "text".encode("utf-16-le"), "data.txt"), "UTF-16"),
    "NUL bytes in text": (raw(b"some\0text", "data.txt"), "UTF-8"),
    "only NUL bytes": (raw(bytes(9999)), "UTF-8"),
    "gzip": (raw(b"\x1f\x8b\x08\x00\xff\xff"), "gunzip"),
    "a million empty lines": (text("\n" * 1_000_000), "holds no text"),
    "100,000 empty objects": (text("{}\n" * 100_000), "none of mlx-lm's formats"),
    "nothing": (raw(b""), "holds no text"),
    "a byte order mark alone": (raw(codecs.BOM_UTF8), "holds no text"),
    "10 MB in a line that is no JSON": (text("a" * 10_000_000), "not JSON"),
    "one bad line": (text('{"text": "a"}\n{"text": \n{"text": "b"}\n'), "not JSON"),
    "a number": (text("5"), "not a JSON object"),
    "null": (text("null"), "not"),
    "messages that are no list": (items({"messages": {"role": "user"}}), "messages"),
    "no messages": (items({"messages": []}), "messages"),
    "messages of numbers": (items({"messages": [5]}), "messages"),
    "a role that is a number": (chat_of({"role": 5, "content": "a"}), "role"),
    "a message without a role": (chat_of({"content": "a"}), "role"),
    "a text that is a list": (items({"text": ["a"]}), "string"),
    "a completion that is null": (items({"prompt": "a", "completion": None}), "string"),
    "other keys": (items({"question": "a", "answer": "b"}), "formats"),
    "a table": (text("prompt,completion\na,b\n", "data.csv"), "table"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(samples.model_path())


@pytest.fixture
def growth() -> Callable[[], int]:
    """Bytes that this process holds more at most than when the test began."""

    def most() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )

    before = most()
    return lambda: most() - before


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_a_line(name: str, tmp_path: Path, tokenizer) -> None:
    make, word = HOSTILE[name]
    path = make(tmp_path)
    with in_little(), pytest.raises(ConfigurationError, match=word) as refused:
        read_sequences(path, tokenizer, tokens=1000)
    assert "\n" not in str(refused.value)
    assert "data" in str(refused.value) or str(path) in str(refused.value)


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 20


@pytest.mark.parametrize(
    "item",
    [
        {"messages": [USER, ANSWER], "tools": [TOOL]},
        {"messages": [USER, CALL, {"role": "tool", "name": "add", "content": "2"}, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]},
        {"prompt": "a", "completion": "b", "tools": [TOOL]},
        {"text": "a text"},
    ],
    ids=["tools", "calls", "parts", "completion", "text"],
)
def test_a_value_of_any_kind_at_any_key_is_read_or_refused(item, tmp_path, tokenizer) -> None:
    read = refused = 0
    for changed in replaced(item):
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(changed) + "\n")
        try:
            sequences = read_sequences(path, tokenizer, tokens=100)
        except ConfigurationError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all(len(sequence.tokens) >= 2 for sequence in sequences)
            read += 1
    assert refused >= len(SENSELESS) / 2
    assert read + refused == len(list(replaced(item)))


def test_mixed_formats_are_read(tmp_path: Path, tokenizer) -> None:
    path = items(
        {"messages": [USER, ANSWER]}, {"text": "a text"}, {"prompt": "a", "completion": ""}
    )
    assert len(read_sequences(path(tmp_path), tokenizer)) == 3


WORDS = "the quick brown fox " * 1_500_000
#: 30 MB in one line.
LONG = {
    "a text": lambda: {"text": WORDS},
    "one word": lambda: {"text": "a" * len(WORDS)},
    "a question": lambda: {"messages": [{"role": "user", "content": WORDS}, ANSWER]},
    "content before role": lambda: {"messages": [{"content": WORDS, "role": "user"}, ANSWER]},
    "an answer": lambda: {"messages": [USER, {"role": "assistant", "content": WORDS}]},
    "many messages": lambda: {"messages": [USER, ANSWER] * 400_000},
    "a completion": lambda: {"prompt": "a", "completion": WORDS},
    "tools": lambda: {"messages": [USER, ANSWER], "tools": [TOOL] * 400_000},
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_line_takes_little(name: str, tmp_path: Path, growth) -> None:
    """It is cut before it is tokenized: 30 MB took minutes and 4.6 GB."""
    item = LONG[name]()
    start = time.process_time()
    cut = shortened(item, 512)
    assert len(json.dumps(cut)) < 2_000_000
    assert time.process_time() - start < 10
    assert growth() < 300_000_000
    roles = [message["role"] for message in cut.get("messages", ())]
    assert set(roles) <= {"user", "assistant"}
    assert cut.keys() == item.keys()


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_long_file_takes_little(suffix: str, tmp_path: Path, tokenizer, growth) -> None:
    path = tmp_path / f"data.{suffix}"
    path.write_text(WORDS if suffix == "txt" else json.dumps({"text": WORDS}))
    start = time.process_time()
    sequences = read_sequences(path, tokenizer, tokens=17408)
    assert time.process_time() - start < 10
    assert growth() < 500_000_000
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    assert tokens >= (17408 if suffix == "txt" else 512)


def test_what_is_kept_has_the_tokens_of_the_whole(tokenizer, monkeypatch) -> None:
    """With no more room for each token than the vocabulary's longest has characters."""
    longest = max(len(token) for token in tokenizer.get_vocab())
    assert longest < chat._LONGEST_TOKEN
    monkeypatch.setattr(chat, "_LONGEST_TOKEN", longest)
    monkeypatch.setattr(chat, "_SHORT", 9)
    draw = random.Random(0)
    words = ["SELECT", " cars", "WHERE ", "é", "\n", "  ", "0123", "<|im_end|>", "名"]
    for _ in range(60):
        texts = ["".join(draw.choices(words, k=draw.randrange(1, 400))) for _ in range(4)]
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": t} for n, t in enumerate(texts)]
        for item in ({"text": texts[0]}, {"messages": messages}):
            for tokens in (2, 8, 40):
                whole = encode_item(item, tokenizer).tokens[:tokens]
                assert encode_item(shortened(item, tokens), tokenizer).tokens[:tokens] == whole


def test_an_item_of_common_length_is_not_cut() -> None:
    item = {"messages": [USER, ANSWER] * 200, "tools": [TOOL] * 50, "text": "a" * 500_000}
    assert shortened(item, 512) == item


def test_a_text_in_pieces_is_drawn_from_all_over(tmp_path: Path, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(data, "_LONGEST_PIECE", 10_000)
    path = tmp_path / "data.txt"
    path.write_text("".join(f"line {n}\n" for n in range(20_000)))
    few, more = (
        read_sequences(path, tokenizer, tokens=n, max_length=64, seed=1) for n in (500, 2000)
    )
    assert more[: len(few)] == few
    assert sum(len(sequence.tokens) for sequence in more) >= 2000
    numbers = [
        int(line) for s in more for line in tokenizer.decode(s.tokens).split() if line.isdigit()
    ]
    assert max(numbers) - min(numbers) > 10_000
    everything = read_sequences(path, tokenizer, max_length=64)
    whole = "".join(tokenizer.decode(s.tokens) for s in everything)
    assert whole == path.read_text()


def test_a_prompt_longer_than_any_model_takes_is_refused(tokenizer) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigurationError, match="4000000"):
        text_prompt(WORDS, tokenizer)
    assert time.monotonic() - start < 5


def test_checking_refuses_what_is_no_text(tmp_path: Path) -> None:
    for name in ("a FIFO", "random bytes", "nothing", "a name that is too long", "only NUL bytes"):
        with pytest.raises(FusekitError):
            check_text(HOSTILE[name][0](tmp_path))
        for path in tmp_path.iterdir():
            path.unlink()
