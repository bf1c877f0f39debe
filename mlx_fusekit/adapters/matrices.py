"""LoRA and DoRA of one module: two thin matrices, and their product."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlx_fusekit.formats.floats import Float32

# OpenBLAS starts threads for products above this many multiplications. Row blocks are already
# spread over the cores, and threads inside threads are several times slower.
_SINGLE_THREADED_PRODUCT = 262_144


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """LoRA, and DoRA when there is a magnitude: weight + up @ down, rows then scaled to a norm.

    Attributes:
        up: float32 ``[experts, rows, rank]``, the adapter's scale already multiplied in.
        down: float32 ``[experts, rank, columns]``.
        magnitude: DoRA's learned row norms, float32 ``[rows]``, or None for LoRA.

    A plain linear or embedding counts as one expert.
    """

    up: Float32
    down: Float32
    magnitude: Float32 | None = None

    @property
    def rank(self) -> int:
        """Rank of the update of each expert."""
        return int(self.down.shape[1])

    @property
    def columns(self) -> int:
        """Columns of the module's weight."""
        return int(self.down.shape[2])

    @cached_property
    def delta_norm(self) -> float:
        """Frobenius norm of ``up @ down``, from rank-sized products only."""
        up_gram = np.einsum("eor,eos->ers", self.up, self.up, dtype=np.float64)
        down_gram = np.einsum("eri,esi->ers", self.down, self.down, dtype=np.float64)
        return float(np.sqrt(max((up_gram * down_gram).sum(), 0.0)))

    @cached_property
    def is_zero(self) -> bool:
        """Whether it certainly changes nothing (DoRA's rows may still be rescaled)."""
        return self.magnitude is None and not (self.up.any() and self.down.any())


def product(up: Float32, down: Float32) -> Float32:
    """``up @ down`` without threads of the BLAS library.

    Args:
        up: ``[rows, rank]``.
        down: ``[..., rank, columns]``.

    Returns:
        ``[..., rows, columns]``.
    """
    out = np.empty((*down.shape[:-2], len(up), down.shape[-1]), np.float32)
    slab = max(1, _SINGLE_THREADED_PRODUCT // max(down.shape[-2] * down.shape[-1], 1))
    # Accelerate raises floating-point flags for finite products; the caller checks the result.
    with np.errstate(all="ignore"):
        for start in range(0, len(up), slab):
            rows = np.s_[..., start : start + slab, :]
            np.matmul(up[start : start + slab], down, out=out[rows])
    return out
