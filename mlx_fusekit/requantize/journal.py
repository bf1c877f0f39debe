"""What calibrating has done so far, on disk: solved rows, hidden states, and a record of them.

Solved rows are written when they are solved, and read again when the model is. After a layer, the
hidden states behind it are written, and then a record that names both, with checksums: a run that
goes on begins behind the last record whose files are what it says. So nothing has to wait for the
disk, which a killed process leaves to the system; what a power failure takes is done again.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, overload

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.quantization import QuantizedRows
from mlx_fusekit.reading import open_file, read_bytes
from mlx_fusekit.requantize.bits import array_of, bits_of, type_of_bits
from mlx_fusekit.requantize.ranks import Ranks
from mlx_fusekit.requantize.shelf import Held, Shelf
from mlx_fusekit.texts.calibration import CalibrationText
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.files import remove
from mlx_fusekit.writing.work import Work

_READ = 1 << 24
#: Of a record or text; both hold some bytes for each module or token.
_LARGEST_JSON = 1 << 30


class StoredRows(Sequence[QuantizedRows]):
    """Quantized matrices in a file, one an expert, mapped into memory while they are used."""

    def __init__(self, path: Path, layout: Mapping[str, Any]) -> None:
        self._path, self._layout = path, layout

    def __len__(self) -> int:
        return len(self._layout["global_scales"])

    @overload
    def __getitem__(self, index: int) -> QuantizedRows: ...
    @overload
    def __getitem__(self, index: slice) -> list[QuantizedRows]: ...
    def __getitem__(self, index: int | slice) -> QuantizedRows | list[QuantizedRows]:
        places = range(len(self))[index]
        return self._one(places) if isinstance(places, int) else [self._one(p) for p in places]

    def _one(self, expert: int) -> QuantizedRows:
        layout, arrays = self._layout, []
        at = expert * sum(_nbytes(*own) for own in layout["arrays"])
        for dtype, shape in layout["arrays"]:
            arrays.append(np.memmap(self._path, dtype, "r", at, tuple(shape)))
            at += _nbytes(dtype, shape)
        biases = arrays[2] if len(arrays) > 2 else None
        return QuantizedRows(
            arrays[0], arrays[1], biases, layout["scale_dtype"], layout["global_scales"][expert]
        )


@dataclass(frozen=True)
class Record:
    """What was done at one step of the walk.

    Attributes:
        step: its number.
        modules: their results, as JSON, by path.
        groups: paths of modules that were solved together.
        states: of the hidden states behind it, type and shape of each batch, by whose they are.
        rows: how each module's rows lie in its file.
    """

    step: int
    modules: Mapping[str, Any]
    groups: Sequence[Sequence[str]]
    states: Mapping[str, Any]
    rows: Mapping[str, Any]


class Journal:
    """The records of one walk, in a folder of its own.

    Args:
        work: that the walk is part of.
        name: of the folder, which is made where it is missing.

    Attributes:
        records: of an earlier run, without gaps, those whose files are whole.
    """

    def __init__(self, work: Work, name: str) -> None:
        self._work, self._folder = work, work.folder / name
        if not self._folder.is_dir():
            calls.make_folder(self._folder)
        self._rows: dict[str, dict[str, Any]] = {}
        self.records = list(self._found())
        if not self._has_its_states():
            self.records = []
        self._next = sum(len(record.rows) for record in self.records)
        self._clear()
        self._tell()

    def keep_rows(self, path: str, experts: Sequence[QuantizedRows]) -> StoredRows:
        """Write a module's solved rows."""
        name, self._next = f"rows-{self._next}", self._next + 1
        parts = [[e.codes, e.scales, *([] if e.biases is None else [e.biases])] for e in experts]
        arrays = [[part.dtype.str, list(part.shape)] for part in parts[0]]
        arrays_of = [np.ascontiguousarray(array) for own in parts for array in own]
        self._rows[path] = {
            "file": name,
            "checksum": _write(self._folder / name, arrays_of),
            "arrays": arrays,
            "scale_dtype": experts[0].scale_dtype,
            "global_scales": [e.global_scale for e in experts],
        }
        return StoredRows(self._folder / name, self._rows[path])

    def rows_of(self, record: Record, path: str) -> StoredRows:
        """A module's rows, of an earlier run."""
        return StoredRows(self._folder / record.rows[path]["file"], record.rows[path])

    def done(
        self,
        step: int,
        modules: Mapping[str, Any],
        groups: Sequence[Sequence[str]],
        states: Mapping[str, Sequence[Held]],
    ) -> None:
        """Make the work up to here durable; of the states before, only the last stay."""
        known: dict[str, Any] = {}
        for name, batches in states.items():
            arrays = (held.get() for held in batches)
            known[name] = [
                [str(array.dtype), list(array.shape), _write(path, [bits_of(array)])]
                for array, path in zip(arrays, self._state_files(step, name), strict=False)
            ]
        record = Record(step, modules, groups, known, self._rows)
        self._rows = {}
        _put(self._folder / f"record-{len(self.records)}", asdict(record))
        self.records.append(record)
        self._tell()
        self._remove_old_states()

    def go_back(self, count: int) -> None:
        """Forget all but the first records; at most one may be forgotten, or all."""
        for number in range(count, len(self.records)):
            remove(self._folder / f"record-{number}")
        self.records = self.records[:count]
        if not self._has_its_states():
            self.records = []
        self._clear()

    def states(self, record: Record, name: str) -> Iterator[mx.array]:
        """Hidden states behind a step, of an earlier run."""
        files = self._state_files(record.step, name)
        for path, (kind, shape, _) in zip(files, record.states[name], strict=False):
            yield array_of(np.fromfile(path, type_of_bits(kind)).reshape(shape), kind)

    def shelf(self) -> Shelf:
        """For what is of no use to a later run."""
        return Shelf(self._folder)

    def _state_files(self, step: int, name: str) -> Iterator[Path]:
        return (self._folder / f"states-{step}-{name}-{number}" for number in count())

    def _tell(self) -> None:
        done = sum(len(record.modules) for record in self.records)
        if done:
            self._work.done = f"{done} re-quantized modules are"

    def _found(self) -> Iterator[Record]:
        number = 0
        with suppress(OSError, ValueError, KeyError, TypeError):
            while True:
                content = read_bytes(self._folder / f"record-{number}", _LARGEST_JSON)
                record = Record(**json.loads(content))
                for layout in record.rows.values():
                    _check(self._folder / layout["file"], layout["checksum"])
                yield record
                number += 1

    def _has_its_states(self) -> bool:
        """Whether the hidden states behind the last record are there, and whole."""
        if not self.records:
            return True
        record = self.records[-1]
        try:
            for name, batches in record.states.items():
                files = self._state_files(record.step, name)
                for path, (_, _, checksum) in zip(files, batches, strict=False):
                    _check(path, checksum)
        except (OSError, ValueError, TypeError):
            return False
        return True

    def _clear(self) -> None:
        """Remove what a run that was cut off has written since its last record."""
        known = {f"record-{number}" for number in range(len(self.records))}
        known |= {layout["file"] for r in self.records for layout in r.rows.values()}
        for path in self._folder.iterdir():
            if path.name not in known and not path.name.startswith("states-"):
                remove(path)
        self._remove_old_states()

    def _remove_old_states(self) -> None:
        # Those before the last ones are for a rank that is ahead of another when both go on.
        kept = tuple(f"states-{record.step}-" for record in self.records[-2:])
        for path in self._folder.glob("states-*"):
            if not path.name.startswith(kept):
                remove(path)


