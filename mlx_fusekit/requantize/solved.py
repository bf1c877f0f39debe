"""Re-quantized weights that were solved, and what became of each module."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import QuantizedRows
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.plan import WeightStep


@dataclass(frozen=True)
class ModuleResult:
    """What became of one module.

    Attributes:
        error: squared change of its outputs, over that of rounding to nearest; 1 where nothing
            could be gained.
        tokens: whose inputs were seen; 0 where the module was never called.
        skipped: tokens left out because their inputs were not finite.
    """

    error: float
    tokens: int
    skipped: int


@dataclass
class SolvedWeights:
    """Re-quantized weights of all merged modules; a :class:`Requantizer` that hands them out.

    Attributes:
        experts: by module path, of each expert; a plain matrix counts as one.
        results: by module path.
    """

    experts: dict[str, Sequence[QuantizedRows]] = field(default_factory=dict)
    results: dict[str, ModuleResult] = field(default_factory=dict)

    def __call__(self, step: WeightStep, _: object = None) -> "SolvedWeight":
        """The solved weight of a step."""
        return SolvedWeight(step, self.experts[step.module])


@dataclass(frozen=True)
class SolvedWeight:
    """The solved rows of one module; nothing is read or merged again."""

    step: WeightStep
    experts: Sequence[QuantizedRows]

    @property
    def global_scales(self) -> Float32 | None:
        """nvfp4's, of each expert, or the one of them all."""
        output = self.step.outputs.get("global_scale")
        if output is None:
            return None
        scales = [rows.global_scale for rows in self.experts[: math.prod(output.shape)]]
        return np.array(scales, np.float32)

    def rows(self, rows: RowRange) -> QuantizedRows:
        """Some rows of an expert."""
        return self.experts[rows.expert].part(rows.first, rows.last)
