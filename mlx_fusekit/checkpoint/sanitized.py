"""Base models whose stored tensors are not the parameters that mlx-lm's model classes have.

A raw Hugging Face checkpoint may stack experts differently, transpose convolutions, or hold
another quantization format. mlx-lm's ``sanitize`` methods know how to convert each of them, so we
let it, lazily: nothing is computed before a tensor is read, and a tensor may be read again.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.beside_text import dropped
from mlx_fusekit.checkpoint.complete import lacking
from mlx_fusekit.checkpoint.decoded import FOREIGN, decoded_types, loadable_folder
from mlx_fusekit.checkpoint.folder import Checkpoint, layer_count, refuse_unloadable
from mlx_fusekit.checkpoint.header import Header, TensorRef
from mlx_fusekit.checkpoint.mlx_lm import (
    foreign_quantization,
    load_lazily,
    one_line,
    quantization_block,
)
from mlx_fusekit.checkpoint.stored_types import (
    classes_of_floats,
    not_converted,
    odd_weight,
    plain_float8,
)
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.floats import STORAGE, Array
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.machine import in_lasting_thread

if TYPE_CHECKING:
    import mlx.core as mx

T = TypeVar("T")

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

    def held(self) -> Self:
        """Itself."""
        return self

    def read_rows(self, first: int, last: int) -> Array:
        """Rows ``first`` to ``last`` (exclusive), all axes but the last counting as rows."""
        columns = self.shape[-1] if self.shape else 1
        return self.array.reshape(-1, columns)[first:last]


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A parameter that mlx-lm computes from the checkpoint when it is asked for.

    Attributes:
        compute: gives its stored bits, as often as it is called.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    compute: Callable[[str], Array]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * STORAGE[self.dtype].itemsize

    def held(self) -> ArrayTensor:
        """Compute it."""
        return ArrayTensor(self.name, self.dtype, self.shape, self.compute(self.name))

    def read_rows(self, first: int, last: int) -> Array:
        """Rows ``first`` to ``last`` (exclusive); computes all of it each time."""
        return self.held().read_rows(first, last)


@dataclass(frozen=True)
class SanitizedModel:
    """A base model seen through mlx-lm's model class; a :class:`BaseModel`.

    Attributes:
        config: ``config.json``, with MLX's quantization where mlx-lm converted another one.
        headers: of the weight files that it is made from.
        specs: quantization of each quantized module.
        beside: stored tensors that mlx-lm's class drops, by the names to keep them under.
        lost: names of those that no name can be found for.
    """

    folder: Path
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    tensors: Mapping[str, LazyTensor]
    specs: Mapping[str, QuantSpec]
    beside: Mapping[str, TensorRef] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    converted = True

    @property
    def quantized_modules(self) -> tuple[str, ...]:
        """Paths of the quantized modules."""
        return tuple(self.specs)

    @property
    def quantization_config(self) -> Mapping[str, Any]:
        """MLX's quantization block; empty when there is none."""
        return quantization_block(self.config)

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
    checkpoint = Checkpoint.open(folder, trust_remote_code=trust_remote_code)
    odd = odd_weight(checkpoint)
    foreign = foreign_quantization(checkpoint.config) is not None
    own = checkpoint.written_by_mlx and odd is None and not foreign
    if checkpoint.written_by_mlx and not foreign:
        _refuse_incomplete(checkpoint, trust_remote_code)
    if own and all(name in checkpoint.tensors for name in wanted):
        return checkpoint
    try:
        return _Conversion(checkpoint, trust_remote_code).result()
    except CheckpointError as error:
        if own:
            return checkpoint  # what is missing will be said by whoever looks for it
        told = foreign and odd is not None and not odd.dtype.startswith("F8_")
        if odd is not None and error.__cause__ is not None and not told:
            raise not_converted(odd, checkpoint.config, one_line(error.__cause__)) from error
        raise


