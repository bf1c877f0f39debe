"""Under which license and in which languages a model is."""

from pathlib import Path
from typing import Any

import pytest

from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.publishing.licenses import License, languages_of

BASE = "meta/llama"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nCopyright", "mit"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "llama3.2"),
        ("Gemma Terms of Use", "gemma"),
        ("All rights reserved.", None),
    ],
)
def test_from_its_text(tmp_path: Path, text: str, found: str | None) -> None:
    (tmp_path / "LICENSES").mkdir()
    (tmp_path / "LICENCE.txt").write_text(text)
    assert License.of_files(tmp_path) == (found and License(found))


@pytest.mark.parametrize("asked", ["", "MIT", "a b", "../x", "x\ny"])
def test_what_is_no_license(asked: str) -> None:
    with pytest.raises(ConfigurationError, match="--license"):
        License.asked(asked)


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ({"license": "mit"}, License("mit")),
        ({"license": ["mit"]}, License("mit")),
        ({"license": ["mit", "apache-2.0"]}, None),
        ({"license": "Whatever I say"}, None),
        ({}, None),
        (
            {"license": "other", "license_name": "tiny", "license_link": "LICENSE.md"},
            License("other", "tiny", f"https://huggingface.co/{BASE}/blob/main/LICENSE.md"),
        ),
        (
            {"license": "other", "license_link": "https://tiny.org/terms"},
            License("other", None, "https://tiny.org/terms"),
        ),
        ({"license": "other", "license_link": "/home/me/LICENSE"}, License("other")),
    ],
)
def test_from_a_card(card: dict[str, Any], found: License | None) -> None:
    assert License.of_card(card, BASE) == found


def test_a_link_to_a_file_leads_nowhere_without_its_repository() -> None:
    assert License.of_card({"license": "other", "license_link": "LICENSE"}) == License("other")


def test_languages() -> None:
    assert languages_of({"language": ["ko", 3, "en"]}) == ["ko", "en"]
    assert languages_of({"language": "ko"}) == ["ko"]
    assert languages_of({}) == []
