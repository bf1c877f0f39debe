"""``fusekit.json``: hashes, versions and text."""

import hashlib
import json
from importlib import metadata
from pathlib import Path

from mlx_fusekit.checkpoint import recipe


def test_a_hash_is_that_of_the_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000  # in more than one piece
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link"):
        assert recipe.sha256(tmp_path / name) == hashlib.sha256(content).hexdigest()
    (tmp_path / "empty").touch()
    assert recipe.sha256(tmp_path / "empty") == hashlib.sha256(b"").hexdigest()


def test_a_large_file_of_the_hubs_cache_is_not_read(tmp_path: Path) -> None:
    """The Hub names it by its hash; a small one by another, of 40 digits."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name, taken in (("a" * 64, True), ("b" * 40, False), ("A" * 64, False)):
        (blobs / name).write_bytes(b"content")
        (tmp_path / name).symlink_to(blobs / name)
        expected = name if taken else hashlib.sha256(b"content").hexdigest()
        assert recipe.sha256(tmp_path / name) == expected
    elsewhere = tmp_path / ("c" * 64)
    elsewhere.write_bytes(b"content")
    assert recipe.sha256(elsewhere) == hashlib.sha256(b"content").hexdigest()


def test_a_hash_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5 << 20))
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) > 2

    found = recipe.sha256(tmp_path / "file", stopped)
    assert len(asked) == 3
    assert found == hashlib.sha256(bytes(2 << 20)).hexdigest()


def test_versions_are_the_installed_ones() -> None:
    found = recipe.versions()
    assert found["mlx-lm"] == metadata.version("mlx-lm")
    assert {"mlx", "numpy"} <= set(found)


def test_the_text_is_the_recipe_in_its_order() -> None:
    made = {"seed": 3, "base": {"id": "owner/naïve"}, "adapters": [1.5, None]}
    text = recipe.as_text(made)
    assert list(json.loads(text).items()) == list(made.items())
    assert "owner/naïve" in text
    assert text.endswith("}\n")
    assert text == recipe.as_text(dict(made))
