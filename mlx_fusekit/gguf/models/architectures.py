"""What a GGUF file of a model holds: the architecture's name, its hyperparameters, its tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property

import gguf
import numpy as np

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.beside_text import in_words
from mlx_fusekit.checkpoint.mlx_lm import one_line
from mlx_fusekit.checkpoint.sanitized import beside_text
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.quantization import parts_of
from mlx_fusekit.gguf.models.changes import INTERLEAVED, Change, Indices, Order
from mlx_fusekit.gguf.models.families import FAMILIES
from mlx_fusekit.gguf.models.family import Family
from mlx_fusekit.gguf.models.hyperparameters import DEFAULT_CONTEXT, Hyperparameters, evaluate
from mlx_fusekit.gguf.models.naming import (
    Names,
    in_file_order,
    leaf,
    needs_float32,
)
from mlx_fusekit.gguf.models.rope import Rope, rope_of
from mlx_fusekit.gguf.models.settings import Settings, parameter_shapes
from mlx_fusekit.gguf.models.tensors import GgufTensor

#: What reckoning with settings of any type and size raises.
_SENSELESS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


@dataclass(frozen=True)
class Layout:
    """What a GGUF file of one model holds, beside its vocabulary and the facts for people.

    Attributes:
        architecture: llama.cpp's name, as ``qwen2moe``.
        hyperparameters: by full key name, each with its GGUF type.
        tensors: in the order of the file.
        notes: what the user should know, where mlx-lm and llama.cpp run the model differently.
    """

    architecture: str
    hyperparameters: Hyperparameters
    tensors: tuple[GgufTensor, ...]
    notes: tuple[str, ...]

    def tensors_of(self, module: str) -> tuple[GgufTensor, ...]:
        """The tensors made from a module's weight: one, or several where llama.cpp splits it."""
        return tuple(tensor for tensor in self.tensors if tensor.source == f"{module}.weight")


@dataclass(frozen=True, slots=True)
class Supported:
    """A row of the table of supported architectures."""

    model_type: str
    architecture: str
    notes: str


def supported() -> tuple[Supported, ...]:
    """Every model type that can be exported, sorted."""
    return tuple(
        Supported(name, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.gguf]], family.notes)
        for name, family in sorted(FAMILIES.items())
        if hasattr(gguf.MODEL_ARCH, family.gguf)
    )


def family_of(base: BaseModel) -> Family:
    """How models of this type become GGUF.

    Raises:
        CheckpointError: for a type that cannot be exported, listing those that can.
    """
    model_type = base.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(
            f"{base.folder / 'config.json'}: models of type {model_type!r} cannot be exported to "
            f"GGUF yet; these can: {known}"
        )
    return FAMILIES[model_type]


def lay_out(base: BaseModel) -> Layout:
    """What a GGUF file of a model holds; reads headers only.

    Raises:
        CheckpointError: for a type, a setting or a tensor that llama.cpp cannot run, naming it.
    """
    family = family_of(base)
    settings = Settings.of(base)
    try:
        return _lay_out(base, family, settings)
    except CheckpointError:
        raise
    except _SENSELESS as error:
        raise settings.refuse(
            f"has a setting of a type or size that makes no sense ({one_line(error)}); correct it, "
            "or if mlx-lm runs the model, report this"
        ) from error


def _lay_out(base: BaseModel, family: Family, settings: Settings) -> Layout:
    if not 0 < settings.layers <= len(base.tensors):
        raise settings.refuse(
            f"has {settings.layers:g} layers, and the weights are {len(base.tensors)} tensors; "
            "correct num_hidden_layers"
        )
    names = Names(family.gguf, settings.layers)
    notes = [note for check in family.checks if (note := check(settings)) is not None]
    _check(family, settings)
    plain = evaluate(family.keys, settings)
    tensors = _Tensors(base, family, settings, names)
    # Before anything is made of a size that the configuration declares.
    tensors.check_complete()
    rope = rope_of(settings, family.rope, family.rope_dims(settings))
    if settings.get("max_position_embeddings") is None:
        notes.append(f"config.json has no max_position_embeddings; the file says {DEFAULT_CONTEXT}")
    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.gguf]]
    hyperparameters = {**plain, **rope.keys}
    if tensors.left_out:
        notes.append(f"a text model is exported, without {in_words(tensors.left_out)}")
    return Layout(
        architecture,
        {f"{architecture}.{name}": value for name, value in hyperparameters.items()},
        tensors.all(rope),
        tuple(notes + rope.notes),
    )


def _check(family: Family, settings: Settings) -> None:
    for key in ("hidden_act", "hidden_activation"):
        activation = settings.get(key)
        if activation is not None and activation not in family.activations:
            listed = " or ".join(sorted(family.activations))
            raise settings.refuse(
                f"{key} is {activation!r}, but llama.cpp runs this architecture with {listed} "
                "only, so the model cannot be exported"
            )
    if family.square_heads and settings.head_dim * settings.heads != settings["hidden_size"]:
        raise settings.refuse(
            f"{settings.heads} heads of width {settings.head_dim} are not the hidden size of "
            f"{settings['hidden_size']}, as llama.cpp takes them to be in this architecture, so "
            "the model cannot be exported"
        )
    traditional = bool(settings.used.get("rope_traditional", family.rotates_pairs))
    if traditional != family.rotates_pairs and not set(INTERLEAVED) <= set(family.changes):
        raise settings.refuse(
            f"rope_traditional is {str(traditional).lower()}, which llama.cpp does not run in this "
            "architecture, so the model cannot be exported"
        )


