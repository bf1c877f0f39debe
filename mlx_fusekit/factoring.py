"""The best low-rank factors of a matrix that is read by blocks of rows, and how much they keep.

Small matrices go through the eigenvalues of their Gram matrix in float64, which is exact to
float32's accuracy. Large ones go through a random sketch with power iterations (Halko, Martinsson
and Tropp 2011, arXiv 0909.4061), which holds no matrix of their size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.floats import Float32

Float64 = npt.NDArray[np.float64]
#: Up to this many rows or columns, whichever are fewer, all singular values are computed.
_EXACT_SIZE = 768
#: What a sketch has beside the rank that is asked for, and how often it goes back and forth.
_OVERSAMPLED = 16
_ITERATIONS = 3
#: Rank with which the search for enough energy begins.
_FIRST_RANK = 32


@dataclass(frozen=True)
class RowBlocks:
    """A matrix.

    Attributes:
        rows: how many.
        columns: how many.
        blocks: gives it anew, float32 ``[some, columns]``, from the first row to the last.
    """

    rows: int
    columns: int
    blocks: Callable[[], Iterator[Float32]]

    @property
    def size(self) -> int:
        """The largest rank it can have."""
        return min(self.rows, self.columns)

    def energy(self) -> float:
        """The sum of its squares."""
        return float(sum(np.square(block, dtype=np.float64).sum() for block in self.blocks()))

    def times(self, right: Float64) -> Float64:
        """``matrix @ right``, ``[rows, n]``."""
        right = right.astype(np.float32)
        return np.concatenate([block @ right for block in self.blocks()]).astype(np.float64)

    def transposed_times(self, left: Float64) -> Float64:
        """``matrix.T @ left``, ``[columns, n]``."""
        out, start, narrow = np.zeros((self.columns, left.shape[1])), 0, left.astype(np.float32)
        for block in self.blocks():
            out += block.T @ narrow[start : start + len(block)]
            start += len(block)
        return out

    def smaller_gram(self) -> Float64:
        """``matrix.T @ matrix`` or ``matrix @ matrix.T``, whichever is smaller."""
        if self.columns <= self.rows:
            # Products of float32 are precise enough for what is no small difference of them.
            out = np.zeros((self.columns, self.columns))
            for block in self.blocks():
                out += block.T @ block
            return out
        whole = np.concatenate([*self.blocks()])
        narrow: Float32 = whole @ whole.T
        return narrow.astype(np.float64)

    def gram(self) -> Float64:
        """``matrix.T @ matrix``, ``[columns, columns]``."""
        out = np.zeros((self.columns, self.columns))
        for block in self.blocks():
            wide = block.astype(np.float64)
            out += wide.T @ wide
        return out


@dataclass(frozen=True, eq=False)
class Factors:
    """``up @ down``, the best approximation of its rank.

    Attributes:
        up: float32 ``[rows, rank]``.
        down: float32 ``[rank, columns]``; both carry the root of each singular value.
        energy: of the whole matrix, the sum of its squares.
        kept: of it, what the factors have, a share; 1 of a matrix of zeros.
    """

    up: Float32
    down: Float32
    energy: float
    kept: float

    @property
    def rank(self) -> int:
        """Columns of ``up``."""
        return int(self.up.shape[1])


def factor(
    matrix: RowBlocks, *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> Factors:
    """The factors of a rank, or of the smallest rank that keeps a share of the energy.

    Args:
        matrix: what to take apart.
        rank: of the factors, at most; None where ``energy`` says it.
        energy: share of the sum of squares to keep, above 0 and at most 1.
        seed: of the sketch.

    Returns:
        Factors, of fewer ranks where the matrix has no more.
    """
    total = matrix.energy()
    if not total:
        nothing = np.zeros((matrix.rows, 0), np.float32), np.zeros((0, matrix.columns), np.float32)
        return Factors(*nothing, 0.0, 1.0)
    wanted = min(rank, matrix.size) if rank is not None else min(_FIRST_RANK, matrix.size)
    while True:
        found = _decomposed(matrix, wanted, seed)
        enough = energy is None or _enough(found[1], energy, total) is not None
        if enough or wanted == matrix.size:
            return _chosen(found, total, matrix.size, rank, energy)
        wanted = min(2 * wanted, matrix.size)


def factor_product(
    up: Float32, down: Float32, *, rank: int | None = None, energy: float | None = None
) -> Factors:
    """As :func:`factor`, of the matrix ``up @ down``, which is never made.

    Args:
        up: ``[rows, n]``.
        down: ``[n, columns]``.
        rank: of the factors, at most.
        energy: share of the sum of squares to keep.
    """
    left, left_triangle = np.linalg.qr(up.astype(np.float64))
    right, right_triangle = np.linalg.qr(down.T.astype(np.float64))
    small_left, values, small_right = np.linalg.svd(left_triangle @ right_triangle.T)
    total = float(np.square(values).sum())
    if not total:
        return Factors(up[:, :0], down[:0], 0.0, 1.0)
    own = len(values)
    found = left @ small_left[:, :own], values, small_right[:own] @ right.T
    return _chosen(found, total, min(len(up), down.shape[1]), rank, energy)


def _chosen(
    found: tuple[Float64, Float64, Float64],
    total: float,
    size: int,
    rank: int | None,
    energy: float | None,
) -> Factors:
    """The factors of as many singular values as were asked for, and are more than rounding."""
    left, values, right = found
    own = len(values) if rank is None else min(rank, len(values))
    if energy is not None:
        own = _enough(values, energy, total) or own
    least = values[0] * np.finfo(np.float32).eps * math.sqrt(size) / 8
    own = min(own, int((values > least).sum()))
    root = np.sqrt(values[:own])
    up = (left[:, :own] * root).astype(np.float32)
    down = (root[:, None] * right[:own]).astype(np.float32)
    return Factors(up, down, total, min(1.0, float(np.square(values[:own]).sum() / total)))


def participation(gram: Float64) -> float:
    """The number of singular directions that take part: ``(sum s^2)^2 / sum s^4``.

    It is 1 of a matrix of rank one and n of n equal singular values.

    Args:
        gram: ``matrix.T @ matrix``, or of the transposed matrix.
    """
    fourth = float(np.square(gram).sum())
    return float(np.trace(gram)) ** 2 / fourth if fourth else 0.0


def _enough(values: Float64, energy: float, total: float) -> int | None:
    """How many singular values keep the energy; None where these do not."""
    # Float32 data have no more digits than to tell this from all of it.
    reached = np.flatnonzero(np.cumsum(np.square(values)) >= min(energy, 1 - 1e-9) * total)
    return int(reached[0]) + 1 if len(reached) else None


def _decomposed(matrix: RowBlocks, rank: int, seed: int) -> tuple[Float64, Float64, Float64]:
    """The leading singular vectors and values: ``[rows, n]``, ``[n]`` falling, ``[n, columns]``."""
    if matrix.size <= _EXACT_SIZE or rank + _OVERSAMPLED >= matrix.size // 2:
        return _exact(matrix)
    random = np.random.default_rng([seed, matrix.rows, matrix.columns])
    left = _orthonormal(matrix.times(random.standard_normal((matrix.columns, rank + _OVERSAMPLED))))
    for _ in range(_ITERATIONS):
        left = _orthonormal(matrix.times(_orthonormal(matrix.transposed_times(left))))
    right, triangle = np.linalg.qr(matrix.transposed_times(left))
    small_left, values, small_right = np.linalg.svd(triangle.T)
    return (
        left @ small_left[:, :rank],
        values[:rank],
        small_right[:rank] @ right.T,
    )


def _exact(matrix: RowBlocks) -> tuple[Float64, Float64, Float64]:
    """All singular vectors and values, from the smaller of the two Gram matrices."""
    if matrix.columns > matrix.rows:
        whole = np.concatenate([*matrix.blocks()]).astype(np.float64)
        squares, vectors = np.linalg.eigh(whole @ whole.T)
        other = vectors.T @ whole
    else:
        squares, vectors = np.linalg.eigh(matrix.gram())
        other = np.concatenate([block.astype(np.float64) @ vectors for block in matrix.blocks()]).T
    values = np.sqrt(np.maximum(squares[::-1], 0))
    vectors, other = vectors[:, ::-1], other[::-1] / np.where(values > 0, values, 1)[:, None]
    if matrix.columns > matrix.rows:
        return vectors, values, other
    return other.T, values, vectors.T


def _orthonormal(matrix: Float64) -> Float64:
    return np.linalg.qr(matrix)[0]
