"""What mlx-lm's model classes know of a checkpoint without its weights, and its errors."""

import copy
import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_fusekit.checkpoint.plausible import limited_building
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.specs import QuantSpec

#: What mlx-lm raises for architectures it does not know, weights that do not fit, and settings that
#: are missing, of another type or out of range; where a class needs a package that is missing, it
#: exits.
MLX_LM_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    NameError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    SystemExit,
)
#: Of a list that an error of several lines gives, and of the line that is made of it.
_NAMED = 3
_LONGEST_LINE = 300


def one_line(error: BaseException) -> str:
    """What an error says in its first line, with what follows where that ends with a colon.

    The kind of an error that says nothing; of a missing key, that it is missing.
    """
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, SystemExit):
        return "a package that it needs for that is not installed"
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    if first.endswith(":") and others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        first += " " + ", ".join(line.rstrip(",.") for line in others[:_NAMED]) + more
    return first if len(first) <= _LONGEST_LINE else first[:_LONGEST_LINE] + "…"


def is_pattern(folder: Path) -> bool:
    """Whether mlx-lm, which looks for weights by a pattern, does not find a folder by its path."""
    return not fnmatch.fnmatchcase(str(folder), str(folder))


def load_lazily(
    folder: Path,
    *,
    weights: Path | None = None,
    trust_remote_code: bool = False,
    classes: "Callable[[dict[str, Any]], tuple[type, type]] | None" = None,
) -> tuple[Any, dict[str, Any]]:
    """mlx-lm's model of a folder and its configuration; weights are read when they are first used.

    Args:
        folder: of the model.
        weights: the folder that its weights are loaded from, where that is another.
        trust_remote_code: whether model code that lies in the folder may run.
        classes: in the place of :func:`model_classes`.

    Raises:
        CheckpointError: in one line, where mlx-lm cannot load the folder.
    """
    from mlx_lm.utils import load_config, load_model

    if is_pattern(folder):
        raise CheckpointError(
            f"{folder}: mlx-lm takes the brackets in this path for a pattern and finds no weights; "
            "rename the folder"
        )
    config: dict[str, Any] = {}
    try:
        config = load_config(folder)
        # Where it has another name than mlx-lm looks for.
        block = quantization_block(config)
        model, config = load_model(
            weights or folder,
            lazy=True,
            model_config={"quantization": block} if block else None,
            get_model_classes=_checked_classes(classes or model_classes, folder),
            trust_remote_code=trust_remote_code,
        )
    except CheckpointError:
        raise  # in our own words
    except MLX_LM_ERRORS as error:
        method = foreign_quantization(config)
        if method is None and (folder / "hf_quant_config.json").exists():
            method = "modelopt"  # which keeps its settings there
        failure = f"mlx-lm cannot load it ({one_line(error)})"
        if method is not None:
            failure = f"is quantized with {method}, and {failure}; use the 16-bit original instead"
        raise CheckpointError(f"{folder}: {failure}") from error
    return model, config


def _checked_classes(
    classes: Callable[[dict[str, Any]], tuple[type, type]], folder: Path
) -> Callable[[dict[str, Any]], tuple[type, type]]:
    """Classes that refuse to build without end, and weights whose groups would have no columns.

    MLX divides by the size of a group unasked, which ends the process where it is 0.
    """

    def checked(config: dict[str, Any]) -> tuple[type, type]:
        model_class, arguments_class = classes(config)

        class Checked(model_class):  # type: ignore[misc,valid-type]
            def __init__(self, arguments: Any) -> None:
                with limited_building(config, folder / "config.json"):
                    super().__init__(arguments)

            def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
                self.__class__ = model_class  # from here on it is mlx-lm's own
                found: dict[str, Any] = getattr(self, "sanitize", dict)(weights)
                _check_groups(self, found, config.get("quantization"), folder)
                return found

        return Checked, arguments_class

    return checked


def _check_groups(model: Any, weights: Mapping[str, Any], block: Any, folder: Path) -> None:
    blocks = {"quantization": block, **block} if isinstance(block, dict) else {}
    for name, settings in blocks.items():
        size = settings.get("group_size") if isinstance(settings, dict) else None
        if size is not None and not (isinstance(size, int | float) and size >= 1):
            raise CheckpointError(
                f"{folder / 'config.json'}: the group_size of {name} is {size!r}; correct it"
            )
    for name, module in model.named_modules():
        scales = weights.get(f"{name}.scales")
        if scales is None or "weight" not in module:
            continue
        # Of AWQ and GPTQ, whose groups are rows until mlx-lm converts them.
        axis = 0 if f"{name}.qweight" in weights else -1
        columns, groups = module.weight.shape[-1], scales.shape[axis] if scales.ndim else 1
        if columns < groups:
            raise CheckpointError(
                f"{folder / 'config.json'}: makes {name} {columns} columns wide, but its scales "
                f"are {groups} a row; correct the sizes, or download the model again"
            )


