"""Weights in types that MLX does not have, decoded into a folder that mlx-lm can load.

``mx.load`` refuses a whole file for one such tensor, so the file is written anew, a few rows at a
time, into a temporary folder that lasts as long as the process; all else there is a link.
"""

import atexit
import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from mlx_fusekit.checkpoint.base import main_float_dtype
from mlx_fusekit.checkpoint.copying import copies, copy
from mlx_fusekit.checkpoint.header import Header, TensorRef
from mlx_fusekit.checkpoint.writer import FileWriter, OutputTensor, new_layout
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.floats import Array, Float32, from_float32
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.held import temporary_folder

#: Types that ``mx.load`` does not know. Of float8, every 16-bit float holds all numbers; float64 is
#: rounded to float32, since MLX has none to compute with.
FOREIGN = ("F64", "F8_E5M2")

_ROW_BYTES = 16 << 20
_made: dict[tuple[object, ...], Path] = {}


def foreign_tensors(headers: Mapping[str, Header]) -> Iterator[TensorRef]:
    """The tensors of a type that MLX does not have."""
    for header in headers.values():
        yield from (tensor for tensor in header.tensors.values() if tensor.dtype in FOREIGN)


def decoded_types(headers: Mapping[str, Header]) -> dict[str, str]:
    """The type that each such tensor is decoded to: float8 to that of most of the model's bytes."""
    main = main_float_dtype(t for header in headers.values() for t in header.tensors.values())
    return {t.name: "F32" if t.dtype == "F64" else main for t in foreign_tensors(headers)}


def has_scales(names: Iterable[str]) -> bool:
    """Whether any tensor is a scale of others, so that these stand for more than their numbers."""
    return any("scale" in name.rpartition(".")[2] for name in names)


def loadable_folder(folder: Path, headers: Mapping[str, Header]) -> Path:
    """The model's folder, or one with the same model in types that mlx-lm can load.

    Args:
        folder: of the model.
        headers: of its weight files, by name.

    Raises:
        CheckpointError: for float8 with scales, whose meaning is not known; or when the temporary
            folder cannot be written.
    """
    foreign = {tensor.file.name: tensor for tensor in foreign_tensors(headers)}
    if not foreign:
        return folder
    _refuse_scaled(headers)
    times = [header.file.stat().st_mtime_ns for header in headers.values()]
    key = (folder.resolve(), *times)
    if key not in _made:
        try:
            _made[key] = _written(folder, headers, set(foreign))
        except OSError as error:
            first = next(iter(foreign.values()))
            raise CheckpointError(
                f"{first.file}: {first.name} is stored as {first.dtype}, which mlx-lm cannot load, "
                f"and decoding it into {tempfile.gettempdir()} failed ({error.strerror}); make "
                "room there, or use the model's 16-bit original"
            ) from error
    return _made[key]


def _refuse_scaled(headers: Mapping[str, Header]) -> None:
    scaled = has_scales(name for header in headers.values() for name in header.tensors)
    for tensor in foreign_tensors(headers):
        if tensor.dtype == "F8_E5M2" and scaled:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.dtype} with scales, which "
                "mlx-lm cannot load; use the model's 16-bit original"
            )


def _written(folder: Path, headers: Mapping[str, Header], anew: set[str]) -> Path:
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(temporary_folder())
        for path in folder.iterdir():
            if path.name not in anew:
                calls.make_link(target / path.name, path.resolve())
        types = decoded_types(headers)
        for name in anew:
            _write(headers[name], target, types)
        atexit.register(stack.pop_all().close)
    return target


def _write(header: Header, target: Path, types: Mapping[str, str]) -> None:
    outputs = [
        OutputTensor(t.name, types.get(t.name, t.dtype), t.shape, None if t.name in types else t)
        for t in header.tensors.values()
    ]
    with FileWriter(new_layout(header.file.name, outputs), target, clone=False) as writer:
        for span in copies([writer]):
            copy(span)
        for tensor in foreign_tensors({header.file.name: header}):
            _write_tensor(tensor, types[tensor.name], writer)
        writer.finish()


def _write_tensor(tensor: TensorRef, dtype: str, writer: FileWriter) -> None:
    columns = tensor.shape[-1] if tensor.shape else 1
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    step = max(1, _ROW_BYTES // max(8 * columns, 1))
    for first in range(0, rows, step):
        values = _values(tensor.read_rows(first, min(first + step, rows)), tensor.dtype)
        writer.write_rows(tensor.name, first, from_float32(values, dtype))


def _values(stored: Array, dtype: str) -> Float32:
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (stored.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    with np.errstate(over="ignore"):
        return stored.astype(np.float32)
