"""One pass over a base, from which any number of models are written: each byte is read once.

What one model computes of a tensor, another may compute with another update, or keep. So the pass
goes over the base's tensors block by block, and every model makes its own of what was read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np

from mlx_fusekit.checkpoint.base import TensorSource
from mlx_fusekit.checkpoint.copying import CopyRange, copies, copy
from mlx_fusekit.checkpoint.writer import FileWriter
from mlx_fusekit.errors import FusekitError
from mlx_fusekit.formats.floats import STORAGE, Array
from mlx_fusekit.fusing.rows import WrittenWeight, as_written
from mlx_fusekit.machine import Task, default_workers, run_tasks
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.blocks import ROW_LEAVES, WeightReader, row_blocks
from mlx_fusekit.merging.plan import FusePlan, ParameterStep, WeightStep, outputs_of
from mlx_fusekit.merging.shared import SharedReader
from mlx_fusekit.requantize.requantizer import Requantizer
from mlx_fusekit.writing.calls import WriteError

_PARAMETER_ELEMENTS = 1 << 20
#: A little less than glibc's DEFAULT_MMAP_THRESHOLD_MAX.
_LARGEST_MAPPED = 31 << 20

#: Writes some rows of a tensor of the base that a model keeps, given their stored bits.
_Keep = Callable[[int, Array], int]


@dataclass(eq=False)
class Output:
    """A model that is written, and what became of it.

    Attributes:
        plan: of its weights.
        folder: existing and empty.
        requantizer: the strategy, ready to be used.
        failure: why there is no such model; others go on.
        writers: of its files.
    """

    plan: FusePlan
    folder: Path
    requantizer: Requantizer
    failure: FusekitError | WriteError | None = None
    writers: list[FileWriter] = field(default_factory=list)
    _by_tensor: dict[str, FileWriter] = field(default_factory=dict)

    def attempt(self, work: Callable[[], int | None]) -> int:
        """Do something for this model, unless it has failed; the bytes that were written."""
        if self.failure is None:
            try:
                return work() or 0
            except (FusekitError, WriteError) as error:
                self.failure = error
        return 0

    @property
    def cloned(self) -> bool:
        """Whether any of its files was cloned."""
        return any(writer.cloned for writer in self.writers)

    def open(self, *, clone: bool) -> None:
        """Make its files."""
        for layout in self.plan.files:
            writer = FileWriter(layout, self.folder, clone=clone)
            self.writers.append(writer)
            self._by_tensor |= {tensor.name: writer for tensor in layout.tensors}

    def close(self) -> None:
        """Close its files; also where it has failed."""
        for writer in self.writers:
            try:
                writer.close()
            except WriteError as error:
                self.failure = self.failure or error

    def writer(self, tensor: str) -> FileWriter:
        """Of the file that a tensor is in."""
        return self._by_tensor[tensor]

    def write_rows(self, name: str, first: int, rows: Array) -> int:
        """Write rows of a tensor; the number of bytes."""
        self.writer(name).write_rows(name, first, rows)
        return rows.nbytes

    def fills_in(self, name: str) -> bool:
        """Whether a tensor that would be copied can be written by rows, as from now on it is."""
        return name in self._by_tensor and self.writer(name).fill_in(name)


def write_models(
    outputs: Sequence[Output],
    *,
    workers: int | None = None,
    clone: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the weight files of models in one pass over their base.

    What fails for one model is noted there, and the others go on.

    Args:
        outputs: models whose plans are of the very same base.
        workers: threads; the result does not depend on their number.
        clone: whether files of the base's layout may be cloned.
        progress: called with the number of bytes just done, from the calling thread.

    Raises:
        CheckpointError: when the base cannot be read.
    """
    workers = workers or default_workers()
    _keep_freed_memory()
    try:
        for output in outputs:
            output.attempt(partial(output.open, clone=clone))
        with ThreadPoolExecutor(workers) as pool:
            try:
                run_tasks(pool, _tasks(outputs), 4 * workers, progress)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            endings = [partial(o.attempt, writer.finish) for o in outputs for writer in o.writers]
            list(pool.map(lambda ending: ending(), endings))
    finally:
        for output in outputs:
            output.close()


def _keep_freed_memory() -> None:
    """Let glibc keep what blocks leave free, instead of giving it back and clearing it anew.

    It keeps twice as much as the largest array that it has mapped by itself and let go, of up to
    32 MiB; otherwise a sixth of the time is the system's, which hands out cleared pages.
    """
    np.empty(_LARGEST_MAPPED, np.uint8)


def _tasks(outputs: Sequence[Output]) -> Iterator[Task]:
    units = _units([output for output in outputs if output.failure is None])
    owners = {writer: output for output in outputs for writer in output.writers}
    copying = [partial(_copy, span, owners) for span in copies(list(owners))]
    total, computed, copied = sum(unit.nbytes for unit in units), 0, 0
    for unit in units:
        if all(output.failure for output in outputs):
            return
        yield from unit.tasks()
        # Writes to one file wait for each other, so two copies at a time gain nothing, but a copy
        # beside computations does: deal them out evenly.
        computed += unit.nbytes
        due = len(copying) * computed // max(total, 1)
        yield from copying[copied:due]
        copied = due
    yield from copying[copied:]


