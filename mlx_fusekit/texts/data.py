"""Text from files, as token sequences: mlx-lm's JSONL formats, and plain text."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.texts.chat import encode_item
from mlx_fusekit.texts.sequences import TokenSequence

T = TypeVar("T")

_SPLITS = ("train", "valid", "test")
_FORMATS = (
    'write {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}, '
    "one JSON object a line"
)


def read_sequences(
    path: Path,
    tokenizer: Any,
    *,
    max_length: int = 512,
    tokens: int | None = None,
    seed: int = 0,
) -> list[TokenSequence]:
    """Read a file of text for the tokenizer's model.

    A ``.jsonl`` file holds mlx-lm's formats, told apart line by line as mlx-lm does: completions
    (``prompt`` and ``completion``), conversations (``messages``, and ``tools``), or ``text``. Any
    other file is plain UTF-8 text, cut into windows of ``max_length`` tokens. Of a folder it is
    ``train.jsonl``, or else ``valid.jsonl`` or ``test.jsonl``.

    A conversation that ends with the assistant is scored from the start of that answer to its
    end-of-turn token, where it is cut. Where the chat template cannot tell the answer apart, all of
    the conversation is scored; without a usable template its contents are read as text, and a
    completion is appended to its prompt as it is.

    Args:
        path: the file or folder.
        tokenizer: as ``mlx_lm.load`` returns it.
        max_length: longest sequence in tokens, at least 2; the rest is cut off.
        tokens: with a number, only a seeded selection of about so many tokens, of which no more is
            tokenized than needed; a larger number extends the selection of a smaller one.
        seed: of that selection.

    Returns:
        The sequences of two tokens or more, in the file's order or in the selection's.

    Raises:
        ConfigurationError: if the file is missing, empty, not UTF-8, or has a line in none of the
            formats.
    """
    file = data_file(path)
    if file.suffix == ".jsonl":
        items = _parse_lines(file)
        sequences = (
            _cut(encode_item(item, tokenizer), max_length) for item in _order(items, tokens, seed)
        )
    else:
        windows = _windows(_read_text(file), tokenizer, max_length)
        sequences = (TokenSequence(window) for window in _order(windows, tokens, seed))
    usable = list(_take((s for s in sequences if len(s.tokens) >= 2), tokens))
    if not usable:
        raise ConfigurationError(f"{file}: holds no text; name a file with text in it")
    return usable


def training_data(adapter_config: Mapping[str, Any], adapter_folder: Path) -> Path | None:
    """The folder of the data an adapter was trained on, if its config names one that exists here.

    mlx-lm notes the path as its user gave it, so a relative one is looked for in the working
    directory, in the adapter's folder and beside it. Nothing is fetched from the Hub.
    """
    data = adapter_config.get("data")
    # With a data set from the Hub, "data" is only mlx-lm's default.
    if not isinstance(data, str) or not data or adapter_config.get("hf_dataset"):
        return None
    for root in (Path(), adapter_folder, adapter_folder.parent):
        try:
            folder = root / Path(data).expanduser()
            if (folder / "train.jsonl").is_file():
                return folder
        except (OSError, ValueError, RuntimeError):  # a name no file system takes, or no such user
            continue
    return None


def data_file(path: Path) -> Path:
    """The file that ``path`` stands for: itself, or a folder's first of train, valid and test.

    Raises:
        ConfigurationError: if there is none.
    """
    if path.is_dir():
        for name in _SPLITS:
            if (path / f"{name}.jsonl").is_file():
                return path / f"{name}.jsonl"
        raise ConfigurationError(f"{path}: has no train.jsonl; name the file with the text")
    if not path.is_file():
        raise ConfigurationError(f"{path}: no such file; name a .jsonl or a text file")
    return path


def _order(items: Sequence[T], tokens: int | None, seed: int) -> Sequence[T]:
    """The items as they are for all of them, shuffled for a selection."""
    if tokens is None:
        return items
    return random.Random(seed).sample(items, len(items))  # noqa: S311


def _take(sequences: Iterable[TokenSequence], tokens: int | None) -> Iterator[TokenSequence]:
    """Sequences up to the one that reaches so many tokens, or all."""
    taken = 0
    for sequence in sequences:
        yield sequence
        taken += len(sequence.tokens)
        if tokens is not None and taken >= tokens:
            return


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{file}: not UTF-8 text at byte {error.start}; convert it to UTF-8"
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{file}: cannot be read ({error.strerror}); check its permissions"
        ) from error


def _windows(text: str, tokenizer: Any, max_length: int) -> list[tuple[int, ...]]:
    """Plain text in pieces of at most ``max_length`` tokens, each begun as the tokenizer begins."""
    # Not verbose: transformers warns of texts longer than the model's context, which are cut here.
    tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    start = sequence_start(tokenizer)
    size = max_length - len(start)
    return [(*start, *tokens[at : at + size]) for at in range(0, len(tokens), size)]


def sequence_start(tokenizer: Any) -> tuple[int, ...]:
    """The token that this tokenizer puts before every text (BOS), if it does."""
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and tokenizer.encode("a")[:1] == [bos] else ()


def _parse_lines(file: Path) -> list[dict[str, Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
    lines = _read_text(file).split("\n")
    return [
        _parse_line(line, f"{file}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _parse_line(line: str, where: str) -> dict[str, Any]:
    """Check one line; completions become conversations, and keep their ``prompt``."""
    try:
        item = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise ConfigurationError(f"{where}: not JSON ({reason}); {_FORMATS}") from error
    if not isinstance(item, dict):
        raise ConfigurationError(f"{where}: not a JSON object; {_FORMATS}")
    # The same order as in mlx_lm.tuner.datasets.create_dataset.
    if "prompt" in item and "completion" in item:
        _check_string(item, "prompt", where)
        _check_string(item, "completion", where)
    elif "messages" in item:
        _check_messages(item["messages"], where)
    elif "text" in item:
        _check_string(item, "text", where)
    else:
        raise ConfigurationError(f"{where}: none of mlx-lm's formats; {_FORMATS}")
    return item


def _check_string(item: Mapping[str, Any], key: str, where: str) -> None:
    if not isinstance(item[key], str):
        raise ConfigurationError(f'{where}: "{key}" must be a string; {_FORMATS}')


def _check_messages(messages: Any, where: str) -> None:
    usable = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    )
    if not usable or not messages:
        raise ConfigurationError(
            f'{where}: "messages" must be a list of {{"role": ..., "content": ...}}; correct it'
        )


def _cut(sequence: TokenSequence, max_length: int) -> TokenSequence:
    if len(sequence.tokens) <= max_length:
        return sequence
    scored = sequence.scored if sequence.scored < max_length else 1
    return TokenSequence(sequence.tokens[:max_length], scored)