def keep_text(folder: Path, text: CalibrationText) -> None:
    """Write calibration text."""
    _put(folder / "text", asdict(text))


def kept_text(folder: Path) -> CalibrationText | None:
    """Calibration text of an earlier run, None where there is none."""
    try:
        content = json.loads(read_bytes(folder / "text", _LARGEST_JSON))
    except (OSError, ValueError):
        return None
    return _text_of(content)


def decided_text(ranks: Ranks, make: Callable[[], CalibrationText]) -> CalibrationText:
    """The text of the first rank, on all of them."""
    if ranks.count == 1:
        return make()
    return _text_of(ranks.decided(lambda: asdict(make())))


def _text_of(content: dict[str, Any]) -> CalibrationText:
    for name in ("sequences", "held_out"):
        content[name] = tuple(
            TokenSequence(tuple(own["tokens"]), own["scored"], own["is_answer"])
            for own in content[name]
        )
    return CalibrationText(**content)


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))


def _put(path: Path, content: Any) -> None:
    """Write JSON that is there as a whole or not at all."""
    new = path.with_name("new")
    remove(new)
    _write(new, [np.frombuffer(json.dumps(content).encode(), np.uint8)])
    calls.rename(new, path)


def _write(path: Path, arrays: Sequence[npt.NDArray[Any]]) -> int:
    """Write arrays behind each other; their checksum."""
    file, at, checksum = calls.create(path), 0, 0
    try:
        for array in arrays:
            flat: Any = array.reshape(-1).view(np.uint8)
            calls.write(file, flat, at)
            checksum, at = zlib.crc32(memoryview(flat), checksum), at + flat.nbytes
    finally:
        calls.close(file)
    return checksum


def _check(path: Path, checksum: int) -> None:
    """Refuse a file that is not what was written.

    Raises:
        ValueError: when it has another content.
    """
    found = 0
    with open_file(path) as file:
        while data := file.read(_READ):
            found = zlib.crc32(data, found)
    if found != checksum:
        raise ValueError(f"{path.name}: is not what was written")
