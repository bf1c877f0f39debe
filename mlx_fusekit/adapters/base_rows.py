"""Single rows of a base's weight, as numbers."""

from collections.abc import Sequence

import numpy as np

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.formats.floats import Array, Float32, to_float32
from mlx_fusekit.formats.quantization import QuantizedRows, dequantize, to_matrix


def base_rows(base: BaseModel, module: str, rows: Sequence[int]) -> Float32:
    """Rows of a matrix, float32 ``[rows, columns]``, exact."""
    held = base.tensors[f"{module}.weight"].held()

    def chosen(leaf: str) -> Array:
        tensor = held if leaf == "weight" else base.tensors[f"{module}.{leaf}"].held()
        return np.concatenate([tensor.read_rows(row, row + 1) for row in rows])

    spec = base.quantization(module)
    if spec is None:
        return to_float32(chosen("weight"), held.dtype)
    scale = base.tensors.get(f"{module}.global_scale")
    quantized = QuantizedRows(
        chosen("weight").view(np.uint32),
        chosen("scales"),
        chosen("biases") if spec.affine else None,
        base.tensors[f"{module}.scales"].dtype,
        float(scale.held().read_rows(0, 1).reshape(-1)[0]) if scale is not None else None,
    )
    return to_matrix(dequantize(quantized, spec))
