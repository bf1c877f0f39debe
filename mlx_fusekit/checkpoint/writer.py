"""Writing one safetensors file: untouched bytes copied, the others filled in by rows, in any order.

A file whose layout equals a base file's is a clone of it, with only the touched ranges rewritten;
where the file system cannot clone, it is laid out afresh and the untouched ranges are copied. Both
ways give the same bytes.
"""

import json
import math
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mlx_fusekit.checkpoint.header import Header, TensorRef
from mlx_fusekit.formats.floats import STORAGE, Array
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.files import copy_range, reflink


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of a file to be written.

    Attributes:
        copied: where its bytes are copied from, or None when they are computed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    copied: TensorRef | None = None

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


@dataclass(frozen=True)
class FileLayout:
    """A file to be written: its header's bytes and where each tensor lies.

    Attributes:
        base: the base's file of the very same layout, which may be cloned.
    """

    name: str
    tensors: tuple[OutputTensor, ...]
    prefix: bytes
    starts: Mapping[str, int]
    base: Header | None = None

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.prefix) + sum(tensor.nbytes for tensor in self.tensors)


def same_layout(name: str, base: Header, computed: frozenset[str]) -> FileLayout:
    """The layout of a base's file, with the tensors in ``computed`` filled in afresh."""
    tensors = tuple(
        OutputTensor(ref.name, ref.dtype, ref.shape, None if ref.name in computed else ref)
        for ref in base.tensors.values()
    )
    starts = {ref.name: ref.start for ref in base.tensors.values()}
    return FileLayout(name, tensors, base.prefix, starts, base)


def new_layout(name: str, tensors: Sequence[OutputTensor]) -> FileLayout:
    """A file of these tensors in this order, as MLX writes it, its data aligned to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    position, offsets = 0, {}
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        offsets[tensor.name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text)) + text
    starts = {name: len(prefix) + offset for name, offset in offsets.items()}
    return FileLayout(name, tuple(tensors), prefix, starts)


class FileWriter:
    """Fills one file of the staging folder; safe to use from several threads.

    Args:
        layout: what to write.
        folder: an existing folder, where no file of that name exists.
        clone: whether a file of the same layout may be cloned.
    """

    def __init__(self, layout: FileLayout, folder: Path, *, clone: bool = True) -> None:
        self.layout = layout
        self.path = folder / layout.name
        base = layout.base
        self.cloned = clone and base is not None and reflink(base.file, self.path)
        self._file = os.open(self.path, os.O_RDWR) if self.cloned else calls.create(self.path)
        self._written: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._computed = {tensor.name: tensor for tensor in layout.tensors if not tensor.copied}
        if not self.cloned:
            calls.resize(self._file, layout.nbytes)
            calls.write(self._file, layout.prefix, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        calls.close(self._file)

    def untouched(self) -> Iterator[tuple[TensorRef, int]]:
        """What has to be copied: where each tensor lies in the base, and its place in this file."""
        for tensor in () if self.cloned else self.layout.tensors:
            if tensor.copied is not None and tensor.name not in self._computed:
                yield tensor.copied, self.layout.starts[tensor.name]

    def fill_in(self, name: str) -> bool:
        """Let a tensor be written by rows that would be copied; False for any other."""
        found = next((t for t in self.layout.tensors if t.name == name and t.copied), None)
        if self.cloned or found is None:
            return False
        self._computed[name] = found
        return True

    def copy(self, source: int, source_offset: int, offset: int, length: int) -> None:
        """Copy bytes of an open file, in the kernel where it can."""
        copy_range(source, self._file, source_offset, offset, length)

    def write(self, data: bytes, offset: int) -> None:
        """Write bytes that were read from the base."""
        calls.write(self._file, data, offset)

    def write_rows(self, name: str, first_row: int, rows: Array) -> None:
        """Fill in rows of a computed tensor, all axes but the last counting as rows.

        Args:
            rows: stored bits, ``[rows, columns]``.
        """
        tensor = self._computed[name]
        columns = tensor.shape[-1] if tensor.shape else 1
        item = STORAGE[tensor.dtype].itemsize
        if rows.shape[1:] != (columns,) or rows.dtype.itemsize != item:
            raise AssertionError(f"{name}: {rows.dtype} {rows.shape} written into {tensor}")
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        calls.write(self._file, data, self.layout.starts[name] + first_row * columns * item)
        with self._lock:
            self._written[name] += rows.nbytes

    def finish(self) -> None:
        """Check that every computed byte was written, and bring the file to the disk."""
        for name, tensor in self._computed.items():
            if self._written[name] != tensor.nbytes:
                raise AssertionError(
                    f"{name}: {self._written[name]} of {tensor.nbytes} bytes written"
                )
        calls.sync(self._file)