def _copy(span: CopyRange, owners: Mapping[FileWriter, Output]) -> int:
    copy(span, lambda writer, work: owners[writer].attempt(work))
    return span.length * len(span.targets)


@dataclass(frozen=True)
class _WeightUnit:
    """A weight that some models merge, and others keep.

    Attributes:
        steps: of those that merge it.
        kept: of the others, how they write a tensor's rows, by leaf.
    """

    steps: Mapping[Output, WeightStep]
    kept: Sequence[tuple[Output, str, _Keep]]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for step in self.steps.values() for output in outputs_of(step))

    def tasks(self) -> Iterator[Task]:
        step = next(iter(self.steps.values()))
        # Where the strategy has read it before, it is not opened.
        reader = cache(lambda: SharedReader(WeightReader.open(step.sources, step.source_spec)))
        weights: list[tuple[Output, WrittenWeight]] = []
        for output, own in self.steps.items():
            output.attempt(partial(self._begin, output, own, reader, weights))
        for rows in row_blocks(step.shape):
            if len(weights) + len(self.kept) == 1:
                yield partial(weights[0][0].attempt, partial(weights[0][1].write, rows))
            else:
                yield partial(self._write, weights, reader, rows)

    def _begin(
        self,
        output: Output,
        step: WeightStep,
        reader: Callable[[], SharedReader],
        weights: list[tuple[Output, WrittenWeight]],
    ) -> None:
        writers = {leaf: output.writer(tensor.name) for leaf, tensor in step.outputs.items()}
        weights.append((output, WrittenWeight(step, writers, output.requantizer, reader)))

    def _write(
        self,
        weights: Sequence[tuple[Output, WrittenWeight]],
        reader: Callable[[], SharedReader],
        rows: RowRange,
    ) -> int:
        first = rows.expert * reader().reader.shape[1] + rows.first
        with reader().holding(rows) as stored:
            kept = (o.attempt(partial(keep, first, stored[leaf])) for o, leaf, keep in self.kept)
            merged = (output.attempt(partial(weight.write, rows)) for output, weight in weights)
            return sum(kept) + sum(merged)


@dataclass(frozen=True)
class _ParameterUnit:
    """A tensor that is no merged weight, and the models that write it with its rows."""

    source: TensorSource
    steps: Sequence[tuple[Output, ParameterStep]]

    @property
    def nbytes(self) -> int:
        return sum(step.output.nbytes for _, step in self.steps)

    def tasks(self) -> Iterator[Task]:
        source = self.source.held()
        columns = source.shape[-1] if source.shape else 1
        rows = source.nbytes // (max(columns, 1) * STORAGE[source.dtype].itemsize)
        size = max(1, _PARAMETER_ELEMENTS // max(columns, 1))
        for first in range(0, rows, size):
            yield partial(self._write, source, first, min(first + size, rows))

    def _write(self, source: TensorSource, first: int, last: int) -> int:
        stored = cache(partial(source.read_rows, first, last))

        def write(output: Output, step: ParameterStep) -> int:
            name, dtype = step.output.name, step.output.dtype
            return output.write_rows(name, first, as_written(stored(), source.dtype, dtype, name))

        return sum(output.attempt(partial(write, output, step)) for output, step in self.steps)


def _units(outputs: Sequence[Output]) -> list[_WeightUnit | _ParameterUnit]:
    """What is to be written by rows, in the order of the base."""
    weights: dict[str, dict[Output, WeightStep]] = {}
    parameters: dict[str, dict[Output, ParameterStep]] = {}
    for output in outputs:
        for step in output.plan.steps:
            if isinstance(step, WeightStep):
                weights.setdefault(f"{step.module}.weight", {})[output] = step
            else:
                parameters.setdefault(step.output.name, {})[output] = step
    units: dict[str, list[_WeightUnit | _ParameterUnit]] = {}
    for name, merged in weights.items():
        others = [output for output in outputs if output not in merged]
        units[name] = [_WeightUnit(merged, list(_kept(merged, others, parameters)))]
    for name, steps in parameters.items():
        by_source: dict[int, list[tuple[Output, ParameterStep]]] = {}
        for output, parameter in steps.items():
            by_source.setdefault(id(parameter.source), []).append((output, parameter))
        units.setdefault(name, []).extend(
            _ParameterUnit(members[0][1].source, members) for members in by_source.values()
        )
    in_order = outputs[0].plan.base.tensors if outputs else ()
    return [unit for name in in_order for unit in units.get(name, ())]


def _kept(
    merged: Mapping[Output, WeightStep],
    others: Sequence[Output],
    parameters: Mapping[str, dict[Output, ParameterStep]],
) -> Iterator[tuple[Output, str, _Keep]]:
    """How models that do not merge a weight write its tensors by rows, each by its leaf."""
    sources = next(iter(merged.values())).sources
    for leaf in (leaf for leaf in ROW_LEAVES if leaf in sources):
        source = sources[leaf]
        steps = parameters.get(source.name, {})
        for output in others:
            if output in steps and steps[output].source is source:
                dtype = steps.pop(output).output.dtype
            elif output.fills_in(source.name):
                dtype = source.dtype
            else:
                continue
            yield output, leaf, partial(_keep, output, source, dtype)


def _keep(output: Output, source: TensorSource, dtype: str, first: int, stored: Array) -> int:
    name = source.name
    return output.write_rows(name, first, as_written(stored, source.dtype, dtype, name))
