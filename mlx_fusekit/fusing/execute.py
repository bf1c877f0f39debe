"""Carrying out a plan: computed row blocks and copied byte ranges, in parallel.

Memory is bounded by the workers' blocks (a few MiB each), whatever the size of the model; only a
base that mlx-lm converts on the fly holds one whole tensor at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from mlx_fusekit.checkpoint.base import TensorSource
from mlx_fusekit.checkpoint.writer import CopyRange, FileWriter
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.floats import STORAGE, Array, Float32, from_float32, to_float32
from mlx_fusekit.formats.quantization import QuantizedRows, to_matrix
from mlx_fusekit.machine import Task, default_workers, run_tasks
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.blocks import BLOCK_ELEMENTS, row_blocks
from mlx_fusekit.merging.merged import Weight
from mlx_fusekit.merging.plan import FusePlan, ParameterStep, WeightStep, outputs_of
from mlx_fusekit.requantize.requantizer import Requantizer

_PARAMETER_ELEMENTS = 1 << 20
#: Arrays of a block's size that one worker holds at most.
_BLOCK_COPIES = 3

Leaves = Mapping[str, Array | None]


def working_memory(plan: FusePlan, workers: int) -> int:
    """Bytes the work takes at its peak beyond the interpreter and the adapter, an estimate."""
    columns = [step.shape[2] for step in plan.steps if isinstance(step, WeightStep)]
    block = max(BLOCK_ELEMENTS, *columns, 0) * 4
    held = [tensor.nbytes for tensor in plan.base.tensors.values()] if plan.base.converted else []
    return workers * _BLOCK_COPIES * block + max(held, default=0)


def execute(
    plan: FusePlan,
    folder: Path,
    requantizer: Requantizer,
    *,
    workers: int | None = None,
    clone: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> bool:
    """Write the plan's weight files into a folder.

    Args:
        folder: existing and empty.
        requantizer: the strategy, ready to be used.
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
    by_tensor: Mapping[str, FileWriter],
    requantizer: Requantizer,
) -> Iterator[Task]:
    copies = [partial(_copy, writer, span) for writer in writers for span in writer.copies()]
    computed, copied = 0, 0
    for step in plan.steps:
        if isinstance(step, WeightStep):
            yield from _weight_tasks(step, by_tensor, requantizer)
        else:
            yield from _parameter_tasks(step, by_tensor[step.output.name])
        # Writes to one file wait for each other, so two copies at a time gain nothing, but a copy
        # beside computations does: deal them out evenly.
        computed += sum(output.nbytes for output in outputs_of(step))
        due = len(copies) * computed // max(plan.computed_bytes, 1)
        yield from copies[copied:due]
        copied = due
    yield from copies[copied:]


def _copy(writer: FileWriter, span: CopyRange) -> int:
    writer.copy(span)
    return span.length


def _parameter_tasks(step: ParameterStep, writer: FileWriter) -> Iterator[Task]:
    """Write a tensor by rows, converted to the type it is written in."""
    source, output = step.source.held(), step.output
    columns = source.shape[-1] if source.shape else 1
    rows = source.nbytes // (max(columns, 1) * STORAGE[source.dtype].itemsize)
    size = max(1, _PARAMETER_ELEMENTS // max(columns, 1))
    for first in range(0, rows, size):
        last = min(first + size, rows)
        yield partial(_write_parameter, source, writer, output.name, output.dtype, first, last)


def _write_parameter(
    source: TensorSource, writer: FileWriter, name: str, dtype: str, first: int, last: int
) -> int:
    stored = source.read_rows(first, last)
    if dtype != source.dtype:
        stored = _stored_exactly(to_float32(stored, source.dtype), dtype, name)
    writer.write_rows(name, first, stored)
    return stored.nbytes


def _weight_tasks(
    step: WeightStep, by_tensor: Mapping[str, FileWriter], requantizer: Requantizer
) -> Iterator[Task]:
    """Write a module's weight by row blocks."""
    writers = {leaf: by_tensor[output.name] for leaf, output in step.outputs.items()}
    compute: Callable[[RowRange], Leaves]
    if step.target_spec is None:
        compute = partial(_dense, Weight.open(step))
    else:
        weight = requantizer(step)
        if weight.global_scales is not None:
            name = step.outputs["global_scale"].name
            writers["global_scale"].write_rows(name, 0, weight.global_scales.reshape(1, -1))
        compute = partial(_quantized, step.module, weight.rows)
    for rows in row_blocks(step.shape):
        yield partial(_write_block, step, writers, compute, rows)


def _write_block(
    step: WeightStep,
    writers: Mapping[str, FileWriter],
    compute: Callable[[RowRange], Leaves],
    rows: RowRange,
) -> int:
    """Compute and write one block; the number of bytes written."""
    first, total = rows.expert * step.shape[1] + rows.first, 0
    for leaf, stored in compute(rows).items():
        if stored is not None:
            writers[leaf].write_rows(step.outputs[leaf].name, first, stored)
            total += stored.nbytes
    return total


def _dense(weight: Weight, rows: RowRange) -> Leaves:
    step = weight.step
    values = to_matrix(weight.values(rows))
    return {"weight": _stored_exactly(values, step.dtype, f"{step.module}.weight")}


def _quantized(
    module: str, requantized: Callable[[RowRange], QuantizedRows], rows: RowRange
) -> Leaves:
    quantized = requantized(rows)
    _check_scales(quantized, module)
    return {"weight": quantized.codes, "scales": quantized.scales, "biases": quantized.biases}


def _check_scales(quantized: QuantizedRows, module: str) -> None:
    if quantized.biases is None:
        return
    for stored in (quantized.scales, quantized.biases):
        if not np.isfinite(to_float32(stored, quantized.scale_dtype)).all():
            raise AdapterError(
                f"{module}.weight: a merged weight is too large for its {quantized.scale_dtype} "
                "scales; lower the adapter's scale or use --dequantize"
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
