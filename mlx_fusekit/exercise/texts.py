"""What the exercise says, by language."""

from collections.abc import Mapping

from mlx_fusekit.exercise import texts_en, texts_ko

TEXTS: Mapping[str, Mapping[str, str]] = {"en": texts_en.TEXTS, "ko": texts_ko.TEXTS}
#: The first is the default.
LANGUAGES = tuple(TEXTS)


def text(language: str, key: str, **values: object) -> str:
    """A text with its values filled in.

    Args:
        language: one of :data:`LANGUAGES`.
        key: the same in all languages.
        values: of its placeholders.
    """
    return TEXTS[language][key].format(**values)


def step(language: str, name: str) -> str:
    """What a step that reports its progress is called; its own name where it has no other."""
    return TEXTS[language].get(f"step: {name}", name)
