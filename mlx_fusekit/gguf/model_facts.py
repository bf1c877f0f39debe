"""What a GGUF file tells people of its model: names, origin, licence, languages, tags."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_fusekit.checkpoint.folder import read_json, resolve_inside
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.hub import LocalFolder

if TYPE_CHECKING:
    from gguf import GGUFWriter

_HUB = "https://huggingface.co/"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: What begins a path of somebody's machine: absolute, relative, of a drive or a share, or a URL.
_LOCAL = re.compile(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|file:", re.IGNORECASE)
_LONGEST = 2_000
_LARGEST_CARD = 10_000_000
#: Tags that are true of the MLX model only.
_NOT_OURS = ("mlx", "mlx-my-repo")
#: A name with one of these makes llama.cpp look for tokens, and fail to load without them.
_PHI_3_NAMES = re.compile(r"phi-?3", re.IGNORECASE)
_PHI_3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class Origin:
    """A model that this one was made from.

    Attributes:
        name: its own name.
        organization: who published it, when it is on the Hub.
        repo_url: where it is, when it is on the Hub.
    """

    name: str
    organization: str | None = None
    repo_url: str | None = None

    @classmethod
    def of(cls, identifier: str) -> "Origin":
        """From a Hub id, or a bare name."""
        owner, _, name = identifier.rpartition("/")
        if not owner:
            return cls(_spaced(name))
        return cls(_spaced(name), owner, f"{_HUB}{identifier}")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What people may want to know of a model; nothing of it names a place on this machine.

    Attributes:
        name: of the model.
        organization: who published the MLX model, when it is on the Hub.
        description: one or two sentences.
        licence: identifier, as "apache-2.0".
        licence_name: where the identifier is "other".
        licence_link: where its text is.
        languages: codes, as "en".
        tags: what it is for.
        base_models: what it was made from.
        source_url: the MLX model on the Hub.
        quantized_by: who quantized it.
    """

    name: str
    organization: str | None = None
    description: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    base_models: tuple[Origin, ...] = ()
    source_url: str | None = None
    quantized_by: str | None = None

    def add_to(self, writer: "GGUFWriter", token_texts: Collection[str] = ()) -> None:
        """Add the keys under ``general.`` that people read.

        Args:
            writer: of the GGUF file.
            token_texts: of the vocabulary. llama.cpp treats models of certain names in a way of
                their own, and fails to load one that has not the tokens for it; its name is then
                spelled otherwise.
        """
        writer.add_name(loadable_name(self.name, token_texts))
        for value, add in (
            (self.organization, writer.add_organization),
            (self.description, writer.add_description),
            (self.quantized_by, writer.add_quantized_by),
            (self.licence, writer.add_license),
            (self.licence_name, writer.add_license_name),
            (self.licence_link, writer.add_license_link),
            (self.source_url, writer.add_source_url),
            (self.source_url, writer.add_source_repo_url),
        ):
            if value:
                add(value)
        if self.base_models:
            writer.add_base_model_count(len(self.base_models))
        for place, base in enumerate(self.base_models):
            writer.add_base_model_name(place, base.name)
            if base.organization and base.repo_url:
                writer.add_base_model_organization(place, base.organization)
                writer.add_base_model_repo_url(place, base.repo_url)
        if self.tags:
            writer.add_tags(self.tags)
        if self.languages:
            writer.add_languages(self.languages)


def loadable_name(name: str, token_texts: Collection[str]) -> str:
    """A model's name, such that llama.cpp loads the model."""
    if all(text in token_texts for text in _PHI_3_TOKENS):
        return name
    return _PHI_3_NAMES.sub("Phi 3", name)


def read_model_facts(folder: LocalFolder) -> ModelFacts:
    """Facts from the model card, ``fusekit.json`` and ``config.json`` of a model folder.

    All three may be missing or incomplete; what is not there is left out.

    Raises:
        CheckpointError: when ``fusekit.json`` or ``config.json`` is not a JSON object.
    """
    card = _card(folder)
    recipe = _optional(folder, RECIPE_NAME)
    repo_id = folder.repo_id if folder.repo_id and _REPO_ID.fullmatch(folder.repo_id) else None
    return ModelFacts(
        name=_text(card.get("model_name")) or folder.public_name.rpartition("/")[2],
        organization=repo_id.partition("/")[0] if repo_id else None,
        description=_text(card.get("description")) or _description(recipe),
        licence=_joined(card.get("license")),
        licence_name=_text(card.get("license_name")),
        licence_link=_link(card.get("license_link")),
        languages=tuple(_texts(card.get("language"))),
        tags=_tags(card),
        base_models=_base_models(card, recipe),
        source_url=f"{_HUB}{repo_id}" if repo_id else None,
        quantized_by=_quantized_by(card, repo_id, _optional(folder, "config.json")),
    )


def _card(folder: LocalFolder) -> Mapping[str, Any]:
    """The front matter of ``README.md``; a card that cannot be read says nothing."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import metadata_load

    path = folder.path / "README.md"
    if not path.is_file() or path.stat().st_size > _LARGEST_CARD:
        return {}
    try:
        resolve_inside(folder.path, path.name)
        return metadata_load(path) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def _optional(folder: LocalFolder, name: str) -> Mapping[str, Any]:
    if not (folder.path / name).exists():
        return {}
    resolve_inside(folder.path, name)
    return read_json(folder.path / name)


def _base_models(card: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[Origin, ...]:
    """From ``fusekit.json``, which knows what was fused, else from the card."""
    fused = list(_identifiers([_block(recipe, "base").get("id")]))
    return tuple(Origin.of(name) for name in fused or _identifiers(_listed(card.get("base_model"))))


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


def _tags(card: Mapping[str, Any]) -> tuple[str, ...]:
    tags = [*_texts(card.get("tags")), *_texts(card.get("pipeline_tag"))]
    return tuple(dict.fromkeys(tag for tag in tags if tag not in _NOT_OURS))


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


def _joined(value: Any) -> str | None:
    return ", ".join(_texts(value)) or None


def _link(value: Any) -> str | None:
    text = _text(value)
    return text if text and text.startswith(("https://", "http://")) else None


def _block(recipe: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = recipe.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{RECIPE_NAME}: {key} must be a JSON object; remove the file")
    return value or {}


def _spaced(name: str) -> str:
    return " ".join(re.split(r"[-_]+", name)).strip() or name
