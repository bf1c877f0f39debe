"""What a re-quantization strategy is, and the simplest one."""

from typing import Protocol

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import QuantizedRows, TargetFormat, quantize_nearest
from mlx_fusekit.merging.arithmetic import RowRange


class Requantizer(Protocol):
    """Brings blocks of merged weights into a quantized format; called from several threads."""

    def __call__(
        self,
        module: str,
        rows: RowRange,
        merged: Float32,
        base: QuantizedRows,
        target: TargetFormat,
    ) -> QuantizedRows:
        """Quantize a block of merged weights.

        Args:
            module: path of the module, for what a strategy knows of it.
            rows: which of its rows these are.
            merged: a float32 block (see :mod:`mlx_fusekit.formats.quantization`), which may be
                overwritten.
            base: the same rows of the base, in the base's format.
            target: the format to return.
        """


class Nearest:
    """Round to nearest on a fresh min-max grid: what ``mlx_lm.fuse`` does."""

    def __call__(
        self,
        module: str,
        rows: RowRange,
        merged: Float32,
        base: QuantizedRows,
        target: TargetFormat,
    ) -> QuantizedRows:
        """Quantize without looking at anything but the merged weights."""
        return quantize_nearest(merged, target.spec, target.scale_dtype, target.global_scale)
