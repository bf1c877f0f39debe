"""The ranks of ``mlx.launch`` that calibrate together: sums and bytes that go round among them.

Each has its share of the text, and solves its share of the rows. Before anything is exchanged, all
tell whether they are well, so that the failure of one ends all; a rank that is gone is noticed by
the connection.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_fusekit import launched
from mlx_fusekit.errors import FusekitError

T = TypeVar("T")

#: In so many shares the text is summed, if they can be dealt out evenly: sums of the same shares
#: in the same order are the same, whoever has which.
_SHARES = 4
#: Of an array that is summed, elements that go round at once.
_AT_ONCE = 1 << 22


class Ranks:
    """All ranks, seen from one of them; where it is alone, nothing goes round.

    Attributes:
        number: this rank's, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        self._group = launched.group()
        self.number, self.count = launched.ranks()
        gpu_only = launched.backend() == "nccl"
        self._stream: Any = mx.gpu if gpu_only else mx.cpu

    @property
    def first(self) -> bool:
        """Whether this one decides and writes for all."""
        return self.number == 0

    def share(self, items: Sequence[T], what: str) -> Sequence[T]:
        """This rank's part of what is to be done.

        Raises:
            FusekitError: where there is nothing for some rank.
        """
        if len(items) < self.count and self.count > 1:
            # No reason to round instead: the user can mend it.
            raise FusekitError(
                f"mlx.launch: {len(items)} {what} are too few for {self.count} ranks; start "
                "fewer, or give more --calibration-tokens"
            )
        return items[self.number :: self.count]

    def in_order(self, by_rank: Sequence[Sequence[T]]) -> list[T]:
        """What :meth:`share` dealt out, in its order again."""
        count = sum(map(len, by_rank))
        turns = (divmod(place, self.count) for place in range(count))
        return [by_rank[rank][turn] for turn, rank in turns]

    @property
    def turns(self) -> int:
        """In how many shares each rank sums its part of the text, one after the other."""
        return _SHARES // self.count if _SHARES % self.count == 0 else 1

    def places(self, turn: int, count: int) -> range:
        """Places of a share's batches among those that this rank has."""
        return range(turn, count, self.turns)

    def add_in_order(self, total: npt.NDArray[Any], own: npt.NDArray[Any]) -> None:
        """Add arrays of all ranks to the sums that each of them has, in the order of the ranks."""
        if self._group is None:
            total += own
            return
        self._check()
        rows = max(1, _AT_ONCE // max(total[0].size, 1))
        for first in range(0, len(total), rows):
            part = slice(first, first + rows)
            nothing = np.zeros_like(own[part])
            for number in range(self.count):
                # A sum with zeros is no rounding.
                total[part] += self._summed(own[part] if number == self.number else nothing)

    def add_up(self, array: npt.NDArray[Any]) -> None:
        """Sum whole numbers over all ranks, in place."""
        if self._group is not None:
            self._check()
            array[:] = self._summed(array)

    def total(self, *numbers: int) -> list[int]:
        """Sums of numbers over all ranks."""
        sums = np.array(numbers, np.int32)
        self.add_up(sums)
        return [int(number) for number in sums]

    def all_of(self, number: int) -> list[int]:
        """A number of every rank, in their order."""
        found = np.zeros(self.count, np.int32)
        found[self.number] = number
        self.add_up(found)
        return [int(one) for one in found]

    def gathered(self, own: bytes) -> list[bytes]:
        """Bytes of every rank, in their order."""
        if self._group is None:
            return [own]
        self._check()
        lengths = np.zeros(self.count, np.int32)
        lengths[self.number] = len(own)
        lengths = self._summed(lengths)
        found, at = np.zeros(int(lengths.sum()), np.uint8), int(lengths[: self.number].sum())
        found[at : at + len(own)] = np.frombuffer(own, np.uint8)
        # What the others have is zero here.
        joined = self._summed(found).tobytes() if found.size else b""
        ends = np.cumsum(lengths)
        return [joined[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def decided(self, make: Callable[[], Any]) -> Any:
        """What the first rank makes of JSON, on all of them."""
        if self._group is None:
            return make()
        own = json.dumps(make()).encode() if self.first else b""
        return json.loads(self.gathered(own)[0])

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the others of an error in the block, which ends them at their next exchange."""
        try:
            yield
        except (launched.FailedElsewhereError, launched.LostRankError, KeyboardInterrupt):
            raise
        except BaseException:
            if self._group is not None:
                with contextlib.suppress(launched.LostRankError):
                    self._failed(own=True)
            raise

    def _check(self) -> None:
        if self._failed(own=False):
            raise launched.FailedElsewhereError("another rank failed, and says why")

    def _failed(self, *, own: bool) -> bool:
        return bool(self._summed(np.array([own], np.int32))[0])

    def _summed(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        with launched.in_contact():
            found = mx.distributed.all_sum(mx.array(array), group=self._group, stream=self._stream)
            mx.eval(found)
        return np.array(found, copy=False)
