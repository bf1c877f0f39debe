"""Updates of one module combined element by element: TIES and DARE.

TIES (Yadav et al. 2023, arXiv 2306.01708) keeps the elements of largest magnitude of each update,
elects the sign of each element by the weighted sum, and takes the weighted mean of the updates that
agree with it. DARE (Yu et al. 2024, arXiv 2311.03099) keeps each element with the probability of
the density, and divides by that. As in mergekit (methods ``ties`` and ``dare_linear``), magnitudes
are compared within one matrix and the sign is that of the weighted sum; DARE's factor is the
paper's. An update that is zero at an element has no part in the mean there.
"""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mlx_fusekit.adapters.combination import Combination
from mlx_fusekit.adapters.matrices import LowRankUpdate, product
from mlx_fusekit.formats.floats import Float32

#: Elements that are looked at at once to find how large the kept ones are.
_BLOCK_ELEMENTS = 1 << 20
#: What Philox gives for one step of its counter, in 32-bit words.
_WORDS_OF_A_STEP = 8


@dataclass(frozen=True, eq=False)
class CombinedUpdate:
    """Updates of one module, to be combined element by element at their full size.

    Attributes:
        parts: LoRA of the same experts, rows and columns, of any ranks.
        weights: of each.
        places: which of all adapters each part is from; what DARE draws depends on it.
        how: the method, which is no sum.
        module: its path, on which depends what DARE draws.
    """

    parts: tuple[LowRankUpdate, ...]
    weights: tuple[float, ...]
    places: tuple[int, ...]
    how: Combination
    module: str
    _found: dict[tuple[int, int], np.float32] = field(default_factory=dict)
    _finding: threading.Lock = field(default_factory=threading.Lock)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(experts, rows, columns)``."""
        experts, rows, _ = self.parts[0].up.shape
        return experts, rows, self.columns

    @property
    def columns(self) -> int:
        """Columns of the module's weight."""
        return self.parts[0].columns

    @property
    def rank(self) -> None:
        """It has no small one."""
        return None

    @property
    def is_zero(self) -> bool:
        """Whether it certainly changes nothing."""
        return all(part.is_zero for part in self.parts)

    def delta(self, expert: int, first: int, last: int) -> Float32:
        """What is added to rows ``first`` to ``last`` of an expert's weight, ``[rows, columns]``.

        It is read-only: a caller asks for the same rows more than once in a row.
        """
        return _delta(self, expert, first, last)

    def blocks(self, expert: int) -> Iterator[tuple[int, int]]:
        """The rows of a matrix, in blocks of bounded size."""
        _, rows, columns = self.shape
        size = max(1, _BLOCK_ELEMENTS // max(columns, 1))
        for first in range(0, rows, size):
            yield first, min(first + size, rows)

    def sparse(self, part: int, expert: int, first: int, last: int) -> Float32:
        """Rows of one part with the elements that stay; the others are zero."""
        values = self._dense(part, expert, first, last)
        if self.how.share >= 1:
            return values
        if self.how.draws:
            values *= self._drawn(part, expert, first, last)
            values /= np.float32(self.how.share)
        else:
            values[np.abs(values) < self._smallest_kept(part, expert)] = 0
        return values

    def _dense(self, part: int, expert: int, first: int, last: int) -> Float32:
        update = self.parts[part]
        return product(update.up[expert, first:last], update.down[expert])

    def _smallest_kept(self, part: int, expert: int) -> np.float32:
        """Magnitude of the smallest element of a part's matrix that stays."""
        with self._finding:
            if (part, expert) not in self._found:
                self._found[part, expert] = self._kth_largest(part, expert)
            return self._found[part, expert]

    def _kth_largest(self, part: int, expert: int) -> np.float32:
        """The exact magnitude at the density's place, by counting: no matrix is held as a whole.

        The bits of floats that are not negative are ordered as the floats are. The upper half of
        the bits is found first, then, among the elements that have it, the lower half.
        """
        _, rows, columns = self.shape
        left, upper = max(1, int(self.how.share * rows * columns)), None
        for _half in range(2):
            counts = np.zeros(1 << 16, np.int64)
            for block in self.blocks(expert):
                bits = np.abs(self._dense(part, expert, *block)).view(np.uint32)
                halves = bits >> 16 if upper is None else bits[bits >> 16 == upper] & 0xFFFF
                counts += np.bincount(halves.ravel(), minlength=1 << 16)
            above = np.cumsum(counts[::-1])[::-1]  # how many are at least as large
            place = int(np.flatnonzero(above >= left)[-1])
            left -= int(above[place] - counts[place])
            if upper is None:
                upper = place
        assert upper is not None
        return np.uint32(upper << 16 | place).view(np.float32)

    def _drawn(self, part: int, expert: int, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Which elements of some rows stay; the same whatever rows are asked for together."""
        columns = self.columns
        name = f"{self.how.seed}/{self.places[part]}/{self.module}/{expert}"
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
        steps = -(-columns // _WORDS_OF_A_STEP)
        random = np.random.Philox(key=key).advance(first * steps)
        words = random.random_raw((last - first) * steps * _WORDS_OF_A_STEP // 2)
        drawn = words.view("<u4").reshape(last - first, -1)[:, :columns]
        kept: npt.NDArray[np.bool_] = drawn < np.uint64(self.how.share * 2**32)
        return kept


# Which rows change, and what becomes of them, is asked for in two steps; in a few threads.
@lru_cache(maxsize=8)
def _delta(update: CombinedUpdate, expert: int, first: int, last: int) -> Float32:
    weighted = [
        update.sparse(part, expert, first, last) * np.float32(weight)
        for part, weight in enumerate(update.weights)
    ]
    result = sum(weighted[1:], start=weighted[0].copy())
    if update.how.elects:
        positive = result >= 0
        result, divisor = np.zeros_like(result), np.zeros_like(result)
        for values, weight in zip(weighted, update.weights, strict=True):
            agree = np.where(positive, values > 0, values < 0)
            np.add(result, values, out=result, where=agree)
            np.add(divisor, np.float32(weight), out=divisor, where=agree)
        np.divide(result, divisor, out=result, where=divisor != 0)
    result.setflags(write=False)
    return result
