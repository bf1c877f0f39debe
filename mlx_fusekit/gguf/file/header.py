"""Headers of GGUF files, read in a bounded way.

gguf-py's reader makes an array of every string of the vocabulary and trusts the counts in the file;
this one skips what it does not need and never looks past the end of the file.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian).
"""

import collections
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
from gguf import GGMLQuantizationType as GgmlType

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.reading import open_file

MAGIC = b"GGUF"
#: Every tensor begins at a multiple of this many bytes.
_ALIGNMENT = int(gguf.GGUF_DEFAULT_ALIGNMENT)
_VERSION = 3
_STRING, _ARRAY = 8, 9
#: Bytes of a value of each other type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MOST_DIMENSIONS = 4
#: Lists that nobody needs: by name, and by length.
_MOST_TEXTS = 10_000
_TOKENS = (gguf.Keys.Tokenizer.LIST, gguf.Keys.Tokenizer.MERGES)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor of a GGUF file lies.

    Attributes:
        shape: logical, slowest dimension first.
        start: offset of its first byte, from the file's beginning.
    """

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        block, size = gguf.GGML_QUANT_SIZES[self.ggml_type]
        return math.prod(self.shape) // int(block) * int(size)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says it holds.

    Attributes:
        keys: names of the metadata, in order.
        tensors: by name, in order.
        texts: the values of the metadata that are strings or lists of some, the tokens aside.
    """

    keys: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]
    texts: Mapping[str, str | tuple[str, ...]]


def padded(nbytes: int) -> int:
    """The next offset at which a tensor may begin."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and validate the header of a GGUF file.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        with (
            open_file(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Cursor(path, data).header()
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read as GGUF ({error})") from error


class _Cursor:
    """A place in a file, which moves on as values are read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._position = 0

    def header(self) -> GgufHeader:
        if self._bytes(4) != MAGIC or self._number("I") != _VERSION:
            raise self._fault(f"is no GGUF file of version {_VERSION}")
        tensor_count, key_count = self._number("Q"), self._number("Q")
        keys: dict[str, None] = {}
        texts: dict[str, str | tuple[str, ...]] = {}
        for _ in range(key_count):
            key = self._text()
            if key in keys:
                raise self._fault(f"has the key {key!r} twice")
            if key == gguf.Keys.General.ALIGNMENT:
                raise self._fault("has its own alignment, which is not supported")
            keys[key] = None
            found = self._value(self._number("I"), kept=key not in _TOKENS)
            if found is not None:
                texts[key] = found
        infos = [self._tensor_info() for _ in range(tensor_count)]
        start = padded(self._position)
        tensors: dict[str, StoredTensor] = {}
        for name, ggml_type, shape, offset in infos:
            tensor = StoredTensor(name, ggml_type, shape, start + offset)
            if name in tensors or offset % _ALIGNMENT:
                raise self._fault(f"has tensor {name!r} twice, or at a place it cannot be")
            if tensor.start + tensor.nbytes > len(self._data):
                raise self._fault(f"ends before the end of tensor {name!r}")
            tensors[name] = tensor
        return GgufHeader(tuple(keys), MappingProxyType(tensors), MappingProxyType(texts))

    def _tensor_info(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        name, dimensions = self._text(), self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._fault(f"has a tensor {name!r} of {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        kind, offset = self._number("I"), self._number("Q")
        try:
            return name, GgmlType(kind), shape, offset
        except ValueError:
            raise self._fault(f"has a tensor {name!r} of the unknown type {kind}") from None

    def _value(self, kind: int, kept: bool) -> str | tuple[str, ...] | None:
        """A value that is a string or a list of strings; None for one that was passed over."""
        if kind == _STRING:
            return self._bytes(self._number("Q")).decode("utf-8", "replace")
        if kind != _ARRAY:
            self._bytes(self._size(kind))
            return None
        kind, count = self._number("I"), self._number("Q")
        if kind != _STRING:
            self._bytes(self._size(kind) * count)
            return None
        found = (self._bytes(self._number("Q")) for _ in range(count))
        if kept and count <= _MOST_TEXTS:
            return tuple(text.decode("utf-8", "replace") for text in found)
        collections.deque(found, maxlen=0)
        return None

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise self._fault(f"has a value of the unknown type {kind}")
        return _SIZES[kind]

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8")

    def _number(self, kind: str) -> int:
        layout = struct.Struct(f"<{kind}")
        number: Any = layout.unpack(self._bytes(layout.size))[0]
        return int(number)

    def _bytes(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise self._fault("ends inside its header")
        found = self._data[self._position : end]
        self._position = end
        return found

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what}")
