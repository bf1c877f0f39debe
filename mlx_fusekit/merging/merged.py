"""Merged weights: a module's rows with their update, and the format they are to be brought into."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import QuantizedRows, TargetFormat, to_block, to_matrix
from mlx_fusekit.merging.arithmetic import RowRange, merge, unchanged_rows
from mlx_fusekit.merging.blocks import BlockReader, WeightReader, of_expert, row_blocks
from mlx_fusekit.merging.plan import WeightStep


@dataclass(frozen=True)
class MergedRows:
    """Rows of a merged weight that is to be quantized.

    Attributes:
        values: merged, a float32 block (see :mod:`mlx_fusekit.formats.quantization`); of a whole
            matrix, ``[columns, rows]``.
        base: the base's rows as it stores them, where they are quantized.
        keep: which rows the update does not change, boolean ``[rows]``.
        target: the format to bring them into.
        same_format: whether the base's rows have it already.
    """

    values: Float32
    base: QuantizedRows | None
    keep: npt.NDArray[np.bool_]
    target: TargetFormat
    same_format: bool

    @property
    def unchanged(self) -> bool:
        """Whether the base's rows can stay as they are."""
        return self.same_format and bool(self.keep.all())

    def finished(self, quantized: QuantizedRows) -> QuantizedRows:
        """Quantized rows, but the base's where the update changes nothing.

        Requantizing even an unchanged row would change many of its codes.
        """
        start = self.start()
        if start is not None and self.keep.any():
            return quantized.keeping(start, self.keep)
        return quantized

    def start(self) -> QuantizedRows | None:
        """The base's rows where they have the target's format."""
        return self.base if self.same_format else None


@dataclass(frozen=True)
class Weight:
    """A module's merged weight, to be read by blocks of rows or by whole matrices.

    Attributes:
        step: what is to become of it.
        reader: of the base's weight.
    """

    step: WeightStep
    reader: BlockReader

    @classmethod
    def open(cls, step: WeightStep) -> "Weight":
        """Make a step's weight readable."""
        return cls(step, WeightReader.open(step.sources, step.source_spec))

    @cached_property
    def global_scales(self) -> Float32 | None:
        """nvfp4's, as they will be written: the base's, or larger where merged weights need it.

        A global scale is the largest magnitude of its matrix, so a weight that grew past it would
        be clipped.
        """
        if "global_scale" not in self.step.outputs:
            return None
        assert self.reader.global_scales is not None, "written scales were read"
        scales = self.reader.global_scales.copy()
        if self.step.update is None:
            return scales
        for rows in row_blocks(self.step.shape):
            merged = merge(self.reader.read(rows)[1], self.step.update, rows)
            index = rows.expert if scales.size > 1 else 0
            # Rounding noise of DoRA's norms is no growth.
            if (largest := np.abs(merged).max(initial=0)) > scales[index] * np.float32(1 + 1e-5):
                scales[index] = largest
        return scales

    def values(self, rows: RowRange) -> Float32:
        """Some rows, merged, as a float32 block.

        Raises:
            AdapterError: when they are not finite.
        """
        return self._merged(rows)[1]

    def read(self, rows: RowRange) -> MergedRows:
        """Some rows of a weight that is to be quantized.

        Raises:
            AdapterError: when the merged weights are not finite.
        """
        base, values, keep = self._merged(rows)
        spec = self.step.target_spec
        assert spec is not None, "the target is quantized"
        if base is None:
            values = to_block(to_matrix(values))  # dense ones have one plane
        target = TargetFormat(spec, self.step.dtype, of_expert(self.global_scales, rows.expert))
        same = (
            base is not None
            and self.step.source_spec == spec
            and base.global_scale == target.global_scale
        )
        return MergedRows(values, base, keep, target, same)

    def matrix(self, expert: int = 0) -> MergedRows:
        """One whole matrix, laid out for solvers: its values are ``[columns, rows]``."""
        rows = self.read(RowRange(expert, 0, self.step.shape[1]))
        return replace(rows, values=np.ascontiguousarray(to_matrix(rows.values).T))

    def _merged(
        self, rows: RowRange
    ) -> tuple[QuantizedRows | None, Float32, npt.NDArray[np.bool_]]:
        """Rows as the base stores them, merged, and which of them do not change."""
        base, block = self.reader.read(rows)
        update = self.step.update
        if update is None:
            return base, block.values, np.ones(rows.last - rows.first, bool)
        keep = unchanged_rows(block, update, rows)
        values = block.values if keep.all() else merge(block, update, rows)
        if not np.isfinite(values).all():
            raise AdapterError(
                f"{self.step.module}.weight: merging gives NaN or infinity; "
                "check the adapter's scale and the base's scales"
            )
        return base, values, keep
