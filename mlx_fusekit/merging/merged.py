"""The matrices that are re-quantized: merged from base and update, whole, columns first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import QuantizedRows, TargetFormat, to_matrix
from mlx_fusekit.fusing.execute import grown_global_scales, merged_block, with_rows_kept
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.blocks import WeightReader, of_expert
from mlx_fusekit.merging.plan import WeightStep


@dataclass(frozen=True)
class Matrix:
    """One matrix to be solved: a module's, or one of its experts'.

    Attributes:
        merged: ``[columns, rows]``.
        base: the base's rows.
        keep: which rows the update does not change.
    """

    step: WeightStep
    merged: Float32
    base: QuantizedRows
    keep: np.ndarray[tuple[int], np.dtype[np.bool_]]
    target: TargetFormat

    @property
    def base_serves(self) -> bool:
        """Whether the base's rows have the target's format."""
        return (
            self.step.source_spec == self.step.target_spec
            and self.base.global_scale == self.target.global_scale
        )

    def finished(self, solved: QuantizedRows) -> QuantizedRows:
        """The solved rows, but the base's where the update changes nothing."""
        if self.base_serves and self.keep.any():
            return with_rows_kept(solved, self.base, self.keep)
        return solved


@dataclass(frozen=True)
class Weight:
    """A module's weight, to be read matrix by matrix.

    Attributes:
        global_scales: nvfp4's, as they will be written.
    """

    step: WeightStep
    reader: WeightReader
    global_scales: Float32 | None

    @classmethod
    def open(cls, step: WeightStep) -> "Weight":
        """Make a step's weight readable."""
        reader = WeightReader.open(step.sources, step.source_spec)
        scales = grown_global_scales(step, reader) if "global_scale" in step.outputs else None
        return cls(step, reader, scales)

    def matrix(self, expert: int = 0) -> Matrix:
        """Read and merge one matrix; all of it is held in memory."""
        step = self.step
        base, block, keep = merged_block(step, self.reader, RowRange(expert, 0, step.shape[1]))
        assert base is not None, "only quantized weights are re-quantized"
        assert step.target_spec is not None, "likewise"
        target = TargetFormat(step.target_spec, step.dtype, of_expert(self.global_scales, expert))
        return Matrix(step, np.ascontiguousarray(to_matrix(block).T), base, keep, target)


def part_of(rows: QuantizedRows, first: int, last: int) -> QuantizedRows:
    """Rows ``first`` to ``last`` (exclusive)."""
    biases = None if rows.biases is None else rows.biases[first:last]
    return replace(
        rows, codes=rows.codes[first:last], scales=rows.scales[first:last], biases=biases
    )


def stacked(parts: Sequence[QuantizedRows]) -> QuantizedRows:
    """Rows below each other."""
    if len(parts) == 1:
        return parts[0]
    biases = [part.biases for part in parts if part.biases is not None]
    return replace(
        parts[0],
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        biases=np.concatenate(biases) if biases else None,
    )
