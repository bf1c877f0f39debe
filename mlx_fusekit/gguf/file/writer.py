"""Writing one GGUF file: blocks streamed by several threads, staged, checked.

Memory is bounded by the workers' row blocks, whatever the size of the model; a tensor whose columns
or values change, and one that mlx-lm computes, is held whole.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from mlx_fusekit.errors import OutputError
from mlx_fusekit.gguf.file.encoding import TensorEncoding
from mlx_fusekit.gguf.file.front import front_bytes
from mlx_fusekit.gguf.file.header import padded, read_gguf_header
from mlx_fusekit.gguf.file.plan import GgufPlan
from mlx_fusekit.gguf.file.streaming import TensorJob
from mlx_fusekit.machine import default_workers, run_tasks
from mlx_fusekit.progress import Progress
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.staging import staged
from mlx_fusekit.writing.targets import FileTarget


@dataclass(frozen=True)
class WrittenFile:
    """A GGUF file that is complete and checked.

    Attributes:
        nbytes: size of the file.
        tensors: how each was written, with its true error, in the order of the file.
    """

    path: Path
    nbytes: int
    tensors: tuple[TensorEncoding, ...]


def write_gguf(
    plan: GgufPlan,
    keys: gguf.GGUFWriter,
    target: FileTarget,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> WrittenFile:
    """Write a file that exists complete or not at all.

    Args:
        plan: used up.
        keys: a writer made without a path, with all metadata added and no tensor. This function
            adds ``general.file_type`` and ``general.quantization_version``; the writer is used up.
        target: the file; its folder is made where there is none.
        workers: threads; the bytes do not depend on their number.
        progress: called with bytes of tensors done, and in all.

    Raises:
        CheckpointError: for a value that is NaN or infinite, or that the asked type cannot hold.
        OutputError: when the target must not or cannot be written.
    """
    front = _front(plan, keys)
    start = padded(len(front))
    with staged(target) as path:
        _check_disk(plan, target.path, path)
        file = os.open(path, os.O_RDWR)
        try:
            calls.resize(file, start + plan.data_bytes)
            calls.write(file, front, 0)
            tensors = _write_tensors(plan, file, start, workers or default_workers(), progress)
        finally:
            calls.close(file)
        _check_written(plan, keys, path, start)
    return WrittenFile(target.path, start + plan.data_bytes, tensors)


def _check_disk(plan: GgufPlan, target: Path, path: Path) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < plan.data_bytes:
        raise OutputError(
            f"{target}: needs {plan.data_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB "
            "free; make room or choose another --gguf-path"
        )


def _front(plan: GgufPlan, keys: gguf.GGUFWriter) -> bytes:
    """All that comes before the tensors."""
    keys.add_quantization_version(gguf.GGML_QUANT_VERSION)
    keys.add_file_type(plan.file_type)
    for planned in plan.tensors:
        encoding = planned.encoding
        keys.add_tensor_info(
            encoding.name,
            encoding.shape,
            np.dtype(np.float32),
            encoding.nbytes,
            raw_dtype=encoding.ggml_type,
        )
    return front_bytes(keys)


def _write_tensors(
    plan: GgufPlan, file: int, start: int, workers: int, progress: Progress | None
) -> tuple[TensorEncoding, ...]:
    total, done = plan.tensor_bytes, 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        jobs = [TensorJob(planned, file, start) for planned in plan.tensors]
        tasks = (task for job in jobs for task in job.tasks(plan))
        try:
            run_tasks(pool, tasks, 2 * workers, count)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if done != total:
        raise AssertionError(f"{done} of {total} bytes written")
    return tuple(job.result() for job in jobs)


def _check_written(plan: GgufPlan, keys: gguf.GGUFWriter, path: Path, start: int) -> None:
    """Read the header back as a stranger would, and compare it with the plan."""
    header = read_gguf_header(path)
    planned = [
        (p.encoding.name, p.encoding.ggml_type, p.encoding.shape, start + p.offset)
        for p in plan.tensors
    ]
    found = [(t.name, t.ggml_type, t.shape, t.start) for t in header.tensors.values()]
    if planned != found or header.keys != tuple(keys.kv_data[0]):
        raise AssertionError(f"written and planned tensors differ: {set(planned) ^ set(found)}")
    if path.stat().st_size != start + plan.data_bytes:
        raise AssertionError(f"{path.stat().st_size} bytes instead of {start + plan.data_bytes}")
