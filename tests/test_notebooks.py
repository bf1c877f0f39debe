"""The notebooks as they lie in git; tests/real/test_notebooks.py runs them."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = [
    "01_fuse_a_4bit_model.ipynb",
    "02_is_fusing_worth_it.ipynb",
    "03_to_llama_cpp_and_ollama.ipynb",
]
#: What an absolute path of somebody's machine begins with.
ABSOLUTE = re.compile(
    r"(?<![\w.:/])(?:/(?:home|Users|root|tmp|var|private|work|opt|mnt)/|[A-Z]:\\)"
)


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / name).read_text("utf-8"))
    return found


def source(cell: dict[str, Any]) -> str:
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def test_these_are_all() -> None:
    assert sorted(path.name for path in FOLDER.iterdir() if path.name[0] != ".") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_format_is_version_4(name: str) -> None:
    book = read(name)
    assert (book["nbformat"], book["nbformat_minor"]) >= (4, 5)
    assert book["nbformat"] == 4
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in book["cells"]]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids)
    assert {cell["cell_type"] for cell in book["cells"]} == {"markdown", "code"}
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(book)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_stripped(name: str) -> None:
    """After a run in Jupyter: clear all outputs, and save."""
    for cell in read(name)["cells"]:
        assert not set(cell["metadata"]), cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], cell["id"]
            assert cell["execution_count"] is None, cell["id"]


@pytest.mark.parametrize("name", NAMES)
def test_no_path_of_a_machine(name: str) -> None:
    assert not ABSOLUTE.findall((FOLDER / name).read_text("utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_code_is_python_and_short(name: str) -> None:
    for cell in read(name)["cells"]:
        if cell["cell_type"] == "code":
            ast.parse(source(cell))
            assert len(source(cell).splitlines()) <= 20, cell["id"]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    text = "\n".join(source(cell) for cell in read(name)["cells"])
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (FOLDER / target).is_file(), target
