"""A weight of the base that is read and dequantized once for several models."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from mlx_fusekit.formats.floats import Array, Float32
from mlx_fusekit.formats.quantization import QuantizedRows
from mlx_fusekit.merging.arithmetic import BaseBlock, RowRange
from mlx_fusekit.merging.blocks import WeightReader

_Block = tuple[QuantizedRows | None, BaseBlock]


@dataclass
class SharedReader:
    """A reader that gives the same block to all who ask while it holds it.

    Attributes:
        reader: reads what is not held.
    """

    reader: WeightReader
    _stored: dict[RowRange, Mapping[str, Array]] = field(default_factory=dict)
    _blocks: dict[RowRange, _Block] = field(default_factory=dict)

    @property
    def global_scales(self) -> Float32 | None:
        """nvfp4's, one for the matrix or one an expert."""
        return self.reader.global_scales

    @contextlib.contextmanager
    def holding(self, rows: RowRange) -> Iterator[Mapping[str, Array]]:
        """Read a block, hold it while the block of code lasts, and give its stored bits.

        It is dequantized when its values are first asked for.
        """
        self._stored[rows] = self.reader.stored(rows)
        try:
            yield self._stored[rows]
        finally:
            del self._stored[rows]
            self._blocks.pop(rows, None)

    def read(self, rows: RowRange) -> _Block:
        """A block as stored (when quantized), and its values, which others may be given too."""
        if rows not in self._stored:
            return self.reader.read(rows)
        if rows not in self._blocks:
            quantized, block = self.reader.understood(self._stored[rows], rows)
            if block.as_run is not None:
                block = replace(block, as_run=cache(block.as_run))
            self._blocks[rows] = quantized, block
        return self._blocks[rows]
