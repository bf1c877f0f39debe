"""The house is as docs/architecture.md draws it: rooms import those above them, and no circle."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_fusekit"
#: What stands below all rooms, and only hands names on.
FRONT = ("__init__", "__main__")
LARGEST_FILE = 450
LARGEST_BODY = 60


def rooms() -> list[str]:
    """The rooms in the order of the table: folders, and modules of their own."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = re.findall(r"^\| `([a-z_]+(?:\.py|/))`", text, re.MULTILINE)
    return [name.removesuffix(".py").rstrip("/") for name in named]


def files() -> dict[str, Path]:
    """Every module of the package, by its dotted name below it."""
    return {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(source: str) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it, by all possible names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name.removeprefix("mlx_fusekit.") for name in names if "mlx_fusekit." in name)


def room_of(module: str) -> str:
    """The room a module stands in."""
    return module.partition(".")[0]


def wrong_ways(sources: dict[str, str], order: list[str]) -> list[str]:
    """Imports of a room that stands below."""
    found = []
    for module, source in sources.items():
        if module in FRONT:
            continue
        for name in imported(source):
            room = room_of(name)
            below = room in order and order.index(room) > order.index(room_of(module))
            if below:
                found.append(f"{module} -> {name}")
    return found


def circle(sources: dict[str, str]) -> list[str]:
    """Files that import each other in a circle; none where there is no circle."""
    graph = {
        module: {name for name in imported(source) if name in sources and name != module}
        for module, source in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [str(module) for module in error.args[1]]
    return []


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module: path.read_text("utf-8") for module, path in files().items()}


def test_the_table_names_every_room_once() -> None:
    order = rooms()
    there = {room_of(module) for module in files()} - set(FRONT)
    assert sorted(order) == sorted(there)


def test_rooms_import_those_above_them_only(sources: dict[str, str]) -> None:
    assert wrong_ways(sources, rooms()) == []


def test_no_files_import_each_other_in_a_circle(sources: dict[str, str]) -> None:
    assert circle(sources) == []


def test_a_wrong_import_is_found() -> None:
    order = ["errors", "formats", "cli"]
    up = {"formats.floats": "from mlx_fusekit import errors\nimport mlx_fusekit.errors"}
    assert wrong_ways(up, order) == []
    down = "def f():\n    from mlx_fusekit.cli.output import warn"
    assert wrong_ways({"formats.floats": down}, order) == [
        "formats.floats -> cli.output",
        "formats.floats -> cli.output.warn",
    ]
    assert wrong_ways({"errors": "from mlx_fusekit import cli"}, order) == ["errors -> cli"]
    pair = {"a": "from mlx_fusekit.b import x", "b": "import mlx_fusekit.a"}
    assert sorted(set(circle(pair))) == ["a", "b"]


def test_files_and_functions_can_be_read_without_getting_lost(sources: dict[str, str]) -> None:
    long_files = [m for m, source in sources.items() if source.count("\n") > LARGEST_FILE]
    assert long_files == []
    long_bodies = [
        f"{module}.{node.name}"
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and _body_lines(node) > LARGEST_BODY
    ]
    assert long_bodies == []


def _body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function's statements, its docstring aside."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
