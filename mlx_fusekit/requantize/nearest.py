"""Round to nearest on a fresh min-max grid: what ``mlx_lm.fuse`` does."""

from collections.abc import Callable
from dataclasses import dataclass

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import QuantizedRows, quantize_nearest
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.blocks import BlockReader
from mlx_fusekit.merging.merged import Weight
from mlx_fusekit.merging.plan import WeightStep
from mlx_fusekit.requantize.requantizer import Prepared, Request


@dataclass(frozen=True)
class NearestWeight:
    """A merged weight, rounded as it is asked for."""

    weight: Weight

    @property
    def global_scales(self) -> Float32 | None:
        """nvfp4's, as they will be written."""
        return self.weight.global_scales

    def rows(self, rows: RowRange) -> QuantizedRows:
        """Some rows, without looking at anything but the merged weights."""
        merged = self.weight.read(rows)
        if merged.unchanged and merged.base is not None:
            return merged.base
        target = merged.target
        # Without a change they are the base's, which others may be given too.
        values = merged.values.copy() if merged.keep.all() else merged.values
        return merged.finished(
            quantize_nearest(values, target.spec, target.scale_dtype, target.global_scale)
        )


def nearest(step: WeightStep, base: Callable[[], BlockReader] | None = None) -> NearestWeight:
    """A :class:`~mlx_fusekit.requantize.requantizer.Requantizer`."""
    return NearestWeight(Weight.open(step) if base is None else Weight(step, base()))


def prepare(request: Request) -> Prepared:
    """There is nothing to make ready."""
    return Prepared(request.plan, nearest)
