"""What a re-quantization strategy is made ready from, and what it then is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mlx_fusekit.adapters.sources import Sources
from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import QuantizedRows
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.blocks import BlockReader
from mlx_fusekit.merging.plan import FusePlan, WeightStep
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.requantize.options import CalibrationOptions, CalibrationReport

if TYPE_CHECKING:
    from mlx_fusekit.running.shared import RunningBase
    from mlx_fusekit.writing.work import Work


class RequantizedWeight(Protocol):
    """One module's merged weight in its target format; read by rows, from several threads."""

    @property
    def global_scales(self) -> Float32 | None:
        """nvfp4's, as they will be written; None of other formats."""

    def rows(self, rows: RowRange) -> QuantizedRows:
        """Some rows in the target format; the base's where the update changes nothing."""


class Requantizer(Protocol):
    """A strategy that is ready to be used."""

    def __call__(self, step: WeightStep, base: Callable[[], BlockReader], /) -> RequantizedWeight:
        """The re-quantized weight of a step whose target is quantized.

        Args:
            step: what is to become of the base's weight.
            base: opens that, for a strategy that has not read it before.
        """


@dataclass(frozen=True)
class Request:
    """What a strategy is made ready from.

    Attributes:
        plan: the fuse.
        sources: base and adapters.
        options: of calibrating.
        progress: told of each step that takes long.
        base: in memory, where several fuses have it.
        work: where what is done is kept, and may be from an earlier run.
    """

    plan: FusePlan
    sources: Sources
    options: CalibrationOptions
    progress: StepProgress | None = None
    base: "RunningBase | None" = None
    work: "Work | None" = None


@dataclass(frozen=True)
class Prepared:
    """A strategy made ready.

    Attributes:
        plan: as it was asked for, or with other widths.
        requantizer: gives the rows.
        report: of calibrating, where there was any.
    """

    plan: FusePlan
    requantizer: Requantizer
    report: CalibrationReport | None = None
