"""Arrays that wait until they are needed: in memory, or in files of their own."""

import uuid
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fusekit.requantize.bits import array_of, bits_of, type_of_bits
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.files import remove


class Held:
    """An array that waits.

    Args:
        array: computed.
        path: of the file that it waits in, which goes with this; None for memory.
    """

    def __init__(self, array: mx.array, path: Path | None = None) -> None:
        self._array = array if path is None else None
        self._path, self._kind, self._shape = path, str(array.dtype), array.shape
        if path is not None:
            bits: Any = bits_of(array).reshape(-1).view(np.uint8)
            file = calls.create(path)
            try:
                calls.write(file, bits, 0)
            finally:
                calls.close(file)
            weakref.finalize(self, remove, path)

    def get(self) -> mx.array:
        """The array."""
        if self._array is not None:
            return self._array
        assert self._path is not None, "it is in one of both"
        # Not mapped: its memory is to be free again when the array is.
        bits = np.fromfile(self._path, type_of_bits(self._kind))
        return array_of(bits.reshape(self._shape), self._kind)


class Shelf:
    """Takes arrays.

    Args:
        folder: for their files; None where they stay in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def put(self, array: mx.array) -> Held:
        """Let a computed array wait."""
        folder = self._folder
        # The name is no other's, who may remove his file at any time.
        return Held(array, None if folder is None else folder / f"held-{uuid.uuid4().hex}")
