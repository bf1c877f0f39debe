"""What a tensor of a GGUF file is made from."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.floats import Float32


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file to be written, and the stored tensor it comes from.

    It comes from ``values`` instead where it is computed from the configuration, as the factors of
    scaled rotary embeddings are.

    Attributes:
        name: in the GGUF file, as ``blk.0.attn_q.weight``.
        source: name of the stored tensor, as ``model.layers.0.self_attn.q_proj.weight``. Where its
            module is quantized, scales and biases lie beside it. Empty where ``values`` are given.
        shape: in the file, slowest dimension first (numpy's order; GGUF writes it reversed).
        rows: which rows of the source it takes, and in which order; None for all as they are. Rows
            are all dimensions but the last, flattened (an expert stack ``[experts, rows, columns]``
            has ``experts * rows``).
        columns: which of the stored columns, and in which order; None for all as they are.
        transform: of the whole tensor's values as float32 into others, after ``columns``.
        float32: whether llama.cpp needs it as F32 whatever the type of the others.
        values: float32 ``shape``, of a tensor that is not stored.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    rows: npt.NDArray[np.int64] | None = None
    columns: npt.NDArray[np.int64] | None = None
    transform: Callable[[Float32], Float32] | None = None
    float32: bool = False
    values: Float32 | None = None

    @property
    def has_stored_rows(self) -> bool:
        """Whether each of its rows is a stored one, so that quantized ones can be repacked."""
        return self.columns is None and self.transform is None

    def of_rows(self, values: Float32) -> Float32:
        """Its values, from those of its rows."""
        if self.columns is not None:
            values = np.take(values, self.columns, axis=-1)
        if self.transform is not None:
            values = self.transform(values)
        return values.reshape(self.shape)
