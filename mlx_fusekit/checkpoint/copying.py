"""Untouched bytes of a base on their way into one file or several: each range is read once."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.checkpoint.writer import FileWriter
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.reading import open_file

_LONGEST = 256 << 20
#: What is read at a time to be written to several files: it stays in the processor's cache.
_PIECE = 4 << 20

#: Carries out what one file wants.
Attempt = Callable[[FileWriter, Callable[[], None]], object]


@dataclass(frozen=True, slots=True)
class CopyRange:
    """A range of a base's file, and the files and offsets it is copied to."""

    source: Path
    offset: int
    length: int
    targets: tuple[tuple[FileWriter, int], ...]


def copies(writers: Sequence[FileWriter]) -> Iterator[CopyRange]:
    """What must be copied into files; neighbours are joined, and long ranges cut."""
    targets: dict[TensorRef, list[tuple[FileWriter, int]]] = {}
    for writer in writers:
        for ref, start in writer.untouched():
            targets.setdefault(ref, []).append((writer, start))
    pending: CopyRange | None = None
    for ref in sorted(targets, key=lambda ref: (ref.file, ref.start)):
        span = CopyRange(ref.file, ref.start, ref.nbytes, tuple(targets[ref]))
        if pending is not None and _follows(pending, span):
            pending = replace(pending, length=pending.length + span.length)
            continue
        if pending is not None:
            yield from _pieces(pending)
        pending = span
    if pending is not None:
        yield from _pieces(pending)


def copy(
    span: CopyRange, attempt: Attempt = lambda _, work: work(), *, piece: int = _PIECE
) -> None:
    """Copy one range.

    Args:
        span: what to copy.
        attempt: called with each file and what is to be done to it, which it may leave undone.
        piece: bytes to read at a time for several files; for one, the kernel copies.
    """
    with open_file(span.source) as opened:
        source = opened.fileno()
        if len(span.targets) == 1:
            ((writer, start),) = span.targets
            attempt(writer, partial(writer.copy, source, span.offset, start, span.length))
            return
        for done in range(0, span.length, piece):
            data = os.pread(source, min(piece, span.length - done), span.offset + done)
            if len(data) != min(piece, span.length - done):
                raise CheckpointError(f"{span.source}: became shorter while it was read")
            for writer, start in span.targets:
                attempt(writer, partial(writer.write, data, start + done))


def _follows(span: CopyRange, after: CopyRange) -> bool:
    ends = [(writer, start + span.length) for writer, start in span.targets]
    return (span.source, span.offset + span.length) == (after.source, after.offset) and ends == [
        *after.targets
    ]


def _pieces(span: CopyRange) -> Iterator[CopyRange]:
    for done in range(0, span.length, _LONGEST):
        yield CopyRange(
            span.source,
            span.offset + done,
            min(_LONGEST, span.length - done),
            tuple((writer, start + done) for writer, start in span.targets),
        )
