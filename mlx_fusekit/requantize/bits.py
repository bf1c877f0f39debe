"""MLX's arrays as NumPy's, also of types that NumPy lacks."""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

#: By its name, a type of hidden states and the one with as many bits that NumPy has.
_TYPES = {
    str(kind): (kind, bits, own)
    for kind, bits, own in (
        (mx.float32, mx.float32, np.float32),
        (mx.float16, mx.float16, np.float16),
        (mx.bfloat16, mx.uint16, np.uint16),
    )
}


def type_of_bits(kind: str) -> npt.DTypeLike:
    """NumPy's type for the bits of MLX's type of this name."""
    return _TYPES[kind][2]


def bits_of(array: mx.array) -> npt.NDArray[Any]:
    """The bits of an array; for its type see :func:`type_of_bits`."""
    return np.array(array.view(_TYPES[str(array.dtype)][1]))


def array_of(bits: npt.NDArray[Any], kind: str) -> mx.array:
    """The array of these bits, of MLX's type of this name."""
    return mx.array(bits).view(_TYPES[kind][0])
