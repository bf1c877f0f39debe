"""Base models whose stored tensors are not the parameters that mlx-lm's model classes have.

A raw Hugging Face checkpoint may stack experts differently, transpose convolutions, or hold
another quantization format. mlx-lm's ``sanitize`` methods know how to convert each of them, so we
let it, lazily: nothing is computed before a tensor is read, and one tensor at a time is held.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.folder import Checkpoint, layer_count
from mlx_fusekit.checkpoint.mlx_lm import model_classes
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.floats import STORAGE, Array
from mlx_fusekit.formats.quantization import QuantSpec

if TYPE_CHECKING:
    import mlx.core as mx

_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "complex64": "C64",
}


@dataclass(frozen=True, slots=True)
class ArrayTensor:
    """A tensor held in memory; a :class:`~mlx_fusekit.checkpoint.base.TensorSource`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    array: Array

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.array.nbytes

    def read_rows(self, first: int, last: int) -> Array:
        """Rows ``first`` to ``last`` (exclusive), all axes but the last counting as rows."""
        columns = self.shape[-1] if self.shape else 1
        return self.array.reshape(-1, columns)[first:last]


class LazyTensor:
    """A parameter that mlx-lm will compute from the checkpoint when it is asked for."""

    def __init__(self, name: str, array: "mx.array") -> None:
        self.name = name
        self.dtype = _DTYPES[str(array.dtype).rpartition(".")[2]]
        self.shape: tuple[int, ...] = tuple(array.shape)
        self._array: mx.array | None = array

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * STORAGE[self.dtype].itemsize

    def take(self) -> ArrayTensor:
        """Compute it; afterwards this object no longer holds it, so that its memory can go."""
        import mlx.core as mx

        array, self._array = self._array, None
        if array is None:
            raise AssertionError(f"{self.name} was taken twice")
        if self.dtype == "BF16":
            array = array.view(mx.uint16)
        stored: Array = np.array(array)
        return ArrayTensor(self.name, self.dtype, self.shape, stored)

    def read_rows(self, first: int, last: int) -> Array:
        """Not possible before :meth:`take`."""
        raise AssertionError(f"{self.name} must be taken before it is read")


@dataclass(frozen=True)
class SanitizedModel:
    """A base model seen through mlx-lm's model class; a :class:`BaseModel`.

    Attributes:
        config: ``config.json``, with MLX's quantization where mlx-lm converted another one.
        specs: quantization of each quantized module.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    specs: Mapping[str, QuantSpec]

    @property
    def quantized_modules(self) -> tuple[str, ...]:
        """Paths of the quantized modules."""
        return tuple(self.specs)

    @property
    def layer_count(self) -> int | None:
        """Number of decoder layers, when the configuration says it."""
        return layer_count(self.config)

    def quantization(self, module: str, columns: int | None = None) -> QuantSpec | None:
        """How the weight of a module is quantized, or None.

        Raises:
            CheckpointError: when that does not give ``columns``.
        """
        spec = self.specs.get(module)
        if spec is not None and columns is not None:
            actual = spec.columns(self.tensors[f"{module}.weight"].shape[-1])
            if actual != columns:
                raise CheckpointError(
                    f"{self.folder}: {module} has {actual} columns, not {columns}"
                )
        return spec


@dataclass
class _SanitizeRecord:
    """Whether ``sanitize`` handed every tensor on as it was."""

    unchanged: bool = False

    def compare(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        self.unchanged = all(before.get(name) is array for name, array in after.items())


def open_base(
    folder: Path, *, trust_remote_code: bool = False, wanted: Collection[str] = ()
) -> BaseModel:
    """Open a base model so that its tensors carry the module paths adapters use.

    Args:
        folder: a model folder.
        trust_remote_code: whether model code that lies in the folder may run.
        wanted: names of tensors the caller will look for; a checkpoint of MLX's that has them all
            is taken as it is, without importing mlx-lm.

    Returns:
        The checkpoint itself where its tensors are the model's parameters, else a
        :class:`SanitizedModel`.

    Raises:
        CheckpointError: naming what is wrong with the folder.
    """
    checkpoint = Checkpoint.open(folder)
    if checkpoint.written_by_mlx and all(name in checkpoint.tensors for name in wanted):
        return checkpoint
    record = _SanitizeRecord()
    try:
        model, config = _load_lazily(folder, record, trust_remote_code)
    except CheckpointError:
        if checkpoint.written_by_mlx:
            return checkpoint  # what is missing will be said by whoever looks for it
        raise
    if record.unchanged and config.get("quantization") == checkpoint.config.get("quantization"):
        return checkpoint
    return _sanitized(checkpoint, model, config)


def _load_lazily(
    folder: Path, record: _SanitizeRecord, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    from mlx_lm.utils import load_model

    def recorded_classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, arguments_class = model_classes(config)

        class Recorded(model_class):  # type: ignore[misc,valid-type]
            def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
                before = dict(weights)
                parent = getattr(super(), "sanitize", None)
                after = parent(weights) if parent else weights
                record.compare(before, after)
                return dict(after)

        return Recorded, arguments_class

    try:
        model, config = load_model(
            folder,
            lazy=True,
            get_model_classes=recorded_classes,
            trust_remote_code=trust_remote_code,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # mlx-lm raises these for architectures it does not know and weights that do not fit.
        raise CheckpointError(f"{folder}: mlx-lm cannot load it ({_first_line(error)})") from error
    return model, config


def _sanitized(checkpoint: Checkpoint, model: Any, config: dict[str, Any]) -> SanitizedModel:
    from mlx.utils import tree_flatten

    specs = {
        path: QuantSpec(module.bits, module.group_size, getattr(module, "mode", "affine"))
        for path, module in model.named_modules()
        if hasattr(module, "bits") and hasattr(module, "group_size") and "scales" in module
    }
    tensors = {name: LazyTensor(name, array) for name, array in tree_flatten(model.parameters())}
    merged = dict(checkpoint.config)
    for key in ("quantization", "quantization_config"):
        if key in config:
            merged[key] = config[key]
    return SanitizedModel(
        checkpoint.folder,
        MappingProxyType(merged),
        MappingProxyType(tensors),
        MappingProxyType(specs),
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
