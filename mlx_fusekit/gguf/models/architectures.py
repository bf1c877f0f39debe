"""What a GGUF file of a model holds: the architecture's name, its hyperparameters, its tensors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import gguf
import numpy as np
import numpy.typing as npt

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.gguf.models import linear_attention
from mlx_fusekit.gguf.models.families import FAMILIES, Family, add_one
from mlx_fusekit.gguf.models.hyperparameters import DEFAULT_CONTEXT, Hyperparameters, evaluate
from mlx_fusekit.gguf.models.naming import (
    Names,
    in_file_order,
    interleaved_rows,
    leaf,
    needs_float32,
    parts_of,
)
from mlx_fusekit.gguf.models.rope import Rope, rope_of
from mlx_fusekit.gguf.models.settings import Settings, parameter_shapes
from mlx_fusekit.gguf.models.tensors import GgufTensor

Rows = npt.NDArray[np.int64]
Transform = Callable[[Float32], Float32]


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
    if model_type not in FAMILIES:
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
    names = Names(family.gguf, settings.layers)
    notes = [note for check in family.checks if (note := check(settings)) is not None]
    _check(family, settings)
    rope = rope_of(settings, family.rope, family.rope_dims(settings))
    if settings.get("max_position_embeddings") is None:
        notes.append(f"config.json has no max_position_embeddings; the file says {DEFAULT_CONTEXT}")
    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.gguf]]
    hyperparameters = {**evaluate(family.keys, settings), **rope.keys}
    return Layout(
        architecture,
        {f"{architecture}.{name}": value for name, value in hyperparameters.items()},
        _Tensors(base, family, settings, names).all(rope),
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
    if _rotates_pairs(family, settings) and not family.pairs_side_by_side:
        raise settings.refuse(
            "rope_traditional is true, which llama.cpp does not run in this architecture, so the "
            "model cannot be exported"
        )
    if family.rotates_pairs and not _rotates_pairs(family, settings):
        raise settings.refuse(
            "rope_traditional is false, which llama.cpp does not run in this architecture, so the "
            "model cannot be exported"
        )


def _rotates_pairs(family: Family, settings: Settings) -> bool:
    return bool(settings.used.get("rope_traditional", family.rotates_pairs))


class _Tensors:
    """The tensors of one model's file, from the names and shapes of the stored ones."""

    def __init__(self, base: BaseModel, family: Family, settings: Settings, names: Names) -> None:
        self._base = base
        self._family = family
        self._settings = settings
        self._names = names
        self._orders: dict[int, Rows] = {}

    def all(self, rope: Rope) -> tuple[GgufTensor, ...]:
        """Every tensor, in the order of the file."""
        stored = self._base.tensors
        beside = parts_of(stored, self._base.quantized_modules)
        self._check_complete()
        made = [t for name in stored if name not in beside for t in self._made_from(name)]
        tensors = {tensor.name: tensor for tensor in [*made, *rope.tensors]}
        if len(tensors) < len(made) + len(rope.tensors):
            twice = next(tensor for tensor in made if tensors[tensor.name] is not tensor)
            raise self._refusal(twice.source, f"has the same GGUF name as another, {twice.name}")
        if self._family.needs_head and "output.weight" not in tensors:
            tensors["output.weight"] = replace(tensors["token_embd.weight"], name="output.weight")
        return tuple(tensors[name] for name in in_file_order(tensors))

    def _check_complete(self) -> None:
        """Check that the stored tensors are those of mlx-lm's class, in name and shape."""
        for name, shape in parameter_shapes(self._base).items():
            if name not in self._base.tensors:
                if name.endswith("lm_head.weight") and self._family.may_lack_head:
                    continue
                raise self._refusal(name, "is missing; download the model again")
            if (found := self._shape(name)) != shape:
                raise self._refusal(
                    name, f"has shape {list(found)}, but config.json makes it {list(shape)}"
                )

    def _made_from(self, stored: str) -> Iterable[GgufTensor]:
        shape = self._shape(stored)
        if stored.endswith("linear_attn.in_proj_qkvz.weight"):
            return self._split(stored, shape)
        if (name := self._names.of(stored)) is None:
            raise self._refusal(
                stored, "is none that llama.cpp knows in this architecture; it cannot be exported"
            )
        if name.endswith(".bias") and leaf(name) not in self._family.biases:
            raise self._refusal(
                stored, "is a bias that llama.cpp leaves out here; the model cannot be exported"
            )
        order = self._order(stored, name)
        shape = _without_ones(name, shape)
        rows, transforms = (order, []) if _in_rows(name, shape) else (None, _reordering(order))
        if name.endswith("ssm_out.weight") and (columns := self._tiled(stored)) is not None:
            transforms.append(partial(np.take, indices=columns, axis=-1))
        transforms += self._arithmetic(stored, name)
        transform = partial(_in_turn, transforms, shape) if transforms else None
        return [
            GgufTensor(name, stored, shape, rows, transform, needs_float32(name, shape)),
        ]

    def _shape(self, stored: str) -> tuple[int, ...]:
        source = self._base.tensors[stored]
        module = stored.removesuffix(".weight")
        if module == stored or (spec := self._base.quantization(module)) is None:
            return tuple(source.shape)
        return (*source.shape[:-1], spec.columns(source.shape[-1]))

    def _split(self, stored: str, shape: tuple[int, ...]) -> list[GgufTensor]:
        block = f"blk.{stored.split('.layers.')[1].split('.')[0]}"
        parts = linear_attention.split_qkvz(self._settings)
        return [
            GgufTensor(f"{block}.{part}", stored, (len(rows), shape[1]), rows)
            for part, rows in parts.items()
        ]

    def _order(self, stored: str, name: str) -> Rows | None:
        """In which order the first dimension goes to the file, None for the stored one."""
        if name.endswith(("attn_q.weight", "attn_q.bias")):
            return self._interleaved(self._settings.heads)
        if name.endswith(("attn_k.weight", "attn_k.bias")):
            return self._interleaved(self._settings.key_value_heads)
        return self._tiled(stored) if not name.endswith("ssm_out.weight") else None

    def _tiled(self, stored: str) -> Rows | None:
        if not self._family.tiles_values or ".linear_attn." not in stored:
            return None
        return linear_attention.tiled_order(self._settings, stored)

    def _interleaved(self, heads: int) -> Rows | None:
        family, settings = self._family, self._settings
        if not family.pairs_side_by_side or _rotates_pairs(family, settings):
            return None
        if heads not in self._orders:
            self._orders[heads] = interleaved_rows(heads, settings.head_dim)
        return self._orders[heads]

    def _arithmetic(self, stored: str, name: str) -> list[Transform]:
        if self._family.plus_one and name.endswith("_norm.weight"):
            return [add_one]
        return [linear_attention.minus_exp] if stored.endswith(".A_log") else []

    def _refusal(self, stored: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self._base.folder}: the tensor {stored} {what}")


def _without_ones(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that llama.cpp wants where mlx-lm keeps dimensions of one."""
    if name.endswith(("ssm_conv1d.weight", "shortconv.conv.weight")):
        return shape[:-1]
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return shape[1:]
    return shape


def _in_rows(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the first dimension of a tensor is its rows as they are stored."""
    return len(shape) == 2 and not name.endswith("ssm_conv1d.weight")


def _reordering(order: Rows | None) -> list[Transform]:
    return [] if order is None else [partial(np.take, indices=order, axis=0)]


def _in_turn(transforms: list[Transform], shape: tuple[int, ...], values: Float32) -> Float32:
    for transform in transforms:
        values = transform(values)
    return values.reshape(shape)
