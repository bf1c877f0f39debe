"""Cholesky factors of large float32 matrices in their own memory, and solving with them.

LAPACK through NumPy needs copies; of second moments of 28,672 columns each is 3.3 GB. These work on
blocks, so that nearly all is matrix products, and take the small blocks on the diagonal in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.floats import Float32

#: Rows of a block on the diagonal, and of those that are brought up to date by one product.
_BLOCK = 128
_ROWS = 1024


#: Adds products to a part of the sums, in place.
Adding = Callable[[Float32, Float32], None]


def add_here(sums: Float32, products: Float32) -> None:
    """Add what there is here, where there is nothing elsewhere."""
    sums += products


@dataclass(frozen=True)
class Cholesky:
    """``matrix[order][:, order] = unit.T @ diag(pivots) @ unit``.

    Attributes:
        unit: float32 ``[columns, columns]``, upper triangular with ones on its diagonal.
        pivots: float32 ``[columns]``.
        order: of the columns.
    """

    unit: Float32
    pivots: Float32
    order: npt.NDArray[np.intp]

    @classmethod
    def of(cls, matrix: Float32, order: npt.NDArray[np.intp]) -> "Cholesky":
        """Factor a symmetric matrix; one more of its size is allocated.

        Raises:
            LinAlgError: when it is not positive definite, as far as float32 can tell.
        """
        factor = matrix[np.ix_(order, order)]
        columns = len(factor)
        for first in range(0, columns, _BLOCK):
            last = min(first + _BLOCK, columns)
            # Transposed, since NumPy reads the lower triangle, and only the upper one is kept up.
            lower = np.linalg.cholesky(factor[first:last, first:last].T.astype(np.float64))
            factor[first:last, first:last] = lower.T
            factor[last:, first:last] = 0
            panel = factor[first:last, last:]
            panel[:] = np.linalg.inv(lower) @ panel
            for row in range(last, columns, _ROWS):
                done = row + _ROWS
                changed = panel[:, row - last : done - last].T @ panel[:, row - last :]
                factor[row:done, row:] -= changed
        roots = np.diag(factor).copy()
        if not np.isfinite(roots).all():
            raise np.linalg.LinAlgError("not finite")
        factor /= roots[:, None]
        return cls(factor, roots * roots, order)

    def solved(self, wanted: Float32) -> Float32:
        """The ``x`` of ``matrix @ x = wanted``, both ``[columns, rows]``."""
        found, columns = wanted[self.order], len(wanted)
        for first in range(0, columns, _BLOCK):
            last = min(first + _BLOCK, columns)
            found[first:last] = self._inverses[first // _BLOCK].T @ found[first:last]
            for row in range(last, columns, _ROWS):
                done = row + _ROWS
                found[row:done] -= self.unit[first:last, row:done].T @ found[first:last]
        found /= self.pivots[:, None]
        for first in reversed(range(0, columns, _BLOCK)):
            last = min(first + _BLOCK, columns)
            found[first:last] -= self.unit[first:last, last:] @ found[last:]
            found[first:last] = self._inverses[first // _BLOCK] @ found[first:last]
        in_order = np.empty_like(found)
        in_order[self.order] = found
        return in_order

    def squares(self, changes: Float32) -> npt.NDArray[np.float64]:
        """``change @ matrix @ change`` of each of the changes ``[columns, rows]``, ``[rows]``."""
        ordered, sums = changes[self.order], np.zeros(changes.shape[1])
        for first in range(0, len(ordered), _ROWS):
            part = slice(first, first + _ROWS)
            product = self.unit[part, first:] @ ordered[first:]
            sums += np.einsum("c,cr,cr->r", self.pivots[part], product, product, dtype=np.float64)
        return sums

    @cached_property
    def _inverses(self) -> list[Float32]:
        """Of the factor's blocks on the diagonal."""
        parts = [slice(first, first + _BLOCK) for first in range(0, len(self.unit), _BLOCK)]
        blocks = (self.unit[part, part].astype(np.float64) for part in parts)
        return [np.linalg.inv(block).astype(np.float32) for block in blocks]


def add_products(sums: Float32, inputs: Float32, add: Adding = add_here) -> None:
    """Add ``inputs.T @ inputs`` to sums ``[columns, columns]``; the upper triangle counts."""
    for first in range(0, len(sums), _ROWS):
        part = slice(first, first + _ROWS)
        add(sums[part, first:], inputs[:, part].T @ inputs[:, first:])


def add_cross_products(
    sums: Float32, left: Float32, right: Float32, add: Adding = add_here
) -> None:
    """Add ``left.T @ right``, of inputs ``[tokens, ...]``, to sums."""
    for first in range(0, len(sums), _ROWS):
        part = slice(first, first + _ROWS)
        add(sums[part], left[:, part].T @ right)


def make_symmetric(matrix: Float32) -> None:
    """Copy the upper triangle into the lower one."""
    for first in range(0, len(matrix), _ROWS):
        part = slice(first, first + _ROWS)
        square = matrix[part, part]
        square[:] = np.triu(square) + np.triu(square, 1).T
        matrix[part.stop :, part] = matrix[part, part.stop :].T
