"""The exercise's texts: both languages say the same, and nothing is left unsaid."""

import re
import string
from pathlib import Path

import pytest

import mlx_fusekit.exercise
from mlx_fusekit.cli import exercise as cli
from mlx_fusekit.exercise.texts import LANGUAGES, TEXTS, step, text

ENGLISH = TEXTS["en"]
#: After these a Korean particle has another form than after those; `{name}는` would often be wrong.
PARTICLE = re.compile(r"\}`?(?:은|는|이|가|을|를|과|와|으로|로|아|야)(?=[\s,.)]|$)")


def placeholders(words: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(words) if name is not None)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_same_keys(language: str) -> None:
    assert list(TEXTS[language]) == list(ENGLISH)


@pytest.mark.parametrize("key", ENGLISH)
def test_the_same_placeholders(key: str) -> None:
    for language in LANGUAGES:
        assert placeholders(TEXTS[language][key]) == placeholders(ENGLISH[key])


@pytest.mark.parametrize("language", LANGUAGES)
def test_backticks_come_in_pairs(language: str) -> None:
    odd = [key for key, words in TEXTS[language].items() if words.count("`") % 2]
    assert not odd


@pytest.mark.parametrize("language", LANGUAGES)
def test_formulas_are_no_emphasis(language: str) -> None:
    """Outside of backticks, Markdown would take the stars of ``s*B*A`` away."""
    bare = [key for key, words in TEXTS[language].items() if "*" in re.sub(r"`[^`]*`", "", words)]
    assert not bare


def test_korean_is_korean() -> None:
    hangul = re.compile("[가-힣]")
    missing = [k for k, w in TEXTS["ko"].items() if not hangul.search(w)]
    assert missing == ["fused_by", "column_kl", "column_top1"]
    assert not [key for key, words in ENGLISH.items() if hangul.search(words)]


def test_no_particle_follows_a_placeholder() -> None:
    assert not [key for key, words in TEXTS["ko"].items() if PARTICLE.search(words)]


def test_korean_is_polite() -> None:
    """Every sentence ends in the polite teaching register, or is a label."""
    plain = re.compile(r"(?<!니)다\.(?:\s|$)|[해요가-힣]어\.|한다\.")
    assert not [key for key, words in TEXTS["ko"].items() if plain.search(words)]


def test_every_key_is_used_and_every_use_has_a_key() -> None:
    folder = Path(mlx_fusekit.exercise.__file__).parent
    sources = [path for path in folder.glob("*.py") if not path.stem.startswith("texts_")]
    code = "\n".join(path.read_text("utf-8") for path in (*sources, Path(cli.__file__)))
    quoted = set(re.findall(r"""["']([a-z0-9_]+)["']""", code))
    built = ("step: ", "heading_", "column_", "merge_")
    assert not [key for key in ENGLISH if key not in quoted and not key.startswith(built)]


def test_a_step_without_a_name_of_its_own() -> None:
    assert step("ko", "timing") == "시간 측정"
    assert step("ko", "re-quantizing, round 2") == "re-quantizing, round 2"


def test_values_are_filled_in() -> None:
    assert text("en", "cost_disk_many", adapters=7) == "disk, adapters: 7"
