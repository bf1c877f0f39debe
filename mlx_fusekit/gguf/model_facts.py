"""What a GGUF file tells people of its model: names, origin, license, languages, tags.

gguf's own ``Metadata`` holds the facts and writes them. Its ``load()`` is not used: it takes over
paths of this machine, capitalizes names, and fails at a damaged card.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from gguf import GGUFWriter, Metadata

from mlx_fusekit.checkpoint.folder import optional_json
from mlx_fusekit.checkpoint.front_matter import front_matter
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.hub import LocalFolder

_HUB = "https://huggingface.co/"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: What begins a path of somebody's machine: absolute, relative, of a drive or a share, or a URL.
_LOCAL = re.compile(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|file:", re.IGNORECASE)
_LONGEST = 2_000
#: Tags that are true of the MLX model only.
_NOT_OURS = ("mlx", "mlx-my-repo")
#: A name with one of these makes llama.cpp look for tokens, and fail to load without them.
_PHI_3_NAMES = re.compile(r"phi-?3", re.IGNORECASE)
_PHI_3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")


def read_model_facts(folder: LocalFolder) -> Metadata:
    """Facts from the model card, ``fusekit.json`` and ``config.json`` of a model folder.

    All three may be missing or incomplete; what is not there is left out. Nothing of it names a
    place on this machine.

    Raises:
        CheckpointError: when ``fusekit.json`` or ``config.json`` is not a JSON object.
    """
    recipe = _optional(folder, RECIPE_NAME)
    card = front_matter(folder.path)
    if "license" not in card:
        card = {**card, **_block(_block(recipe, "base"), "license")}
    repo_id = folder.repo_id if folder.repo_id and _REPO_ID.fullmatch(folder.repo_id) else None
    url = f"{_HUB}{repo_id}" if repo_id else None
    return Metadata(
        name=_text(card.get("model_name")) or folder.public_name.rpartition("/")[2],
        organization=repo_id.partition("/")[0] if repo_id else None,
        description=_text(card.get("description")) or _description(recipe),
        quantized_by=_quantized_by(card, repo_id, _optional(folder, "config.json")),
        license=", ".join(_texts(card.get("license"))) or None,
        license_name=_text(card.get("license_name")),
        license_link=_link(card.get("license_link")),
        source_url=url,
        source_repo_url=url,
        base_models=_base_models(card, recipe) or None,
        tags=_tags(card) or None,
        languages=_texts(card.get("language")) or None,
    )


def add_facts(facts: Metadata, writer: GGUFWriter, token_texts: Collection[str] = ()) -> None:
    """Add the keys under ``general.`` that people read.

    Args:
        facts: of the model.
        writer: of the GGUF file.
        token_texts: of the vocabulary; see :func:`loadable_name`.
    """
    name = loadable_name(facts.name, token_texts)
    replace(facts, name=name).set_gguf_meta_model(writer)


def loadable_name(name: str, token_texts: Collection[str]) -> str:
    """A model's name, such that llama.cpp loads the model.

    It treats models of certain names in a way of their own, and fails to load one that has not the
    tokens for it.
    """
    if all(text in token_texts for text in _PHI_3_TOKENS):
        return name
    return _PHI_3_NAMES.sub("Phi 3", name)


def base_model(identifier: str) -> dict[str, str]:
    """What a file says of a model it was made from, by Hub id or bare name."""
    owner, _, name = identifier.rpartition("/")
    spaced = " ".join(re.split(r"[-_]+", name)).strip() or name
    if not owner:
        return {"name": spaced}
    return {"name": spaced, "organization": owner, "repo_url": f"{_HUB}{identifier}"}


def _optional(folder: LocalFolder, name: str) -> Mapping[str, Any]:
    return optional_json(folder.path, name) or {}


def _base_models(card: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[dict[str, str]]:
    """From ``fusekit.json``, which knows what was fused, else from the card."""
    fused = list(_identifiers([_block(recipe, "base").get("id")]))
    return [base_model(name) for name in fused or _identifiers(_listed(card.get("base_model")))]


def _description(recipe: Mapping[str, Any]) -> str | None:
    base = next(_identifiers([_block(recipe, "base").get("id")]), None)
    adapters = recipe.get("adapters")
    names = _identifiers(
        [a.get("id") for a in adapters if isinstance(a, dict)] if isinstance(adapters, list) else []
    )
    if base is None or not (listed := " and ".join(names)):
        return None
    return f"{base} with {listed} fused into it by mlx-fusekit."


def _quantized_by(
    card: Mapping[str, Any], repo_id: str | None, config: Mapping[str, Any]
) -> str | None:
    quantized = "quantization" in config or "quantization_config" in config
    owner = repo_id.partition("/")[0] if repo_id and quantized else None
    return _text(card.get("quantized_by")) or owner


def _tags(card: Mapping[str, Any]) -> list[str]:
    tags = [*_texts(card.get("tags")), *_texts(card.get("pipeline_tag"))]
    return list(dict.fromkeys(tag for tag in tags if tag not in _NOT_OURS))


def _identifiers(values: list[Any]) -> Iterator[str]:
    """Hub ids and bare names; anything that may be a path is left out."""
    for value in values:
        text = _text(value)
        if text and ("/" not in text or _REPO_ID.fullmatch(text)) and "\\" not in text:
            yield text


def _text(value: Any) -> str | None:
    """A text that may be shown: not empty, of moderate length, and no path."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text[:_LONGEST] if text and not _LOCAL.match(text) else None


def _texts(value: Any) -> list[str]:
    return [text for item in _listed(value) if (text := _text(item))]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _link(value: Any) -> str | None:
    text = _text(value)
    return text if text and text.startswith(("https://", "http://")) else None


def _block(recipe: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = recipe.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{RECIPE_NAME}: {key} must be a JSON object; remove the file")
    return value or {}
