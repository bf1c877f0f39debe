"""The merged weights of modules that have the same inputs, solved some rows at a time.

Rows do not depend on each other. A part is of one format, and may go over the bounds between
modules: small matrices are solved together, large ones in several parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.formats.quantization import QuantizedRows, TargetFormat, stacked
from mlx_fusekit.merging.merged import MergedRows
from mlx_fusekit.requantize.moments import Drift, compensated
from mlx_fusekit.requantize.packing import packed, unpacked
from mlx_fusekit.requantize.ranks import Ranks
from mlx_fusekit.requantize.solver import Moments, Solution, solve

#: Weights solved at once, at most; and at least, where there are as many, since a column is a step.
SOLVED_ELEMENTS = 1 << 24
LEAST_ELEMENTS = 1 << 20
#: In so many parts larger ones are cut, for as many ranks.
SHARES = 4


@dataclass(frozen=True)
class _Span:
    """Some rows of one of the matrices; ``place`` is that of the first among all rows."""

    matrix: int
    first: int
    last: int
    place: int


@dataclass(frozen=True)
class SolvedGroup:
    """Solved matrices.

    Attributes:
        matrices: as they are stored.
        error: squared change of their outputs, in units of the mean second moment.
        nearest_error: the same for rounding to nearest.
    """

    matrices: list[QuantizedRows]
    error: float
    nearest_error: float


def solve_group(
    matrices: Sequence[MergedRows],
    moments: Moments,
    drift: Drift | None = None,
    ranks: Ranks | None = None,
    shares: int = SHARES,
) -> SolvedGroup:
    """Solve matrices ``[columns, rows]`` that have the same inputs.

    Args:
        matrices: merged.
        moments: of their inputs.
        drift: of their inputs; None where they are the teacher's.
        ranks: that each solve some of the rows; None to solve all here.
        shares: in how many parts they are cut at least, where they are large.
    """
    found: list[list[QuantizedRows]] = [[] for _ in matrices]
    error = nearest_error = 0.0
    parts = list(_parts(matrices, shares))
    mine, count = (0, 1) if ranks is None else (ranks.number, ranks.count)
    own = [_solve(matrices, spans, moments, drift) for spans in parts[mine::count]]
    for spans, solution in zip(parts, of_all_ranks(own, ranks), strict=True):
        error, nearest_error = error + solution.error, nearest_error + solution.nearest_error
        done = 0
        for span in spans:
            rows = span.last - span.first
            found[span.matrix].append(solution.quantized.part(done, done + rows))
            done += rows
    finished = [m.finished(stacked(own)) for m, own in zip(matrices, found, strict=True)]
    return SolvedGroup(finished, error, nearest_error)


def of_all_ranks(own: Sequence[Solution], ranks: Ranks | None) -> list[Solution]:
    """Solutions in their order, which the ranks have found in turn.

    Args:
        own: of this rank, its every ``ranks.count``-th.
        ranks: None where this one has found all.
    """
    if ranks is None or ranks.count == 1:
        return list(own)
    blobs = ranks.gathered(packed([(s.quantized, s.error, s.nearest_error) for s in own]))
    by_rank = [[Solution(*fields) for fields in unpacked(blob)] for blob in blobs]
    return ranks.in_order(by_rank)


def _parts(matrices: Sequence[MergedRows], shares: int) -> Iterator[list[_Span]]:
    """All rows, those of one format after each other, cut into parts.

    The same ones for any number of ranks: where a part ends decides how sums are rounded.
    """
    by_format: dict[tuple[TargetFormat, bool], list[_Span]] = {}
    place = 0
    for number, matrix in enumerate(matrices):
        columns, rows = matrix.values.shape
        members = by_format.setdefault((matrix.target, matrix.same_format), [])
        members.append(_Span(number, 0, rows, place))
        place += rows
    for members in by_format.values():
        rows = sum(span.last - span.first for span in members)
        share = max(-(-rows // shares), LEAST_ELEMENTS // columns)
        yield from _cut(members, max(1, min(SOLVED_ELEMENTS // columns, share)))


def _cut(members: Sequence[_Span], size: int) -> Iterator[list[_Span]]:
    part: list[_Span] = []
    free = size
    for span in members:
        first = span.first
        while first < span.last:
            last = min(first + free, span.last)
            part.append(_Span(span.matrix, first, last, span.place + first - span.first))
            first, free = last, free - (last - first)
            if not free:
                yield part
                part, free = [], size
    if part:
        yield part


def _solve(
    matrices: Sequence[MergedRows], spans: Sequence[_Span], moments: Moments, drift: Drift | None
) -> Solution:
    own = [matrices[span.matrix] for span in spans]
    merged = _beside([m.values[:, s.first : s.last] for m, s in zip(own, spans, strict=True)])
    wanted = merged
    if drift is not None:
        places = [slice(s.place, s.place + s.last - s.first) for s in spans]
        wanted = compensated(merged, places, drift, moments)
    starts = [(m.start(), s) for m, s in zip(own, spans, strict=True)]
    same = [start.part(span.first, span.last) for start, span in starts if start is not None]
    return solve(wanted, merged, moments, own[0].target, stacked(same) if same else None)


def _beside(parts: Sequence[Float32]) -> Float32:
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))
