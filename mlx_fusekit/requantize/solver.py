"""Quantized weights whose layer output, not whose values, are closest to the merged weights'.

For a row ``w`` of a layer's weight and the second moments ``H`` of its inputs, the squared change
of that output is ``(q - w) H (q - w)``. Each row of ``q`` is a point of a lattice box, so this is a
closest-vector problem. Two steps, each in blocks of columns so that most of the work is matrix
products:

* error feedback: columns are rounded one after the other, each error being made good by the columns
  still to come. It is GPTQ (Frantar et al. 2022, arXiv 2210.17323), in the form of Babai's nearest
  plane on the Cholesky factor of ``H`` itself (Chen et al. 2025, arXiv 2507.18553), which needs no
  inverse;
* coordinate descent: each column in turn goes to the best point given all the others, until a pass
  gains no more.

Weights here are ``[columns, rows]`` (see :mod:`mlx_fusekit.requantize.grids`).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import QuantizedRows, TargetFormat
from mlx_fusekit.requantize.cholesky import Cholesky, make_symmetric
from mlx_fusekit.requantize.grids import Grid, fitted_grid, grid_of, nearest_of, values_of

#: Share of the mean second moment added to all of them: directions that the calibration text does
#: not show still count.
DAMPING = 0.01
#: Damping is larger by this, times columns over tokens: of few tokens, the moments of other text
#: differ, and errors must not be pushed to where only this text has nothing.
SHRINKAGE = 0.3
#: Columns whose steps are carried over to the other columns by one matrix product.
_BLOCK = 64
_SUB_BLOCK = 16
#: Coordinate descent ends when a pass gains less than this share of the error, or after as many.
_SMALLEST_GAIN = 0.003
_MOST_PASSES = 12
#: A mean second moment at or below this is numerical dust.
_SMALLEST_MOMENT = 1e-30


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs, made ready for solving.

    Attributes:
        matrix: float32 ``[columns, columns]``, damped, with a mean diagonal of 1.
        factor: of the matrix, its columns from the smallest second moment to the largest.
        scale: what the sums were multiplied by, 1 over their mean diagonal.
    """

    matrix: Float32
    factor: Cholesky
    scale: float

    @classmethod
    def prepared(
        cls, second_moments: Float32, damping: float = DAMPING, tokens: int | None = None
    ) -> "Moments":
        """Damp and factor second moments ``[columns, columns]``.

        Those that say nothing, being all zeros, too small for float32 or not finite, count as the
        identity.

        Args:
            second_moments: sums over tokens, of which the upper triangle counts; overwritten, and
                used from then on.
            damping: share of the mean second moment added to all.
            tokens: how many there were; the fewer, the more is added.
        """
        columns = len(second_moments)
        if tokens is not None:
            damping += SHRINKAGE * columns / max(tokens, 1)
        matrix = second_moments
        make_symmetric(matrix)
        scale = float(np.trace(matrix)) / columns
        if not scale > _SMALLEST_MOMENT or not np.isfinite(matrix).all():
            identity = np.eye(columns, dtype=np.float32)
            return cls(identity, Cholesky.of(identity, np.arange(columns)), 1.0)
        matrix *= np.float32(1 / scale)
        own = np.diag(matrix).copy()
        while True:
            np.fill_diagonal(matrix, own + np.float32(damping))
            order = np.argsort(np.diag(matrix), kind="stable")
            try:
                return cls(matrix, Cholesky.of(matrix, order), 1 / scale)
            except np.linalg.LinAlgError:
                damping *= 10

    def errors(self, values: Float32, target: Float32) -> npt.NDArray[np.float64]:
        """Squared change of each row's output, ``[rows]``."""
        return self.factor.squares(values - target)


@dataclass(frozen=True)
class Solution:
    """Quantized rows, and how far their output is from the target's.

    Attributes:
        quantized: as stored.
        error: sum over rows of the squared change of the output, in units of the mean moment.
        nearest_error: the same for rounding to nearest.
    """

    quantized: QuantizedRows
    error: float
    nearest_error: float


