"""Carrying out a plan: computed row blocks and copied byte ranges, in parallel.

Memory is bounded by the workers' blocks (a few MiB each), whatever the size of the model; only a
base that mlx-lm converts on the fly holds one whole tensor at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_fusekit.checkpoint.base import TensorSource
from mlx_fusekit.checkpoint.sanitized import LazyTensor
from mlx_fusekit.checkpoint.writer import CopyRange, FileWriter
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.floats import STORAGE, Array, Float32, from_float32, to_float32
from mlx_fusekit.formats.quantization import QuantizedRows, TargetFormat, to_matrix
from mlx_fusekit.machine import Task, default_workers, run_tasks
from mlx_fusekit.merging.arithmetic import RowRange, merge, unchanged_rows
from mlx_fusekit.merging.blocks import BLOCK_ELEMENTS, WeightReader, of_expert, taken_from
from mlx_fusekit.merging.plan import FusePlan, ParameterStep, WeightStep, outputs_of
from mlx_fusekit.requantize.strategy import Requantizer

_PARAMETER_ELEMENTS = 1 << 20
#: Arrays of a block's size that one worker holds at most.
_BLOCK_COPIES = 3

Progress = Callable[[int], None]


def working_memory(plan: FusePlan, workers: int) -> int:
    """Bytes the work takes at its peak beyond the interpreter and the adapter, an estimate."""
    columns = [step.shape[2] for step in plan.steps if isinstance(step, WeightStep)]
    block = max(BLOCK_ELEMENTS, *columns, 0) * 4
    held = [t.nbytes for t in plan.base.tensors.values() if isinstance(t, LazyTensor)]
    return workers * _BLOCK_COPIES * block + max(held, default=0)


def execute(
    plan: FusePlan,
    folder: Path,
    requantizer: Requantizer,
    *,
    workers: int | None = None,
    clone: bool = True,
    progress: Progress = lambda _: None,
) -> bool:
    """Write the plan's weight files into a folder.

    Args:
        folder: existing and empty.
        workers: threads; the result does not depend on their number.
        clone: whether files of the base's layout may be cloned.
        progress: called with the number of bytes just done, from the calling thread.

    Returns:
        Whether any file was cloned.

    Raises:
        AdapterError: when a merged weight does not fit its stored type.
    """
    workers = workers or default_workers()
    with ExitStack() as stack:
        writers = [
            stack.enter_context(FileWriter(file, folder, clone=clone)) for file in plan.files
        ]
        by_tensor = {tensor.name: writer for writer in writers for tensor in writer.layout.tensors}
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        try:
            tasks = _tasks(plan, writers, by_tensor, requantizer)
            run_tasks(pool, tasks, 4 * workers, progress)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        list(pool.map(FileWriter.finish, writers))
        return any(writer.cloned for writer in writers)


def _tasks(
    plan: FusePlan,
    writers: list[FileWriter],
    by_tensor: dict[str, FileWriter],
    requantizer: Requantizer,
) -> Iterator[Task]:
    copies = [partial(_copy, writer, span) for writer in writers for span in writer.copies()]
    computed, copied = 0, 0
    for step in plan.steps:
        if isinstance(step, WeightStep):
            yield from _WeightJob.make(step, by_tensor, requantizer).tasks()
        else:
            yield from _parameter_tasks(step, by_tensor[step.output.name])
        # Writes to one file wait for each other, so two copies at a time gain nothing, but a copy
        # beside computations does: deal them out evenly.
        computed += sum(output.nbytes for output in outputs_of(step))
        due = len(copies) * computed // max(plan.computed_bytes, 1)
        yield from copies[copied:due]
        copied = due
    for output in plan.raw_copies:
        source = taken_from(plan.base.tensors[output.name])
        yield from _row_tasks(source, by_tensor[output.name], output.dtype)
    yield from copies[copied:]


def _copy(writer: FileWriter, span: CopyRange) -> int:
    writer.copy(span)
    return span.length


def _parameter_tasks(step: ParameterStep, writer: FileWriter) -> Iterator[Task]:
    return _row_tasks(taken_from(step.source), writer, step.output.dtype, name=step.output.name)


def _row_tasks(
    source: TensorSource, writer: FileWriter, dtype: str, name: str | None = None
) -> Iterator[Task]:
    """Write a tensor row by row, converted to ``dtype``."""
    columns = source.shape[-1] if source.shape else 1
    rows = source.nbytes // (max(columns, 1) * STORAGE[source.dtype].itemsize)
    target = name or source.name

    def run(first: int, last: int) -> int:
        stored = source.read_rows(first, last)
        if dtype != source.dtype:
            stored = _stored_exactly(to_float32(stored, source.dtype), dtype, target)
        writer.write_rows(target, first, stored)
        return stored.nbytes

    step = max(1, _PARAMETER_ELEMENTS // max(columns, 1))
    for first in range(0, rows, step):
        yield partial(run, first, min(first + step, rows))


@dataclass(frozen=True)
class _WeightJob:
    """The row blocks of one module's weight.

    Attributes:
        global_scales: nvfp4's, as they will be written.
    """

    step: WeightStep
    reader: WeightReader
    writers: dict[str, FileWriter]
    requantizer: Requantizer
    global_scales: Float32 | None

    @classmethod
    def make(
        cls, step: WeightStep, by_tensor: dict[str, FileWriter], requantizer: Requantizer
    ) -> "_WeightJob":
        reader = WeightReader.open(step.sources, step.source_spec)
        writers = {leaf: by_tensor[output.name] for leaf, output in step.outputs.items()}
        scales = grown_global_scales(step, reader) if "global_scale" in step.outputs else None
        return cls(step, reader, writers, requantizer, scales)

    def tasks(self) -> Iterator[Task]:
        if self.global_scales is not None:
            name = self.step.outputs["global_scale"].name
            self.writers["global_scale"].write_rows(name, 0, self.global_scales.reshape(1, -1))
        for rows in self.reader.blocks():
            yield partial(self._run, rows)

    def _run(self, rows: RowRange) -> int:
        """Compute and write one block; the number of bytes written."""
        base, block, keep = merged_block(self.step, self.reader, rows)
        if self.step.target_spec is None:
            stored = _stored_exactly(
                to_matrix(block), self.step.dtype, f"{self.step.module}.weight"
            )
            return self._write(rows, {"weight": stored})
        assert base is not None, "only a quantized weight has a quantized target"
        written = self._quantized(rows, block, base, keep)
        leaves = {"weight": written.codes, "scales": written.scales, "biases": written.biases}
        return self._write(rows, leaves)

    def _quantized(
        self, rows: RowRange, block: Float32, base: QuantizedRows, keep: npt.NDArray[np.bool_]
    ) -> QuantizedRows:
        """A merged block in the target format; rows to keep have the base's bytes."""
        spec = self.step.target_spec
        assert spec is not None
        target = TargetFormat(spec, self.step.dtype, of_expert(self.global_scales, rows.expert))
        same_format = self.step.source_spec == spec and base.global_scale == target.global_scale
        if same_format and keep.all():
            return base
        quantized = self.requantizer(self.step.module, rows, block, base, target)
        _check_scales(quantized, self.step.module)
        return with_rows_kept(quantized, base, keep) if same_format and keep.any() else quantized

    def _write(self, rows: RowRange, leaves: Mapping[str, Array | None]) -> int:
        first = rows.expert * self.reader.shape[1] + rows.first
        total = 0
        for leaf, stored in leaves.items():
            if stored is not None:
                self.writers[leaf].write_rows(self.step.outputs[leaf].name, first, stored)
                total += stored.nbytes
        return total


