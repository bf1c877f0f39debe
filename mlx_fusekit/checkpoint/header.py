"""Safetensors headers, read as untrusted input.

``mx.load`` accepts overlapping tensors, holes, negative shapes, wrapped offsets and duplicate
names, where the safetensors library rejects them; everything we read, clone or hand to MLX is
validated here first. Format: https://huggingface.co/docs/safetensors (header length as
little-endian u64, JSON header, tensor bytes).
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from mlx_fusekit.checkpoint.json_text import LARGEST_TEXT, parse_json, shown
from mlx_fusekit.checkpoint.mistaken import BEGINNING, mistaken_file, not_safetensors
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.floats import STORAGE, Array
from mlx_fusekit.reading import open_descriptor

#: More than any file has; each takes a kilobyte here, and the time to look at it.
MOST_TENSORS = 100_000
MOST_AXES = 32
_LONGEST_NAME = 1000
_LARGEST_SIZE = 2**63 - 1
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npz", ".npy")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies: cheap, made from a header, nothing read.

    Attributes:
        start: absolute offset of its first byte in ``file``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize

    def read(self) -> Array:
        """The whole tensor's bits; bfloat16 as uint16."""
        return self._read(0, self.nbytes).reshape(self.shape)

    def held(self) -> Self:
        """Itself: reading from the file computes nothing."""
        return self

    def read_rows(self, first: int, last: int) -> Array:
        """Rows ``first`` to ``last`` (exclusive) of the tensor seen as ``[rows, columns]``.

        All axes but the last count as rows.
        """
        columns = self.shape[-1] if self.shape else 1
        stride = columns * STORAGE[self.dtype].itemsize
        return self._read(first * stride, (last - first) * stride).reshape(last - first, columns)

    def _read(self, offset: int, length: int) -> Array:
        data = np.empty(length, np.uint8)
        file = open_descriptor(self.file)
        try:
            os.lseek(file, self.start + offset, os.SEEK_SET)
            filled, view = 0, data.data
            while filled < length:
                count = os.readv(file, [view[filled:]])
                if not count:
                    raise CheckpointError(
                        f"{self.file}: the file ended inside tensor {self.name}; "
                        "it changed while it was read"
                    )
                filled += count
        finally:
            os.close(file)
        return data.view(STORAGE[self.dtype])


@dataclass(frozen=True, slots=True)
class Header:
    """A validated safetensors header.

    Attributes:
        tensors: by name, in the order of their bytes.
        prefix: the file's first bytes as stored, length field included; the data follow.
        metadata: the ``__metadata__`` strings.
    """

    file: Path
    tensors: Mapping[str, TensorRef]
    prefix: bytes
    metadata: Mapping[str, str]

    @property
    def data_start(self) -> int:
        """Absolute offset of the first tensor byte."""
        return len(self.prefix)


def refuse_pickle(path: Path) -> None:
    """Refuse by name what could be a pickle; it is never opened.

    Raises:
        CheckpointError: when the file's suffix is one that pickles use.
    """
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: pickled weights can run code and are never opened; "
            "convert the file to .safetensors on a machine you trust"
        )


def read_header(path: Path) -> Header:
    """Read and validate the header of a safetensors file.

    Raises:
        CheckpointError: naming the file, the tensor and what is wrong with it.
    """
    refuse_pickle(path)
    try:
        with open(open_descriptor(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(BEGINNING), size)
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        why = mistaken_file(path) or f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path}: {why}") from error
    if len(text) != length:
        raise CheckpointError(f"{path}: the file ends inside its header; download it again")
    raw = struct.pack("<Q", length) + text
    entries, metadata = _parse(path, text)
    tensors = _place(path, entries, len(raw), size)
    return Header(path, MappingProxyType(tensors), raw, MappingProxyType(metadata))


def _header_length(path: Path, first: bytes, size: int) -> int:
    length: int = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else _LARGEST_SIZE
    if length > LARGEST_TEXT or 8 + length > size or not length:
        if (told := not_safetensors(first)) is not None:
            raise CheckpointError(f"{path}: {told}")
        if len(first) < 8:
            raise CheckpointError(
                f"{path}: {size} bytes are no safetensors file; download it again"
            )
        if first[:2] == b"PK" or first[:1] == b"\x80":
            raise CheckpointError(
                f"{path}: this is a pickle or zip archive, not safetensors; it is never opened; "
                "convert it on a machine you trust"
            )
        raise CheckpointError(
            f"{path}: its header claims {length} bytes, but the file has {size}; it is damaged or "
            "not safetensors; download it again"
        )
    return length


def _parse(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        entries = parse_json(text, unique=True)
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not JSON to be read ({error})") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is no JSON object")
    metadata = entries.pop("__metadata__", None)
    if metadata is None:  # what mx.save_safetensors writes for an adapter
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ holds something else than strings")
    if len(entries) > MOST_TENSORS:
        raise CheckpointError(
            f"{path}: {len(entries)} tensors in one file, more than any model has; at most "
            f"{MOST_TENSORS} are read"
        )
    return entries, metadata


def _place(path: Path, entries: dict[str, Any], data_start: int, size: int) -> dict[str, TensorRef]:
    """Check every entry, and that together they cover the file's data without hole or overlap."""
    spans = {name: _span(path, name, entry) for name, entry in entries.items()}
    tensors: dict[str, TensorRef] = {}
    position = 0
    for name, (begin, end, dtype, shape) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole"
            raise CheckpointError(f"{path}: tensor {shown(name)} {fault} (offset {begin})")
        tensors[name] = TensorRef(name, dtype, shape, path, data_start + begin)
        position = end
    if data_start + position != size:
        raise CheckpointError(
            f"{path}: the tensors end at byte {data_start + position}, but the file has {size}; "
            "it is cut off or damaged; download it again"
        )
    return tensors


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """Begin, end, dtype and shape of one header entry, each checked."""
    where = f"{path}: tensor {shown(name)}"
    if len(name) > _LONGEST_NAME:
        raise CheckpointError(f"{where} has a name of {len(name)} characters")
    if "\0" in name:
        raise CheckpointError(f"{where} has a NUL in its name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise CheckpointError(
            f"{where} has the unknown dtype {shown(dtype)}; use the 16-bit original"
        )
    if not _are_sizes(shape):
        raise CheckpointError(f"{where} has the invalid shape {shown(shape)}")
    if len(shape) > MOST_AXES:
        raise CheckpointError(f"{where} has {len(shape)} axes; MLX's arrays have fewer")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the invalid offsets {shown(offsets)}")
    nbytes = math.prod(shape) * STORAGE[dtype].itemsize  # Python integers do not overflow
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where} is {dtype} {shown(shape)}, {shown(nbytes)} bytes, but its offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1], dtype, tuple(shape)


def _are_sizes(values: Any) -> bool:
    # bool is an int to Python, but not to JSON
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _LARGEST_SIZE for value in values
    )
