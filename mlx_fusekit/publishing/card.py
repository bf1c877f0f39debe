"""The model card of a fused model: ``README.md`` with its front matter, from what is known.

Text that people wrote stays: only the part between two markers is ours, and is replaced when the
model is published again. Of the front matter, what we know is set and everything else is kept.
"""

import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_fusekit.checkpoint.belongings import CARD_NAME, MODELFILE_NAME
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.figures import count, size, weighted
from mlx_fusekit.hub import hub_id
from mlx_fusekit.publishing.evidence import Evidence
from mlx_fusekit.publishing.files import PublishedModel
from mlx_fusekit.publishing.foreign_text import code, plain, public_source
from mlx_fusekit.publishing.licenses import License
from mlx_fusekit.publishing.measured import latency_section, parity_section
from mlx_fusekit.requantize.strategy import in_words
from mlx_fusekit.tables import Table

_BEGIN = "<!-- mlx-fusekit: from here on, `mlx-fusekit publish` writes and replaces -->"
_END = "<!-- mlx-fusekit: until here -->"
_HUB = "https://huggingface.co/"
_REVISION = re.compile(r"[0-9a-f]{40}")
_SHORT = 12


@dataclass(frozen=True)
class Card:
    """A model card, in its parts.

    Attributes:
        metadata: the front matter.
        text: what follows it.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    @classmethod
    def parse(cls, content: str, name: str = CARD_NAME) -> "Card":
        """Read a card.

        Args:
            content: the whole file.
            name: of the file, for messages.

        Raises:
            CheckpointError: when its front matter is not YAML, or is no mapping.
        """
        from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard
        from yaml import YAMLError  # type: ignore[import-untyped]

        if REGEX_YAML_BLOCK.match(content) is None:
            return cls({}, content)
        try:
            # Not ModelCard: it writes evaluation results anew, and loses what it does not know.
            card = RepoCard(content)
        except (YAMLError, RecursionError) as error:
            raise CheckpointError(
                f"{name}: its front matter is not valid YAML ({_line(error)})"
            ) from error
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{name}: its front matter must be a mapping of names to values ({_line(error)})"
            ) from error
        return cls(card.data.to_dict(), card.text)  # type: ignore[no-untyped-call]

    @property
    def own_text(self) -> str:
        """The text without the part that was written here."""
        before, _, after = self._parts()
        return f"{before}\n{after}".strip()

    def with_section(self, section: str) -> str:
        """The text with our part put in the place of the one before, or at the end.

        Raises:
            CheckpointError: when one of the two markers is there without the other.
        """
        before, found, after = self._parts()
        ours = f"{_BEGIN}\n{section}\n{_END}"
        if not found:
            return f"{before.rstrip()}\n\n{ours}\n".lstrip()
        return f"{before}{ours}{after}"

    def _parts(self) -> tuple[str, bool, str]:
        begins, ends = self.text.count(_BEGIN), self.text.count(_END)
        if begins == ends == 0:
            return self.text, False, ""
        before, _, rest = self.text.partition(_BEGIN)
        _, end, after = rest.partition(_END)
        if (begins, ends) != (1, 1) or not end:
            raise CheckpointError(
                f"{CARD_NAME}: has one marker of mlx-fusekit's part without the other, or has them "
                "twice; put both back, or remove them with what they enclose"
            )
        return before, True, after


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        repo: where the model is published: ``owner/name``, or ``name``.
        evidence: what was measured of it.
        license: None where it is not known.
        languages: codes, as "en".
        trust_remote_code: whether the model's own code is published with it.
    """

    repo: str
    model: PublishedModel
    evidence: Evidence
    license: License | None = None
    languages: tuple[str, ...] = ()
    trust_remote_code: bool = False

    @property
    def base_id(self) -> str | None:
        """The base's id on the Hub; None where it was a folder, or is not recorded."""
        return hub_id(_block(self.model.recipe, "base").get("id"))

    @property
    def recorded_license(self) -> Mapping[str, Any]:
        """What the card in the base's folder said of its license when it was fused."""
        return _block(_block(self.model.recipe, "base"), "license")


