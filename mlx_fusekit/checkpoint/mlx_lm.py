"""What mlx-lm's model classes know of a checkpoint without its weights."""

import inspect
from collections.abc import Mapping
from typing import Any


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
    try:
        model_class, arguments_class = model_classes(config)
        model: Any = model_class(arguments_class.from_dict(dict(config)))  # type: ignore[attr-defined]
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    modules = [(path, module) for path, module in model.named_modules() if "weight" in module]
    return {path: module.weight.shape[-1] for path, module in modules if module.weight.ndim > 1}
