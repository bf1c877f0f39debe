"""What a checkpoint or adapter of the benchmarks is made of."""

import math
from dataclasses import dataclass

_ITEM_BYTES = {"U32": 4, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: its name, safetensors dtype and shape, and what its values are of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    seed: str = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]
