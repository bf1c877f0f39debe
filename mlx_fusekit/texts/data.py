"""Text from files, as token sequences: mlx-lm's data formats, and plain text."""

import codecs
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlx_fusekit.checkpoint.mistaken import lfs_pointer
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.reading import read_bytes
from mlx_fusekit.texts.chat import encode_item, shortened
from mlx_fusekit.texts.items import Features, parse_items
from mlx_fusekit.texts.sequences import TokenSequence, up_to

T = TypeVar("T")

_SPLITS = ("train", "valid", "test")
#: Suffixes of a folder's files; mlx-lm knows the first.
_SUFFIXES = ("jsonl", "ndjson", "json")
#: The largest file that is read as text, in bytes.
_LARGEST = 1_000_000_000
#: The longest plain text that is tokenized in one piece, in characters; and how many characters the
#: pieces of longer ones have for each token of a window: a token has about four.
_LONGEST_PIECE = 1_000_000
_PIECE_CHARACTERS = 8
#: How files begin that are no UTF-8 text, and what to do with them.
_NO_TEXT = {
    b"\x1f\x8b": "compressed with gzip; unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it with unzstd",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet; unpack it, or write its rows as JSON lines",
    b"PAR1": "a Parquet file; write its rows as JSON lines",
    b"ARROW1": "an Arrow file; write its rows as JSON lines",
    b"%PDF": "a PDF; write its text to a file",
    codecs.BOM_UTF16_LE: "UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    codecs.BOM_UTF16_BE: "UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
}


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What an adapter was trained on.

    Attributes:
        folder: where its ``train.jsonl`` lies.
        features: the keys of its text.
    """

    folder: Path
    features: Features = field(default_factory=Features)


def read_sequences(
    path: Path,
    tokenizer: Any,
    *,
    features: Sequence[Features] = (Features(),),
    max_length: int = 512,
    tokens: int | None = None,
    seed: int = 0,
) -> list[TokenSequence]:
    """Read a file of text for the tokenizer's model.

    JSON objects, one a line or in an array, are in mlx-lm's formats, told apart by their keys in
    mlx-lm's order: completions (``prompt`` and ``completion``), conversations (``messages``, and
    ``tools``), or ``text``. Anything else is plain UTF-8 text, cut into windows of ``max_length``
    tokens, unless the file's name says that it is JSON or a table; one of more than a million
    characters is tokenized in pieces of two windows or so, as many as are needed. Of a folder it is
    ``train.jsonl``, or else ``valid.jsonl`` or ``test.jsonl``.

    A conversation that ends with the assistant is scored from the start of that answer to its
    end-of-turn token, where it is cut. Where the chat template cannot tell the answer apart, all of
    the conversation is scored; without a usable template its contents are read as text, and a
    completion is appended to its prompt as it is.

    Args:
        path: the file or folder.
        tokenizer: as ``mlx_lm.load`` returns it.
        features: other keys of the formats; of each object those that it has first.
        max_length: longest sequence in tokens, at least 2; the rest is cut off.
        tokens: with a number, only a seeded selection of about so many tokens, of which no more is
            tokenized than needed; a larger number extends the selection of a smaller one.
        seed: of that selection.

    Returns:
        The sequences of two tokens or more, in the file's order or in the selection's.

    Raises:
        ConfigurationError: if the file is missing, empty, not UTF-8 text, or JSON that has an
            object in none of the formats.
    """
    file = data_file(path)
    text = _read_text(file)
    items = parse_items(text, file, features)
    if items is not None:
        sequences = (
            _cut(encode_item(shortened(item, max_length), tokenizer), max_length)
            for item in _order(items, tokens, seed)
        )
    else:
        sequences = (
            TokenSequence(window)
            for piece in _order(_pieces(text, max_length), tokens, seed)
            for window in _order(_windows(piece, tokenizer, max_length), tokens, seed)
        )
    usable = list(up_to((s for s in sequences if len(s.tokens) >= 2), tokens))
    if not usable:
        raise ConfigurationError(f"{file}: holds no text; name a file with text in it")
    return usable


def check_text(path: Path) -> None:
    """Refuse what :func:`read_sequences` would not read as text, without a tokenizer.

    Whether items of JSON have text under the keys that are looked for, is left to it.

    Raises:
        ConfigurationError: if the file is missing, empty, or not UTF-8 text.
    """
    file = data_file(path)
    if not _read_text(file).strip():
        raise ConfigurationError(f"{file}: holds no text; name a file with text in it")


def training_data(adapter_config: Mapping[str, Any], adapter_folder: Path) -> TrainingData | None:
    """The data an adapter was trained on, if its config names a folder that exists here.

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
                return TrainingData(folder, Features.trained_on(adapter_config))
        except (OSError, ValueError, RuntimeError):  # a name no file system takes, or no such user
            continue
    return None


def data_file(path: Path) -> Path:
    """The file that ``path`` stands for: itself, or a folder's first of train, valid and test.

    Raises:
        ConfigurationError: if there is none.
    """
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise ConfigurationError(
            f"{path}: {error.strerror}; name a .jsonl or a text file"
        ) from error
    if is_folder:
        for name in (f"{split}.{suffix}" for split in _SPLITS for suffix in _SUFFIXES):
            if (path / name).is_file():
                return path / name
        raise ConfigurationError(f"{path}: has no train.jsonl; name the file with the text")
    if not is_file:
        raise ConfigurationError(f"{path}: no such file; name a .jsonl or a text file")
    return path


def _order(items: Sequence[T], tokens: int | None, seed: int) -> Sequence[T]:
    """The items as they are for all of them, shuffled for a selection."""
    if tokens is None:
        return items
    return random.Random(seed).sample(items, len(items))  # noqa: S311


def _read_text(file: Path) -> str:
    try:
        raw = read_bytes(file, _LARGEST)
    except OSError as error:
        raise ConfigurationError(
            f"{file}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    try:
        text = raw.decode("utf-8-sig")
        at = raw.find(b"\0")  # decodes, but is in no text: UTF-16, or a binary file
    except UnicodeDecodeError as error:
        text, at = "", error.start
    if at >= 0:
        what = next((what for head, what in _NO_TEXT.items() if raw.startswith(head)), None)
        raise ConfigurationError(
            f"{file}: {what or f'not UTF-8 text at byte {at}; convert it to UTF-8'}"
        )
    if lfs_pointer(raw):
        raise ConfigurationError(
            f"{file}: a Git LFS pointer in place of the file; fetch that with git lfs pull"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _pieces(text: str, max_length: int) -> list[str]:
    """A text as it is, or in pieces where it is so long that it takes minutes to tokenize."""
    if len(text) <= _LONGEST_PIECE:
        return [text]
    size = _PIECE_CHARACTERS * max_length
    return [text[at : at + size] for at in range(0, len(text), size)]


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


def _cut(sequence: TokenSequence, max_length: int) -> TokenSequence:
    if len(sequence.tokens) <= max_length:
        return sequence
    scored = sequence.scored if sequence.scored < max_length else 1
    return TokenSequence(sequence.tokens[:max_length], scored)
