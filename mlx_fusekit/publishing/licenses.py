"""Under which license and in which languages a model is, from what lies about it."""

import contextlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.reading import open_file, resolve_inside

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_HUB = "https://huggingface.co/"
_READ = 4_000
#: What the beginning of a license's text says, and the Hub's identifier of it.
_TEXTS = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"\bMIT License\b", "mit"),
    (r"\bGemma Terms of Use\b", "gemma"),
)
_LLAMA = re.compile(r"\bLLAMA (\d(?:\.\d)?) COMMUNITY LICENSE", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class License:
    """A license as model cards name it.

    Attributes:
        identifier: the Hub's, as "apache-2.0" or "other".
        name: where the identifier is "other".
        link: to its text.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    @classmethod
    def asked(cls, identifier: str) -> "License":
        """The one the user names.

        Raises:
            ConfigurationError: when it is no identifier.
        """
        if not _IDENTIFIER.fullmatch(identifier):
            raise ConfigurationError(
                f"--license {identifier}: give an identifier as the Hub has them, such as "
                "apache-2.0, mit, llama3.2 or other"
            )
        return cls(identifier)

    @classmethod
    def of_card(
        cls, card: Mapping[str, Any], base_id: str | None = None, beside: Collection[str] = ()
    ) -> "License | None":
        """The one in a card's front matter; None where there is none.

        Args:
            card: the front matter.
            base_id: the repository that a link to a file of it leads to.
            beside: names of files that stay beside the card, which links to them reach as they are.
        """
        identifier = card.get("license")
        if isinstance(identifier, list) and len(identifier) == 1:
            identifier = identifier[0]
        if not isinstance(identifier, str) or not _IDENTIFIER.fullmatch(identifier):
            return None
        name, link = card.get("license_name"), card.get("license_link")
        return cls(
            identifier,
            name if isinstance(name, str) else None,
            _reaching(link, base_id, beside) if isinstance(link, str) else None,
        )

    @classmethod
    def of_files(cls, folder: Path) -> "License | None":
        """The one whose text lies in a model's folder; None where there is none that is known."""
        for path in sorted([*folder.glob("LICENSE*"), *folder.glob("LICENCE*")]):
            with contextlib.suppress(OSError, CheckpointError):
                resolve_inside(folder, path.name)
                with open_file(path) as file:
                    text = file.read(_READ).decode("utf-8", "replace")
                if found := _identified(text):
                    return cls(found)
        return None

    @property
    def metadata(self) -> dict[str, str | None]:
        """What a card's front matter says of it."""
        return {
            "license": self.identifier,
            "license_name": self.name,
            "license_link": self.link,
        }


def _identified(text: str) -> str | None:
    if (llama := _LLAMA.search(text)) is not None:
        return f"llama{llama[1]}"
    return next((name for pattern, name in _TEXTS if re.search(pattern, text)), None)


def _reaching(link: str, base_id: str | None, beside: Collection[str]) -> str | None:
    """A link that leads to the same place from another repository."""
    if link.startswith(("https://", "http://")) or link in beside:
        return link
    # What could be a path of somebody's machine is no link.
    if base_id is None or not re.fullmatch(r"\w[\w.-]*", link, re.ASCII):
        return None
    return f"{_HUB}{base_id}/blob/main/{link}"


def languages_of(card: Mapping[str, Any]) -> list[str]:
    """The languages in a card's front matter."""
    value = card.get("language")
    listed = value if isinstance(value, list) else [value]
    return [language for language in listed if isinstance(language, str)]