def write_card(facts: CardFacts, existing: Card | None = None) -> str:
    """The whole card.

    Args:
        facts: what is known.
        existing: the card that is there already.

    Raises:
        CheckpointError: when the markers of our part are damaged in the existing one.
    """
    from huggingface_hub import CardData

    title = Card(text=f"# {facts.repo.rpartition('/')[2]}\n")
    card = existing if existing is not None and existing.own_text else title
    metadata = CardData(**_metadata(facts, existing.metadata if existing is not None else {}))
    return f"---\n{metadata.to_yaml()}\n---\n\n{card.with_section(_section(facts)).lstrip()}"


def _metadata(facts: CardFacts, existing: Mapping[str, Any]) -> dict[str, Any]:
    """The front matter: what is known here, over what was there."""
    kept = {key: value for key, value in existing.items() if not key.startswith("base_model")}
    found = {
        **kept,
        **({"library_name": "mlx"} if facts.model.has_mlx else {}),
        "pipeline_tag": existing.get("pipeline_tag") or "text-generation",
        "tags": _tags(facts, existing.get("tags")),
    }
    # One that the card names already keeps its own name and link.
    if facts.license is not None and facts.license.identifier != existing.get("license"):
        ours = facts.license.metadata
        found = {key: value for key, value in found.items() if key not in ours}
        found |= {key: value for key, value in ours.items() if value}
    if facts.languages:
        found["language"] = list(facts.languages)
    if bases := _base_models(facts, existing.get("base_model")):
        found["base_model"] = bases[0] if len(bases) == 1 else bases
        tuned = facts.model.has_mlx and not _only_quantized(facts.model.recipe)
        found["base_model_relation"] = "finetune" if tuned else "quantized"
    return found


def _tags(facts: CardFacts, existing: Any) -> list[str]:
    ours = ["mlx" if facts.model.has_mlx else "gguf", "mlx-fusekit"]
    listed = existing if isinstance(existing, list) else [existing]
    return list(dict.fromkeys([*ours, *(tag for tag in listed if isinstance(tag, str))]))


def _base_models(facts: CardFacts, existing: Any) -> list[str]:
    """Hub ids; those of the existing card where they name the base, or it is not known here."""
    listed = existing if isinstance(existing, list) else [existing]
    named = [name for value in listed if (name := hub_id(value))]
    if facts.base_id is None or facts.base_id in named:
        return named
    return [facts.base_id]


def _section(facts: CardFacts) -> str:
    blocks = [*_origin(facts), *_parity(facts), *_latency(facts), "## Use", *_use(facts)]
    return "\n\n".join(blocks)


def _origin(facts: CardFacts) -> Iterator[str]:
    recipe = facts.model.recipe
    yield "## How it was made"
    if recipe is None:
        yield f"This is not recorded: the model was published without a {code(RECIPE_NAME)}."
    elif _only_quantized(recipe):
        yield f"{_base(facts)}, quantized by mlx-fusekit."
    else:
        yield (
            f"{_base(facts)} with {_adapters(recipe)} fused into it by mlx-fusekit: one model, "
            "which needs no adapter."
        )
    yield Table.of_facts("", [*_recipe_rows(recipe or {}), *_file_rows(facts)]).markdown()
    if recipe is not None:
        yield (
            f"{code(RECIPE_NAME)} has the SHA-256 of what it was made of, and every setting with "
            "which the model can be made again."
        )


def _only_quantized(recipe: Mapping[str, Any] | None) -> bool:
    """Whether no adapter was fused."""
    return recipe is not None and recipe.get("adapters") == [] and bool(recipe.get("quantize"))


def _base(facts: CardFacts) -> str:
    block = _block(facts.model.recipe, "base")
    shown = _linked(block.get("id"), "a base")
    revision = block.get("revision")
    if isinstance(revision, str) and _REVISION.fullmatch(revision):
        shown += f" (revision {code(revision[:_SHORT])})"
    return shown


def _adapters(recipe: Mapping[str, Any]) -> str:
    shown = []
    for adapter in _dicts(recipe.get("adapters")):
        weight = adapter.get("weight")
        name = _linked(adapter.get("id"), "an adapter")
        shown.append(name if weight is None else weighted(name, _number(weight)))
        if (ignored := adapter.get("ignored")) and isinstance(ignored, list):
            shown[-1] += f" (without {len(ignored)} of its modules)"
    kind = recipe.get("kind")
    what = f" ({plain(kind)})" if isinstance(kind, str) else ""
    return (" and ".join(shown) or "an adapter") + what