def quantization_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """MLX's quantization block of a configuration; empty when there is none.

    mlx-lm writes it under two names and reads one; a block under the other that names no method is
    MLX's too.
    """
    block = config.get("quantization")
    if block is None:
        block = _quantization_config(config)
        if isinstance(block, dict) and "quant_method" in block:
            return {}
    return block if isinstance(block, dict) and {"bits", "group_size"} <= set(block) else {}


def foreign_quantization(config: Mapping[str, Any]) -> str | None:
    """Whose quantization a configuration names that mlx-lm has to convert; None for MLX's or none.

    As mlx-lm, which asks for it only where there is no block of MLX's.
    """
    block = _quantization_config(config)
    if config.get("quantization") is not None or not block or quantization_block(config):
        return None
    settings = block if isinstance(block, dict) else {}
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"  # whose older configurations have no name
    return str(settings.get("quant_method") or "a method that config.json does not name")


def _quantization_config(config: Mapping[str, Any]) -> Any:
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    return config.get("quantization_config", inner)


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


def embedding_modules(config: Mapping[str, Any]) -> frozenset[str]:
    """Paths of the embeddings of tokens or positions; nothing is computed.

    Returns:
        None of a configuration that mlx-lm makes no model of.
    """
    import mlx.nn as nn

    model = _skeleton(config)
    if model is None:
        return frozenset()
    kinds = nn.Embedding, nn.QuantizedEmbedding
    return frozenset(path for path, module in model.named_modules() if isinstance(module, kinds))


def adaptable_modules(config: Mapping[str, Any]) -> frozenset[str] | None:
    """Paths of the modules that mlx-lm has adapter layers for; nothing is computed.

    Returns:
        None for a configuration that mlx-lm makes no model of.
    """
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import SwitchLinear

    model = _skeleton(config)
    if model is None:
        return None
    kinds = nn.Linear, nn.Embedding, SwitchLinear
    found = (p for p, m in model.named_modules() if isinstance(m, kinds) or hasattr(m, "to_lora"))
    return frozenset(found)


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
            f"mlx-lm cannot adapt what lora_parameters.keys names ({one_line(error)})"
        ) from error
    return frozenset(path for path, module in model.named_modules() if "lora_a" in module)


def quantizable_modules(config: Mapping[str, Any], spec: QuantSpec) -> dict[str, QuantSpec]:
    """How mlx-lm quantizes each module that it would quantize, by path; nothing is computed.

    Source: ``quantize_model`` in ``mlx_lm/utils.py``. A class may give some modules another format,
    or none, as most with experts do with their routers.

    Args:
        config: of the model.
        spec: for all that the model's class has no format of its own for.

    Raises:
        CheckpointError: where mlx-lm makes no model of the configuration.
    """
    model = _skeleton(config)
    if model is None:
        raise CheckpointError(
            f"mlx-lm makes no model of the type {config.get('model_type')!r}, and so does not say "
            "what of it is to be quantized; drop --quantize"
        )
    told: Callable[[str, Any], Any] | None = getattr(model, "quant_predicate", None)
    found = {}
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % spec.group_size:
            continue
        asked = True if told is None else told(path, module)
        own = spec
        if isinstance(asked, dict):
            settings = {name: asked.get(name) for name in ("bits", "group_size")}
            own = QuantSpec.of_mode(asked.get("mode") or "affine", **settings)
        if asked and not module.weight.shape[-1] % own.group_size:
            found[path] = own
    return found


def builds(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm makes a model of a configuration."""
    return _skeleton(config) is not None


def computes_anew(config: Mapping[str, Any], name: str) -> bool:
    """Whether mlx-lm computes a parameter anew whenever it loads it, also from a converted model.

    Some classes normalize ``lm_head`` so. Nothing is computed here.
    """
    from mlx.utils import tree_flatten

    model = _skeleton(config)
    if model is None or not hasattr(model, "sanitize"):
        return False
    parameters = dict(tree_flatten(model.parameters()))
    if name not in parameters:
        return False
    try:
        return model.sanitize(dict(parameters)).get(name) is not parameters[name]
    except MLX_LM_ERRORS:
        return False


def build(config: Mapping[str, Any]) -> Any:
    """mlx-lm's model of a configuration, with weights that are never computed.

    Raises:
        CheckpointError: for counts that no model has.
        Exception: one of :data:`MLX_LM_ERRORS`, where mlx-lm makes no model of it.
    """
    own = copy.deepcopy(dict(config))  # mlx-lm's classes change what they are given
    model_class, arguments_class = model_classes(own)
    arguments = arguments_class.from_dict(own)  # type: ignore[attr-defined]
    with limited_building(config):
        return model_class(arguments)


def _skeleton(config: Mapping[str, Any]) -> Any:
    """As :func:`build`; None where mlx-lm makes no model."""
    try:
        return build(config)
    except CheckpointError:
        raise
    except MLX_LM_ERRORS:
        return None
