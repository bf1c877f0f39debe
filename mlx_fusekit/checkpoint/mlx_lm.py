"""What mlx-lm's model classes know of a checkpoint without its weights, and its errors."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_fusekit.errors import CheckpointError

#: What mlx-lm raises for architectures it does not know, weights that do not fit, and settings that
#: are missing or of another type.
MLX_LM_ERRORS = (ValueError, KeyError, TypeError, AttributeError)


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """Say in one line that mlx-lm cannot load a folder.

    Raises:
        CheckpointError: with the first line of mlx-lm's error.
    """
    try:
        yield
    except MLX_LM_ERRORS as error:
        raise CheckpointError(f"{folder}: mlx-lm cannot load it ({first_line(error)})") from error


def model_classes(config: Mapping[str, Any]) -> tuple[type, type]:
    """mlx-lm's model class and arguments class for a configuration.

    Raises:
        ValueError: for an architecture that mlx-lm does not know.
    """
    from mlx_lm.utils import load_model

    # The default of a public parameter: mlx-lm has no other public name for it.
    classes_of = inspect.signature(load_model).parameters["get_model_classes"].default
    classes: tuple[type, type] = classes_of(dict(config))
    return classes


def logical_columns(config: Mapping[str, Any]) -> dict[str, int]:
    """Width of each module's unquantized weight, by module path; nothing is computed.

    Returns:
        An empty mapping for a configuration that mlx-lm makes no model of.
    """
    model = _skeleton(config)
    if model is None:
        return {}
    modules = [(path, module) for path, module in model.named_modules() if "weight" in module]
    return {path: module.weight.shape[-1] for path, module in modules if module.weight.ndim > 1}


def adapted_modules(
    config: Mapping[str, Any], num_layers: int, keys: Sequence[str] | None
) -> frozenset[str] | None:
    """Paths of the modules that mlx-lm would put adapter layers around; nothing is computed.

    Args:
        config: of the model.
        num_layers: how many of the last layers; 0 and less mean all.
        keys: modules, seen from a layer or from the model; None for all that mlx-lm can adapt.

    Returns:
        None for a configuration that mlx-lm makes no model of.

    Raises:
        CheckpointError: with mlx-lm's reason, when it can adapt none of the modules that a key
            names.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = _skeleton(config)
    if model is None:
        return None
    parameters = {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": keys}
    try:
        linear_to_lora_layers(model, num_layers, parameters)
    except MLX_LM_ERRORS as error:
        raise CheckpointError(
            f"mlx-lm cannot adapt what lora_parameters.keys names ({first_line(error)})"
        ) from error
    return frozenset(path for path, module in model.named_modules() if "lora_a" in module)


def builds(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm makes a model of a configuration."""
    return _skeleton(config) is not None


def _skeleton(config: Mapping[str, Any]) -> Any:
    """mlx-lm's model of a configuration, with weights that are never computed; None without one."""
    try:
        model_class, arguments_class = model_classes(config)
        return model_class(arguments_class.from_dict(dict(config)))  # type: ignore[attr-defined]
    except MLX_LM_ERRORS:
        return None