def _refuse_incomplete(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Refuse a checkpoint that seems to lack a tensor, where mlx-lm does not load it either."""
    text = checkpoint.config.get("text_config")
    settings = {**checkpoint.config, **(text if isinstance(text, dict) else {})}
    untied = settings.get("tie_word_embeddings") is False
    lack = lacking(checkpoint.tensors, checkpoint.layer_count, head=untied)
    if lack is not None:
        told = f"{checkpoint.folder}: seems to lack {lack}"
        refuse_unloadable(checkpoint, told, trust_remote_code=trust_remote_code)


def beside_text(base: BaseModel, *, trust_remote_code: bool = False) -> frozenset[str]:
    """Names of the base's stored tensors that mlx-lm drops when it loads the model.

    Raises:
        CheckpointError: with mlx-lm's reason, when it cannot load it.
    """
    if base.converted:
        return frozenset(base.beside)
    checkpoint = Checkpoint.open(base.folder, trust_remote_code=trust_remote_code)
    return _Conversion(checkpoint, trust_remote_code).dropped()


class _Conversion:
    """mlx-lm's conversion of a folder, begun again when a tensor is wanted once more.

    An array of MLX's keeps its values once they are computed, so each is let go when they were
    handed out. Lazy arrays belong to the thread that made them, which is why there is one for them.
    """

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool) -> None:
        self._checkpoint = checkpoint
        self._trust_remote_code = trust_remote_code
        self._arrays: dict[str, mx.array] = {}
        self._unchanged = False
        self._dropped: dict[str, str | None] | None = None

    def result(self) -> BaseModel:
        """The checkpoint, or the model where mlx-lm changes anything."""
        return in_lasting_thread(self._open)

    def dropped(self) -> frozenset[str]:
        """Names of stored tensors that mlx-lm's class drops."""
        in_lasting_thread(self._load)
        self._arrays.clear()
        return frozenset(self._dropped or ())

    def compute(self, name: str) -> Array:
        """The stored bits of a parameter."""
        return in_lasting_thread(partial(self._compute, name))

    def _open(self) -> BaseModel:
        model, config = self._load()
        same = quantization_block(config) == self._checkpoint.quantization_config
        decoded = _decoded(self._checkpoint)
        if self._unchanged and same and not decoded:
            self._arrays.clear()
            return self._checkpoint
        sanitized = _sanitized(self._checkpoint, model, config, self._arrays, self.compute)
        beside, lost = _beside(self._checkpoint, self._dropped or {})
        warnings = (*self._checkpoint.warnings, *decoded)
        return replace(sanitized, beside=beside, lost=lost, warnings=warnings)

    def _compute(self, name: str) -> Array:
        import mlx.core as mx

        if name not in self._arrays:
            self._load()
        array = self._arrays.pop(name)
        return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)

    def _load(self) -> tuple[Any, dict[str, Any]]:
        """Let mlx-lm load the folder, lazily, and note whether ``sanitize`` changes a tensor."""
        from mlx.utils import tree_flatten

        conversion = self
        classes = classes_of_floats(self._checkpoint)

        def recorded_classes(config: dict[str, Any]) -> tuple[type, type]:
            model_class, arguments_class = classes(config)

            class Recorded(model_class):  # type: ignore[misc,valid-type]
                def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
                    before = dict(weights)
                    parent = getattr(super(), "sanitize", dict)
                    after = dict(parent(weights))
                    if conversion._dropped is None:
                        conversion._dropped = dropped(before, parent)
                    conversion._unchanged = all(before.get(n) is a for n, a in after.items())
                    return after

            return Recorded, arguments_class

        model, config = load_lazily(
            self._checkpoint.folder,
            weights=loadable_folder(self._checkpoint.folder, self._checkpoint.headers),
            trust_remote_code=self._trust_remote_code,
            classes=recorded_classes,
        )
        self._arrays = dict(tree_flatten(model.parameters()))
        return model, config


def _beside(
    checkpoint: Checkpoint, dropped: Mapping[str, str | None]
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """What mlx-lm drops, by the names to keep it under, and the names of what cannot be kept."""
    # mlx-lm gives other names to what it unpacks itself, before its classes see it.
    stored = {name: kept for name, kept in sorted(dropped.items()) if name in checkpoint.tensors}
    refs = {name: checkpoint.tensors[name] for name in stored}
    beside = {
        kept: replace(refs[name], name=kept)
        for name, kept in stored.items()
        if kept and refs[name].dtype not in FOREIGN
    }
    return beside, tuple(name for name, kept in stored.items() if kept not in beside)


def _decoded(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What to tell of weights that mlx-lm by itself misreads or cannot load."""
    notes = []
    if plain := plain_float8(checkpoint):
        notes.append(
            f"{len(plain)} weights are stored as float8 without scales ({plain[0].name}, for one), "
            "and taken for the numbers they stand for; mlx-lm takes the base's for whole numbers"
        )
    if types := decoded_types(checkpoint.headers):
        pairs = {checkpoint.tensors[name].dtype: taken for name, taken in types.items()}
        words = ", ".join(f"{stored} as {taken}" for stored, taken in sorted(pairs.items()))
        notes.append(
            f"{len(types)} weights are stored in types that mlx-lm cannot load "
            f"({next(iter(types))}, for one); they are taken {words}"
        )
    return tuple(notes)


def _sanitized(
    checkpoint: Checkpoint,
    model: Any,
    config: Mapping[str, Any],
    arrays: "Mapping[str, mx.array]",
    compute: Callable[[str], Array],
) -> SanitizedModel:
    specs = {
        path: QuantSpec(module.bits, module.group_size, getattr(module, "mode", "affine"))
        for path, module in model.named_modules()
        if hasattr(module, "bits") and hasattr(module, "group_size") and "scales" in module
    }
    tensors = {
        name: LazyTensor(name, _DTYPES[str(a.dtype).rpartition(".")[2]], tuple(a.shape), compute)
        for name, a in arrays.items()
    }
    merged = dict(checkpoint.config)
    for key in ("quantization", "quantization_config"):
        if key in config:
            merged[key] = config[key]
    return SanitizedModel(
        checkpoint.folder,
        MappingProxyType(merged),
        checkpoint.headers,
        MappingProxyType(tensors),
        MappingProxyType(specs),
    )
