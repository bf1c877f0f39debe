"""What an adapter does to the weights of a base model, in one form for all formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from mlx_fusekit.adapters.combined import CombinedUpdate
from mlx_fusekit.adapters.ignoring import Ignored
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.checkpoint.header import TensorRef


@dataclass(frozen=True)
class FullUpdate:
    """A full fine-tune's new value of one parameter.

    Attributes:
        tensor: the value, unquantized, in the logical shape of the base's parameter.
    """

    tensor: TensorSource
    is_zero = False
    rank = None

    @property
    def columns(self) -> int:
        """Columns of the value."""
        return self.tensor.shape[-1]


Update = LowRankUpdate | CombinedUpdate | FullUpdate


@dataclass(frozen=True)
class Adapter:
    """An adapter that was checked against its base.

    Attributes:
        weights: updates of modules' weights, by module path.
        parameters: full fine-tune's values of other parameters (norms, biases), by tensor name.
        kind: "lora", "dora" or "full"; "none" of :data:`NO_ADAPTER`.
        warnings: what the user should know, one line each.
    """

    kind: str
    weights: Mapping[str, Update]
    parameters: Mapping[str, FullUpdate]
    warnings: tuple[str, ...] = ()


#: What is fused where nothing is.
NO_ADAPTER = Adapter("none", MappingProxyType({}), MappingProxyType({}))


class AdapterFolder(Protocol):
    """An adapter of any format, opened read-only and checked for itself; nothing is read yet."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]:
        """``adapter_config.json``."""

    @property
    def kind(self) -> str:
        """``lora``, ``dora`` or ``full``."""

    @property
    def files(self) -> tuple[Path, ...]:
        """What the adapter is made of."""

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """As they are stored, by name."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules that have a tensor in it."""

    @property
    def target_tensors(self) -> set[str]:
        """Names of the base's tensors that the adapter changes."""

    @property
    def trained_on(self) -> str | None:
        """The base's name, where it is recorded."""

    @property
    def num_layers(self) -> int | None:
        """How many of the last layers were adapted, where it is recorded."""

    @property
    def rank(self) -> int | None:
        """Of the matrices of LoRA and DoRA, where it is recorded."""

    @property
    def scale(self) -> float:
        """The factor of LoRA's and DoRA's update, of modules that have none of their own."""

    @property
    def ignored(self) -> Ignored:
        """What the user left out of it; nothing else here has any of that."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the adapter by itself, one line each."""

    @property
    def mlx_lm_config(self) -> Mapping[str, Any] | None:
        """``adapter_config.json`` as today's mlx-lm reads it; None where it does not, or not so."""

    def bind(self, base: BaseModel, base_id: str | None = None, *, scaled: bool = True) -> Adapter:
        """Check every tensor against the base and read the adapter into its neutral form.

        Args:
            base: the model it will be merged into.
            base_id: the Hub id or path the user gave for it; compared with the one the adapter
                was trained on, a difference is a warning.
            scaled: whether updates have :attr:`scale` multiplied in.

        Raises:
            AdapterError: naming the first tensor that does not fit, and the cure.
        """
