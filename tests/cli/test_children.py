"""No module and no program of the current folder runs, in no process that a command starts."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import make_adapter, make_model

from mlx_fusekit import processes
from mlx_fusekit.bench.arms import ADAPTED, ArmSource
from mlx_fusekit.bench.isolated import measure_isolated
from mlx_fusekit.exercise.findings import Fusing
from mlx_fusekit.exercise.peer import fuse_by_rounding

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mlx_fusekit"
#: Ways to start a program.
STARTING = re.compile(r"\b(subprocess|multiprocessing|popen|pty|os\.(system|exec|(posix_)?spawn))")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which modules and programs lie that leave a mark when they run."""
    trap = tmp_path / "trap"
    trap.mkdir()
    marked = f"open({str(trap / 'ran')!r}, 'a').write(__file__)\n"
    for name in ("mlx_lm", "mlx", "numpy", "click", "json", "rich", "gguf", "transformers"):
        (trap / f"{name}.py").write_text(marked)
    for name in ("ollama", "sysctl", "pmset"):
        (trap / name).write_text(f"#!/bin/sh\ntouch '{trap}/ran'\n")
        (trap / name).chmod(0o755)
    monkeypatch.chdir(trap)
    # As of a shell in which PATH was put together without care.
    monkeypatch.setenv("PATH", f":.:{os.environ['PATH']}:")
    return trap


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("children")
    make_adapter(folder / "adapter", make_model(folder / "model"))
    return folder


def test_the_trap_works(trap: Path) -> None:
    """Python's own way runs what lies there: without care, the canaries sing."""
    subprocess.run([sys.executable, "-m", "json"], check=False)
    assert (trap / "ran").exists()


def test_the_program_itself(trap: Path, models: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_fusekit", "inspect", str(models / "adapter"), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout)["kind"] == "adapter", done.stderr
    assert not (trap / "ran").exists()


def test_mlx_lm_of_the_exercise(trap: Path, models: Path, tmp_path: Path) -> None:
    done = fuse_by_rounding(models / "model", models / "adapter", tmp_path / "fused")
    # mlx-lm wants a tokenizer in the end; what it says is its own.
    assert isinstance(done, Fusing) or "token" in done.lower()
    assert not (trap / "ran").exists()


def test_a_measurement_of_the_bench(trap: Path, models: Path) -> None:
    source = ArmSource(ADAPTED, "model", models / "model", models / "adapter", False)
    assert measure_isolated(source, (), 1).load_seconds > 0
    assert not (trap / "ran").exists()


def test_a_program_is_not_looked_for_here(trap: Path, tmp_path: Path) -> None:
    assert processes.program("ollama") is None or Path(processes.program("ollama")).is_absolute()
    assert str(trap) not in str(processes.program("ollama"))
    folder = tmp_path / "bin"
    folder.mkdir()
    (trap / "ollama").rename(folder / "ollama")
    os.environ["PATH"] += f":{folder}"
    assert Path(processes.program("ollama")).is_absolute()
    with pytest.raises(AssertionError):
        processes.run(["ollama"])


def test_every_child_starts_in_one_place() -> None:
    """And what scripts start in a Python, they start without the current folder."""
    found = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(STARTING.search(name) for name in _names(path))
    ]
    assert found == ["processes.py"]
    careless = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("scripts", "benchmarks", "notebooks")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".ipynb")
        for line in path.read_text("utf-8").splitlines()
        if re.search(r"sys\.executable, *\\?['\"]-[cm]\\?['\"]", line)
    ]
    assert careless == []


def _names(path: Path) -> Iterator[str]:
    """What a file imports, and the attributes that it names."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