def solve(
    target: Float32,
    merged: Float32,
    moments: Moments,
    format_: TargetFormat,
    base: QuantizedRows | None = None,
) -> Solution:
    """Quantize so that the layer's output changes least.

    Args:
        target: the weights whose output is wanted, float32 ``[columns, rows]``. They are the merged
            weights, or those changed to make good what earlier layers do to this one's inputs.
        merged: the merged weights.
        moments: of the layer's inputs.
        format_: to quantize to.
        base: the base's rows where they have the same format: a start, and where the update is far
            smaller than the grid's steps, often a good one.

    Returns:
        For each row the best found; never worse than ``merged`` rounded to nearest.
    """
    nearest = nearest_of(merged, format_)
    grid = fitted_grid(target, np.diag(moments.matrix), format_)
    values, errors = _with_error_feedback(target, moments, grid)
    nearest_error = 0.0
    for start in [nearest] if base is None else [nearest, base]:
        start_values = values_of(start, format_.spec)
        start_errors = moments.errors(start_values, target)
        if start is nearest:
            nearest_error = float(start_errors.sum())
        if (better := start_errors < errors).any():
            values = np.where(better, start_values, values)
            errors = np.where(better, start_errors, errors)
            grid = grid.mixed(grid_of(start, format_.spec), better)
    error = _descend(values, target, moments, grid, float(errors.sum()))
    return Solution(grid.quantized(values), error, nearest_error)


def _with_error_feedback(
    target: Float32, moments: Moments, grid: Grid
) -> tuple[Float32, npt.NDArray[np.float64]]:
    """Round column by column, each error fed to the columns still to come.

    The column with the largest second moment is the first, while there is most to make its error
    good with.

    Returns:
        The values, and the squared change of each row's output: by the factor it is the sum of what
        each rounding made, times its pivot.
    """
    columns = len(target)
    group_size = columns // grid.groups
    weights, order = moments.factor.unit, moments.factor.order
    ordered = target[order]
    wanted, values = ordered.copy(), np.empty_like(target)
    squares = np.zeros(target.shape[1])
    for last in range(columns, 0, -_BLOCK):
        first = max(0, last - _BLOCK)
        errors = np.empty((last - first, target.shape[1]), np.float32)
        for place in range(last - 1, first - 1, -1):
            column = order[place]
            values[column] = grid.nearest(wanted[place], column // group_size)
            rounded = values[column] - wanted[place]
            squares += moments.factor.pivots[place] * rounded * rounded
            error = np.subtract(values[column], ordered[place], out=errors[place - first])
            # Near columns at once, the others of the block when the sub-block is done.
            near = max(first, (place - first) // _SUB_BLOCK * _SUB_BLOCK + first)
            if near < place:
                wanted[near:place] -= weights[near:place, place, None] * error
            elif first < near:
                done = min(near + _SUB_BLOCK, last)
                wanted[first:near] -= (
                    weights[first:near, near:done] @ errors[near - first : done - first]
                )
        if first:
            wanted[:first] -= weights[:first, first:last] @ errors
    return values, squares


def _descend(values: Float32, target: Float32, moments: Moments, grid: Grid, error: float) -> float:
    """Coordinate descent on ``values``, in place, from their error; what is left of it."""
    change = values - target
    for _ in range(_MOST_PASSES):
        gain = _descend_once(values, change, target, moments.matrix, grid)
        error = max(error - gain, 0.0)
        if gain <= _SMALLEST_GAIN * error:
            break
    return error


def _descend_once(
    values: Float32, change: Float32, target: Float32, matrix: Float32, grid: Grid
) -> float:
    """One pass over all columns; the error it gained.

    Args:
        values: on the grid; brought up to date, as is ``change``.
        change: ``values - target``.
        target: the weights whose output is wanted.
        matrix: the second moments.
        grid: of the values.
    """
    columns = len(values)
    group_size = columns // grid.groups
    diagonal = np.diag(matrix)
    gain = 0.0
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        # Half the derivative of the error by these columns' values.
        slope = matrix[first:last] @ change
        for near in range(first, last, _SUB_BLOCK):
            done = min(near + _SUB_BLOCK, last)
            steps = np.empty((done - near, values.shape[1]), np.float32)
            for column in range(near, done):
                here = slope[column - first]
                best = values[column] - here * np.float32(1 / diagonal[column])
                best = grid.nearest(best, column // group_size)
                step = np.subtract(best, values[column], out=steps[column - near])
                # error(step) = 2 * slope * step + diagonal * step ** 2
                gain -= 2 * float(here @ step) + float(diagonal[column]) * float(step @ step)
                values[column] = best
                np.subtract(best, target[column], out=change[column])
                if column + 1 < done:
                    ahead = slice(column + 1 - first, done - first)
                    slope[ahead] += matrix[column + 1 : done, column, None] * step
            if done < last:
                slope[done - first :] += matrix[done:last, near:done] @ steps
    return gain
