"""Whether an adapter fits its base: the name, the modules that mlx-lm would adapt, the tokens."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from mlx_fusekit.adapters.mlx_lm_settings import AdapterSettings
from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.checkpoint.folder import optional_json
from mlx_fusekit.checkpoint.json_text import MOST_OF_TOKENIZER, shown
from mlx_fusekit.checkpoint.mlx_lm import adapted_modules
from mlx_fusekit.errors import AdapterError, CheckpointError
from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.reading import exists

_NAMED = 3
_LONGEST_NAME = 200
_PRECISION = re.compile(
    r"([-_.](unsloth|mlx|hf|bnb|awq|gptq|dwq|qat|mxfp[48]|nvfp4|bf16|fp16|fp32|bfloat16|float16|"
    r"float32|q[2-8]|int[48]|[2-8]-?bits?))+$"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


def check_targeted(
    settings: AdapterSettings, file: Path, modules: Collection[str], base: BaseModel
) -> None:
    """Refuse what mlx-lm would not load: tensors outside the layers and keys of the settings.

    Its model says which modules those are; where it has none for the base, nothing is refused. It
    is asked only where names alone leave doubt: importing mlx-lm takes longer than most fuses.

    Args:
        settings: of the adapter.
        file: of its weights, for the message.
        modules: that the weights are for.
        base: the model they are merged into.

    Raises:
        AdapterError: naming the first such module.
    """
    keys, last = settings.keys, settings.num_layers or 0
    known = [module for module in modules if f"{module}.weight" in base.tensors]
    if all(_surely_adapted(module, base, last, keys) for module in known):
        return
    try:
        adapted = adapted_modules(base.config, last, keys)
        if adapted is None or adapted.issuperset(known):
            return
        in_all_layers = adapted_modules(base.config, 0, keys) or frozenset()
    except CheckpointError as error:
        raise AdapterError(f"{settings.path}: {error}") from error
    for module in known:
        if module in adapted:
            continue
        if module in in_all_layers:
            raise AdapterError(
                f"{file}: {module} is not among the last {last} layers (num_layers in "
                f"{settings.path.name}) of {base.layer_count or 'the model'}, so mlx-lm would not "
                "load it; correct num_layers"
            )
        if keys is not None:
            raise AdapterError(
                f"{file}: {module} is not among lora_parameters.keys of {settings.path.name}, "
                "so mlx-lm would not load it; add its key there if it was trained"
            )


def _surely_adapted(
    module: str, base: BaseModel, num_layers: int, keys: Sequence[str] | None
) -> bool:
    """Whether a module's name alone says so, as in models whose layers are called ``layers.N``."""
    if keys is not None and module in keys:
        return True
    layer = _LAYER.search(module)
    if layer is None or (keys is not None and layer[2] not in keys):
        return keys is None and num_layers <= 0
    total = base.layer_count
    return num_layers <= 0 or (total is not None and int(layer[1]) >= total - num_layers)


def fit_vocabulary(
    file: Path, base: BaseModel, module: str, weight: TensorSource, up: Float32
) -> tuple[Float32, str | None]:
    """Fit the update of an embedding or head to a base that has another number of tokens.

    The rows that only the base has stay as they are; rows that only the adapter has can be left
    out where they are zero.

    Args:
        file: of the adapter's weights, for the message.
        base: what it is merged into.
        module: the module's path.
        weight: the base's.
        up: ``[1, rows, rank]``.

    Returns:
        ``up`` with as many rows as the base has, and what the user should know.

    Raises:
        AdapterError: for tokens that the base has no rows for, naming them.
    """
    rows, tokens = up.shape[1], weight.shape[0]
    if rows == tokens or len(weight.shape) != 2 or vocabulary_size(base) != tokens:
        return up, None
    if rows < tokens:
        missing = np.zeros((1, tokens - rows, up.shape[2]), np.float32)
        note = (
            f"{module}: the adapter knows {rows} tokens and the base has {tokens}; "
            f"tokens {rows} to {tokens - 1} stay as they are in the base"
        )
        return np.concatenate([up, missing], axis=1), note
    named = token_names(range(tokens, rows), file.parent, base.folder)
    if up[:, tokens:].any():
        refuse_vocabulary(file, base, module, weight, rows)
    note = f"{module}: tokens {named} are not in the base, and the adapter does not change them"
    return up[:, :tokens], note


