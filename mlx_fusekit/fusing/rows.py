"""What a model writes of a weight's rows, and of other parameters'."""

from collections.abc import Callable, Mapping

import numpy as np

from mlx_fusekit.checkpoint.writer import FileWriter
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.floats import Array, Float32, from_float32, to_float32
from mlx_fusekit.formats.quantization import QuantizedRows, to_matrix
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.blocks import BlockReader
from mlx_fusekit.merging.merged import Weight
from mlx_fusekit.merging.plan import WeightStep
from mlx_fusekit.requantize.requantizer import RequantizedWeight, Requantizer

Leaves = Mapping[str, Array | None]


class WrittenWeight:
    """A merged weight, written by blocks of rows.

    Args:
        step: what is to become of it.
        writers: of the files that its tensors are in, by leaf.
        requantizer: the strategy, ready to be used.
        base: opens the base's weight, where it is to be read.
    """

    def __init__(
        self,
        step: WeightStep,
        writers: Mapping[str, FileWriter],
        requantizer: Requantizer,
        base: Callable[[], BlockReader],
    ) -> None:
        self._step, self._writers = step, writers
        self._dense: Weight | None = None
        self._quantized: RequantizedWeight | None = None
        if step.target_spec is None:
            self._dense = Weight(step, base())
            return
        self._quantized = requantizer(step, base)
        if (scales := self._quantized.global_scales) is not None:
            self._write("global_scale", 0, scales.reshape(1, -1))

    def write(self, rows: RowRange) -> int:
        """Compute and write one block; the number of bytes written.

        Raises:
            AdapterError: when a merged weight does not fit its stored type.
        """
        first = rows.expert * self._step.shape[1] + rows.first
        leaves = self._leaves(rows).items()
        return sum(
            self._write(leaf, first, stored) for leaf, stored in leaves if stored is not None
        )

    def _write(self, leaf: str, first: int, stored: Array) -> int:
        self._writers[leaf].write_rows(self._step.outputs[leaf].name, first, stored)
        return stored.nbytes

    def _leaves(self, rows: RowRange) -> Leaves:
        module = self._step.module
        if self._dense is not None:
            values = to_matrix(self._dense.values(rows))
            return {"weight": stored_exactly(values, self._step.dtype, f"{module}.weight")}
        assert self._quantized is not None, "it is one or the other"
        found = self._quantized.rows(rows)
        _check_scales(found, module)
        return {"weight": found.codes, "scales": found.scales, "biases": found.biases}


def as_written(stored: Array, source: str, dtype: str, name: str) -> Array:
    """Stored rows of a parameter in the type that they are written in.

    Raises:
        AdapterError: when it cannot hold them.
    """
    if dtype == source:
        return stored
    return stored_exactly(to_float32(stored, source), dtype, name)


def stored_exactly(values: Float32, dtype: str, name: str) -> Array:
    """Round to a stored type; refuse what it cannot hold.

    Raises:
        AdapterError: naming the tensor.
    """
    stored = from_float32(values, dtype)
    if dtype != "F32" and not np.isfinite(to_float32(stored, dtype)).all():
        raise AdapterError(
            f"{name}: a weight of {np.abs(values).max():g} is too large for {dtype}; "
            "use --dequantize --dtype bfloat16 or float32"
        )
    return np.ascontiguousarray(stored)


def _check_scales(quantized: QuantizedRows, module: str) -> None:
    if quantized.biases is None:
        return
    for stored in (quantized.scales, quantized.biases):
        if not np.isfinite(to_float32(stored, quantized.scale_dtype)).all():
            raise AdapterError(
                f"{module}.weight: a merged weight is too large for its {quantized.scale_dtype} "
                "scales; lower the adapter's scale or use --dequantize"
            )
