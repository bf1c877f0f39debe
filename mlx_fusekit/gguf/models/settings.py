"""What a model's configuration says, with the defaults that mlx-lm's class fills in."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.mlx_lm import MLX_LM_ERRORS, build, model_classes, one_line
from mlx_fusekit.checkpoint.plausible import limited_building
from mlx_fusekit.errors import CheckpointError


@dataclass(frozen=True)
class Settings:
    """A text model's configuration, read by key.

    Attributes:
        path: of ``config.json``, for messages.
        declared: what the file says; a ``text_config`` lies on top of what is around it.
        used: what mlx-lm's class makes of it, with its defaults.
    """

    path: Path
    declared: Mapping[str, Any]
    used: Mapping[str, Any]

    @classmethod
    def of(cls, base: BaseModel) -> "Settings":
        """The settings of a base model.

        Raises:
            CheckpointError: when mlx-lm makes nothing of the configuration.
        """
        path = base.folder / "config.json"
        config = copy.deepcopy(dict(base.config))  # mlx-lm's classes change what they are given
        text = config.get("text_config")
        declared = {**config, **text} if isinstance(text, dict) else config
        return cls(path, copy.deepcopy(declared), _used(path, config))

    def get(self, key: str, default: Any = None) -> Any:
        """What mlx-lm uses, else what the file says; null counts as missing."""
        for source in (self.used, self.declared):
            if source.get(key) is not None:
                return source[key]
        return default

    def __getitem__(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise CheckpointError(f"{self.path}: has no {key}, which llama.cpp needs; add it")
        return value

    def refuse(self, what: str) -> CheckpointError:
        """The error for a setting that llama.cpp cannot run; ``what`` says it and the cure."""
        return CheckpointError(f"{self.path}: {what}")

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(self["num_attention_heads"])

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads."""
        return int(self.get("num_key_value_heads", self.heads))

    @property
    def head_dim(self) -> int:
        """Width of a head; classes without a field for it divide the hidden size."""
        return int(self.used.get("head_dim") or self["hidden_size"] // self.heads)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self["num_hidden_layers"])

    def layer_numbers(self) -> Iterator[int]:
        """0 to the number of layers."""
        return iter(range(self.layers))


def _used(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of mlx-lm's class, of the text model where it is inside another."""
    try:
        model_class, arguments_class = model_classes(config)
        arguments: Any = arguments_class.from_dict(config)  # type: ignore[attr-defined]
        if isinstance(getattr(arguments, "text_config", None), dict):
            with limited_building(config, path):
                arguments = model_class(arguments).language_model.args
    except CheckpointError:
        raise
    except MLX_LM_ERRORS as error:
        raise CheckpointError(f"{path}: mlx-lm cannot use it ({one_line(error)})") from error
    return dict(vars(arguments))


def parameter_shapes(base: BaseModel) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that mlx-lm's class has, unquantized; nothing is computed.

    Raises:
        CheckpointError: when mlx-lm makes no model of the configuration.
    """
    from mlx.utils import tree_flatten

    try:
        model = build(base.config)
    except CheckpointError:
        raise
    except MLX_LM_ERRORS as error:
        path = base.folder / "config.json"
        raise CheckpointError(f"{path}: mlx-lm makes no model of it ({one_line(error)})") from error
    parameters: Any = tree_flatten(model.parameters())
    return {name: tuple(array.shape) for name, array in parameters}