def _linked(identifier: Any, unknown: str) -> str:
    """A name; with a link where it is a Hub id, and without its folders where it is a path."""
    if (known := hub_id(identifier)) is not None:
        return f"[{known}]({_HUB}{known})"
    return public_source(identifier) if isinstance(identifier, str) and identifier else unknown


def _recipe_rows(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    modules = recipe.get("modules")
    if isinstance(modules, list) and modules:
        yield "merged modules", str(len(modules))
    strategy = in_words(recipe.get("requantize"))
    if strategy is not None:
        yield "re-quantized", strategy
    yield from _calibration_rows(_block(recipe, "calibration"))
    versions = _block(recipe, "versions")
    if versions:
        yield "made with", plain(", ".join(f"{name} {found}" for name, found in versions.items()))


def _calibration_rows(calibration: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    tokens, source = calibration.get("tokens"), calibration.get("source")
    if isinstance(tokens, int) and isinstance(source, str):
        yield "calibrated on", f"{count(tokens)} tokens: {public_source(source)}"
    widened = calibration.get("widened")
    if isinstance(widened, dict) and widened:
        yield "given other widths", f"{len(widened)} modules"


def _file_rows(facts: CardFacts) -> Iterator[tuple[str, str]]:
    model = facts.model
    formats = ", ".join(f"{count} x {name}" for name, count in model.formats.items())
    if model.has_mlx:
        yield "matrices", formats or "not quantized"
        weights = sum(f.bytes for f in model.files if f.name.endswith(".safetensors"))
        yield "size", size(weights)
    for gguf in model.ggufs:
        yield code(gguf.name), f"GGUF, {gguf.type}, {size(gguf.bytes)}"
    yield "license", _license(facts.license)


def _license(known: License | None) -> str:
    if known is None:
        return "not known; see the base's"
    shown = plain(known.name or known.identifier)
    return f"[{shown}](<{known.link}>)" if _is_plain_link(known.link) else shown


def _parity(facts: CardFacts) -> Iterator[str]:
    yield "## How close it is to base and adapter"
    evidence = facts.evidence
    if evidence.parity is None:
        yield "It was published without a report of `mlx-fusekit verify`."
    else:
        name = evidence.verified_file
        model = "this model" if name is None else f"{code(name)} in llama.cpp"
        yield parity_section(evidence.parity, model)


def _latency(facts: CardFacts) -> Iterator[str]:
    if facts.evidence.bench is not None and facts.evidence.arm is not None:
        yield "## How fast it is"
        yield latency_section(facts.evidence.bench, facts.evidence.arm)


def _use(facts: CardFacts) -> Iterator[str]:
    if facts.model.has_mlx:
        trust = " --trust-remote-code" if facts.trust_remote_code else ""
        yield _shell(
            "With mlx-lm:",
            "pip install mlx-lm",
            f'mlx_lm.generate --model {facts.repo}{trust} --prompt "Hello"',
        )
    for gguf in facts.model.ggufs:
        yield _shell(
            f"With llama.cpp, {code(gguf.name)}:",
            f'llama-cli --hf-repo {facts.repo} --hf-file {shlex.quote(gguf.name)} -p "Hello"',
        )
    if facts.model.ggufs:
        yield _ollama(facts)


def _ollama(facts: CardFacts) -> str:
    name = facts.repo.rpartition("/")[2]
    files = [shlex.quote(gguf.name) for gguf in facts.model.ggufs]
    if MODELFILE_NAME not in facts.model.names:
        return _shell("With Ollama:", f"ollama run hf.co/{facts.repo}:{files[0]}")
    return _shell(
        "With Ollama:",
        f"hf download {facts.repo} {' '.join(files)} {MODELFILE_NAME} --local-dir {name}",
        f"ollama create {name.lower()} -f {name}/{MODELFILE_NAME}",
    )


def _shell(title: str, *lines: str) -> str:
    return "\n".join((title, "", "```sh", *lines, "```"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _block(value: Mapping[str, Any] | None, key: str) -> Mapping[str, Any]:
    found = (value or {}).get(key)
    return found if isinstance(found, dict) else {}


def _dicts(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _number(value: Any) -> float:
    """What a manifest gives as a number; NaN where it is none."""
    known = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return float(value) if known else math.nan


def _is_plain_link(link: str | None) -> bool:
    return link is not None and re.fullmatch(r"https?://[^\s<>|]+", link) is not None