def refuse_vocabulary(
    file: Path, base: BaseModel, module: str, weight: TensorSource, rows: int
) -> None:
    """Refuse a module with another number of tokens than the base has, if it is that.

    Raises:
        AdapterError: naming the tokens that the base lacks.
    """
    tokens = weight.shape[0]
    if rows == tokens or len(weight.shape) != 2 or vocabulary_size(base) != tokens:
        return
    if rows < tokens:
        what = f"{module} has {rows} tokens, and the base {tokens}"
    else:
        named = token_names(range(tokens, rows), file.parent, base.folder)
        what = f"{module} has tokens {named}, for which the base, with {tokens}, has no rows"
    raise AdapterError(
        f"{file}: {what}; fuse into the model with the vocabulary that the adapter was trained on"
    )


def vocabulary_size(base: BaseModel) -> int | None:
    """Number of tokens that the base's embedding has rows for, as its configuration says."""
    text = base.config.get("text_config")
    for block in (base.config, text if isinstance(text, dict) else {}):
        if isinstance(block.get("vocab_size"), int):
            return int(block["vocab_size"])
    return None


def token_names(ids: range, *folders: Path) -> str:
    """Tokens for a message: their ids, and the names that a tokenizer in the folders gives them."""
    names: dict[int, str] = {}
    for folder in folders:
        names = {**_added_tokens(folder), **names}
    known = [shown(names[token]) for token in ids if token in names]
    span = f"{ids[0]} to {ids[-1]}" if len(ids) > 1 else str(ids[0])
    more = ", ..." if len(known) > _NAMED else ""
    return f"{span} ({', '.join(known[:_NAMED])}{more})" if known else span


def _added_tokens(folder: Path) -> dict[int, str]:
    """Tokens added to a vocabulary, by id; none where the tokenizer does not tell."""
    try:
        content = optional_json(folder, "tokenizer.json", **MOST_OF_TOKENIZER) or {}
        added: Iterable[dict[str, object]] = content["added_tokens"]
        return {int(str(token["id"])): str(token["content"]) for token in added}
    except (ValueError, KeyError, TypeError):
        return {}


def closest(name: str, base: BaseModel) -> str:
    """The module of the base whose name is the most like this one, in words."""
    module = name.removesuffix(".weight")
    known = {tensor.rpartition(".")[0] for tensor in base.tensors}
    match = difflib.get_close_matches(module, known, n=1)
    return f" (closest: {match[0]})" if match else ""


def base_warnings(trained_on: str | None, base_id: str | None) -> tuple[str, ...]:
    """What to tell where an adapter was trained on a base of another name."""
    if trained_on is None or base_id is None:
        return ()
    if _model_name(trained_on) == _model_name(base_id):
        return ()
    same = _without_precision(trained_on) == _without_precision(base_id)
    if len(trained_on) > _LONGEST_NAME:
        trained_on = trained_on[:_LONGEST_NAME] + "…"
    if same:
        return (
            f"the adapter was trained on {trained_on}, whose weights are rounded in another way "
            f"than {base_id}'s; it has not seen the error of that, whose size beside the update's "
            "`mlx-fusekit inspect ADAPTER --model BASE` shows",
        )
    return (
        f"the adapter was trained on {trained_on}, not on {base_id}; "
        "if they differ in more than the name, the result will be wrong",
    )


def is_same_model(one: str, other: str) -> bool:
    """Whether two Hub ids or paths name the same model, as far as names tell."""
    return _model_name(one) == _model_name(other)


def _without_precision(id_or_path: str) -> str:
    """The name of a model without what says how its weights are stored."""
    return _PRECISION.sub("", _model_name(id_or_path))


def _model_name(id_or_path: str) -> str:
    """The part of a Hub id, folder or cache path that names the model."""
    if cached := re.search(r"models--([^/\\]+)[/\\]snapshots", id_or_path):
        return cached[1].split("--")[-1].lower()
    try:
        is_path = exists(Path(id_or_path))
    except OSError:  # a name that no file system takes, or a folder that may not be read
        is_path = False
    name = Path(id_or_path).resolve().name if is_path else id_or_path.rstrip("/").split("/")[-1]
    return name.lower()
