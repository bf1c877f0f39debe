"""An adapter's numbers: float32, and finite."""

import math

import numpy as np

from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.floats import FLOAT_DTYPES, Array, Float32, to_float32

_FULL_READ_BYTES = 16 << 20


def read_finite(tensor: TensorRef) -> Float32:
    """A tensor's values.

    Raises:
        AdapterError: for what is no float, NaN or infinity.
    """
    _check_type(tensor)
    return _finite(tensor, tensor.read())


def check_finite(tensor: TensorRef) -> None:
    """Look at a tensor's values, a few megabytes at a time.

    Raises:
        AdapterError: for what is no float, NaN or infinity.
    """
    _check_type(tensor)
    if not tensor.shape:
        return
    rows = math.prod(tensor.shape[:-1])
    step = max(1, _FULL_READ_BYTES // max(4 * tensor.shape[-1], 1))
    for first in range(0, rows, step):
        _finite(tensor, tensor.read_rows(first, min(first + step, rows)))


def _check_type(tensor: TensorRef) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise AdapterError(
            f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}; floats are expected"
        )


def _finite(tensor: TensorRef, stored: Array) -> Float32:
    values = to_float32(stored, tensor.dtype)
    if not np.isfinite(values).all():
        raise AdapterError(
            f"{tensor.file}: {tensor.name} holds NaN or infinity; the training diverged, "
            "use an earlier checkpoint"
        )
    return values
