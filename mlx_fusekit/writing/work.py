"""The folder in which long work on a target is kept, so that a run that was cut off can go on.

It has a hidden name beside the target, and holds what the work was made from. A run that ends well,
or with an error, removes it; after an interrupt it stays when there is work in it, as it does after
an error of one of several ranks, and after a kill in any case.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit.errors import OutputError
from mlx_fusekit.launched import ranks
from mlx_fusekit.reading import read_bytes
from mlx_fusekit.signals import held_back
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.files import remove, write_new
from mlx_fusekit.writing.staging import common_folder, told

_INPUTS = "inputs.json"
_LARGEST_INPUTS = 64 << 20


@dataclass
class Work:
    """Work that is kept.

    Attributes:
        folder: for its files.
        done: how much of it there is, in words; "" where nothing could be gone on with.
    """

    folder: Path
    done: str = ""


def work_path(target: Path, rank: int = 0) -> Path:
    """Where the work on a target is kept, of each rank its own."""
    path, own = target.absolute(), f"-{rank}" if rank else ""
    return path.parent / f".{path.name}.fusekit-work{own}"


@contextlib.contextmanager
def kept_work(
    target: Path, inputs: Mapping[str, Any], resume: bool, rank: int = 0
) -> Iterator[Work]:
    """The folder with the work on a target, and what an earlier run left in it.

    Args:
        target: what is being made.
        inputs: what decides the work, by what to call it; JSON.
        resume: whether earlier work is gone on with; else it is thrown away.
        rank: of those that work on it together.

    Raises:
        OutputError: when it was made from other inputs, another run is at it, or it cannot be
            written.
    """
    path = work_path(target, rank)
    with told(target), common_folder(path.parent), _held(path, target):
        known = _inputs_of(path)
        content = json.loads(json.dumps(inputs))
        if not resume or known is None:
            _empty(path)
        elif known != content:
            raise _of_other_inputs(path, target, known, content)
        if not (path / _INPUTS).exists():
            write_new(path / _INPUTS, json.dumps(content, indent=1).encode())
            calls.sync_folder(path)
        work = Work(path)
        try:
            yield work
        except BaseException as error:
            # Of several ranks, all have to go on from where they were.
            if not work.done or not (isinstance(error, KeyboardInterrupt) or ranks()[1] > 1):
                _discard(path)
            elif isinstance(error, KeyboardInterrupt):
                error.add_note(
                    f"{work.done} kept in {path}; the same command goes on from there, and with "
                    "--no-resume starts afresh"
                )
            raise
        _discard(path)


@contextlib.contextmanager
def _held(path: Path, target: Path) -> Iterator[None]:
    """Hold the folder, made where it is missing, under a lock."""
    if not os.path.lexists(path):
        calls.make_folder(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        if calls.lock(descriptor, wait=False) is False:
            raise OutputError(
                f"{target}: another run is making it; wait until that has ended, or choose another "
                "place"
            )
        yield
    finally:
        os.close(descriptor)


def _inputs_of(path: Path) -> dict[str, Any] | None:
    """What the work was made from; None where a run was cut off before it said so."""
    try:
        found = json.loads(read_bytes(path / _INPUTS, _LARGEST_INPUTS))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _of_other_inputs(
    path: Path, target: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]
) -> OutputError:
    names = dict.fromkeys((*wanted, *known))
    (first, *_) = [name for name in names if known.get(name) != wanted.get(name)]
    return OutputError(
        f"{target}: {path.name} beside it holds the work of an interrupted run with another "
        f"{first}; run that command again to go on with it, or add --no-resume to throw it away"
    )


def _empty(path: Path) -> None:
    for inside in path.iterdir():
        remove(inside)


def _discard(path: Path) -> None:
    """Remove the folder; where that fails, the next run goes on from it or throws it away."""
    with held_back(), contextlib.suppress(OSError):
        # Without its inputs, a part of it is never taken for the whole.
        remove(path / _INPUTS)
        remove(path)