class _Tensors:
    """The tensors of one model's file, from the names and shapes of the stored ones."""

    def __init__(self, base: BaseModel, family: Family, settings: Settings, names: Names) -> None:
        self._base = base
        self._family = family
        self._settings = settings
        self._names = names
        self._orders: dict[Order, Indices | None] = {}

    def all(self, rope: Rope) -> tuple[GgufTensor, ...]:
        """Every tensor, in the order of the file."""
        stored = self._base.tensors
        beside = parts_of(stored, self._base.quantized_modules)
        beside |= self.left_out
        made = [t for name in stored if name not in beside for t in self._made_from(name)]
        tensors = {tensor.name: tensor for tensor in [*made, *rope.tensors]}
        if len(tensors) < len(made) + len(rope.tensors):
            twice = next(tensor for tensor in made if tensors[tensor.name] is not tensor)
            raise self._refusal(twice.source, f"has the same GGUF name as another, {twice.name}")
        if self._family.needs_head and "output.weight" not in tensors:
            tensors["output.weight"] = replace(tensors["token_embd.weight"], name="output.weight")
        return tuple(tensors[name] for name in in_file_order(tensors))

    @cached_property
    def _parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every parameter of mlx-lm's class."""
        return parameter_shapes(self._base)

    @cached_property
    def left_out(self) -> frozenset[str]:
        """Stored tensors that are no part of the text model, as mlx-lm takes it."""
        if self._base.converted:
            return frozenset(self._base.beside)
        parts = parts_of(self._base.tensors, self._base.quantized_modules)
        unknown = {name for name in self._base.tensors if name not in self._parameters} - set(parts)
        if not unknown:
            return frozenset()
        try:
            return beside_text(self._base) & unknown
        except CheckpointError:  # what llama.cpp does not know either will be said by name
            return frozenset()

    def check_complete(self) -> None:
        """Check that the stored tensors are those of mlx-lm's class, in name and shape."""
        for name, shape in self._parameters.items():
            if name not in self._base.tensors:
                if name.endswith("lm_head.weight") and self._family.may_lack_head:
                    continue
                raise self._refusal(name, "is missing; download the model again")
            if (found := self._shape(name)) != shape:
                raise self._refusal(
                    name, f"has shape {list(found)}, but config.json makes it {list(shape)}"
                )

    def _made_from(self, stored: str) -> Iterable[GgufTensor]:
        for end, split in self._family.splits.items():
            if stored.endswith(end):
                return self._split(stored, split(self._settings))
        if (name := self._names.of(stored)) is None:
            raise self._refusal(
                stored, "is none that llama.cpp knows in this architecture; it cannot be exported"
            )
        if name.endswith(".bias") and leaf(name) not in self._family.biases:
            raise self._refusal(
                stored, "is a bias that llama.cpp leaves out here; the model cannot be exported"
            )
        return [self._changed(GgufTensor(name, stored, self._shape(stored)))]

    def _shape(self, stored: str) -> tuple[int, ...]:
        source = self._base.tensors[stored]
        module = stored.removesuffix(".weight")
        if module == stored or (spec := self._base.quantization(module)) is None:
            return tuple(source.shape)
        return (*source.shape[:-1], spec.columns(source.shape[-1]))

    def _split(self, stored: str, parts: Mapping[str, Indices]) -> list[GgufTensor]:
        block = f"blk.{stored.split('.layers.')[1].split('.')[0]}"
        columns = self._shape(stored)[1]
        return [
            GgufTensor(f"{block}.{part}", stored, (len(rows), columns), rows)
            for part, rows in parts.items()
        ]

    def _changed(self, tensor: GgufTensor) -> GgufTensor:
        """A tensor of the stored values, with what its family does to it."""
        change = self._change(leaf(tensor.name))
        rows, columns = self._order(change.rows), self._order(change.columns)
        # Of a vector, GGUF's columns are the first dimension; of a convolution, rows are the first
        # two of three.
        if rows is not None and len(tensor.shape) == 1:
            rows, columns = None, rows
        elif rows is not None and len(tensor.shape) == 3:
            inner = np.arange(tensor.shape[1])
            rows = (rows[:, None] * len(inner) + inner).reshape(-1)
        shape = tuple(n for i, n in enumerate(tensor.shape) if i != change.squeezed)
        return replace(
            tensor,
            shape=shape,
            rows=rows,
            columns=columns,
            transform=change.values,
            float32=needs_float32(tensor.name, shape),
        )

    def _change(self, name: str) -> Change:
        matching = (c for c in self._family.changes if any(fnmatchcase(name, n) for n in c.names))
        return next(matching, Change())

    def _order(self, order: Order | None) -> Indices | None:
        """Evaluated once for all layers."""
        if order is None:
            return None
        if order not in self._orders:
            self._orders[order] = order(self._settings)
        return self._orders[order]

    def _refusal(self, stored: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self._base.folder}: the tensor {stored} {what}")
