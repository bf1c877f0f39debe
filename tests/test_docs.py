"""Documents name what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
#: In capitals are names to be chosen, such as FORMAT.py.
_NAMED = re.compile(r"(?:tests|mlx_fusekit|scripts|benchmarks|docs|notebooks)/[a-z0-9_/-]+\.\w+")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document: Path) -> None:
    named = set(_NAMED.findall(document.read_text("utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_module_that_is_named_exists(document: Path) -> None:
    """Also where only its room is named with it, or nothing else."""
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "mlx_fusekit").rglob("*.py")]
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", document.read_text("utf-8")))
    there = [name for name in named if any(f"/{m}".endswith(f"/{name}") for m in modules)]
    assert sorted(n for n in named - set(there) if not (ROOT / n).exists()) == []


def test_some_documents_name_files() -> None:
    named = [name for d in DOCUMENTS for name in _NAMED.findall(d.read_text("utf-8"))]
    assert len(named) > 20