def merged_block(
    step: WeightStep, reader: WeightReader, rows: RowRange
) -> tuple[QuantizedRows | None, Float32, npt.NDArray[np.bool_]]:
    """A block of a step's weight: as the base stores it, merged, and which rows do not change.

    Raises:
        AdapterError: when the merged weights are not finite.
    """
    base, block_of_base = reader.read(rows)
    if step.update is None:
        return base, block_of_base.values, np.ones(rows.last - rows.first, bool)
    keep = unchanged_rows(block_of_base, step.update, rows)
    block = block_of_base.values if keep.all() else merge(block_of_base, step.update, rows)
    if not np.isfinite(block).all():
        raise AdapterError(
            f"{step.module}.weight: merging gives NaN or infinity; "
            "check the adapter's scale and the base's scales"
        )
    return base, block, keep


def grown_global_scales(step: WeightStep, reader: WeightReader) -> Float32:
    """nvfp4 global scales that hold the merged weights: the base's, or larger where needed.

    A global scale is the largest magnitude of its matrix, so a weight that grew past it would be
    clipped.
    """
    assert reader.global_scales is not None
    scales = reader.global_scales.copy()
    if step.update is None:
        return scales
    for rows in reader.blocks():
        merged = merge(reader.read(rows)[1], step.update, rows)
        index = rows.expert if scales.size > 1 else 0
        # Rounding noise of DoRA's norms is no growth.
        if (largest := np.abs(merged).max(initial=0)) > scales[index] * np.float32(1 + 1e-5):
            scales[index] = largest
    return scales


def _check_scales(quantized: QuantizedRows, module: str) -> None:
    if quantized.biases is None:
        return
    for stored in (quantized.scales, quantized.biases):
        if not np.isfinite(to_float32(stored, quantized.scale_dtype)).all():
            raise AdapterError(
                f"{module}.weight: a merged weight is too large for its {quantized.scale_dtype} "
                "scales; lower the adapter's scale or use --dequantize"
            )


def with_rows_kept(
    merged: QuantizedRows, base: QuantizedRows, keep: npt.NDArray[np.bool_]
) -> QuantizedRows:
    """Merged rows, but the base's where ``keep`` is true."""
    chosen = keep[:, None]
    biases = None
    if merged.biases is not None and base.biases is not None:
        biases = np.where(chosen, base.biases, merged.biases)
    return QuantizedRows(
        np.where(chosen, base.codes, merged.codes),
        np.where(chosen, base.scales, merged.scales),
        biases,
        merged.scale_dtype,
        merged.global_scale,
    )


def _stored_exactly(values: Float32, dtype: str, name: str) -> Array:
    """Round to a stored type; refuse what it cannot hold."""
    stored = from_float32(values, dtype)
    if dtype != "F32" and not np.isfinite(to_float32(stored, dtype)).all():
        raise AdapterError(
            f"{name}: a weight of {np.abs(values).max():g} is too large for {dtype}; "
            "use --dequantize --dtype bfloat16 or float32"
        )
    return np.ascontiguousarray(stored)
