"""SentencePiece's ``tokenizer.model``: the few fields of its protobuf message that count here.

A small bounded reader: nothing else here needs ``sentencepiece`` or ``protobuf``.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.tokens import Token
from mlx_fusekit.reading import read_bytes

_LARGEST = 200_000_000
_BPE = 2


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a ``tokenizer.model`` says.

    Attributes:
        tokens: its pieces, by id; the kinds are SentencePiece's, whose numbers GGUF took over.
        bpe: whether it merges pieces, rather than looking for the likeliest ones (unigram).
        space_prefix: whether a space is put in front of a text.
        normalizes: whether characters are replaced first.
    """

    tokens: tuple[Token, ...]
    bpe: bool
    space_prefix: bool
    normalizes: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a ``tokenizer.model``.

    Raises:
        CheckpointError: when the file is not one.
    """
    try:
        return _read(memoryview(read_bytes(path, _LARGEST)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, IndexError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: not a SentencePiece model ({error}); download the model again"
        ) from error


def _read(data: memoryview) -> SentencePieceModel:
    tokens = []
    # The defaults of SentencePiece's own message: unigram, with a space in front.
    kind, space_prefix, normalizes = 1, True, False
    for field, value in _fields(data):
        if field == 1:
            tokens.append(_piece(_message(value)))
        elif field == 2:
            kind = dict(_fields(_message(value))).get(3, kind)  # type: ignore[assignment]
        elif field == 3:
            inner = dict(_fields(_message(value)))
            space_prefix = bool(inner.get(3, True))
            normalizes = bool(inner.get(2, b""))
    if not tokens:
        raise ValueError("it has no pieces")
    return SentencePieceModel(tuple(tokens), kind == _BPE, space_prefix, normalizes)


def _piece(data: memoryview) -> Token:
    text, score, kind = "", 0.0, int(TokenType.NORMAL)
    for field, value in _fields(data):
        if field == 1:
            text = bytes(_message(value)).decode("utf-8")
        elif field == 2:
            (score,) = struct.unpack("<f", _message(value))
        elif field == 3 and isinstance(value, int):
            kind = int(TokenType(value))
    return Token(text, kind, score)


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a text belongs")
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message; numbers as int, all else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _number(data, at)
            yield field, value
            continue
        if wire == 2:
            length, at = _number(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of the unknown kind {wire}")
        if at + length > len(data):
            raise ValueError("the file ends early")
        yield field, data[at : at + length]
        at += length


def _number(data: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length at a place, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
