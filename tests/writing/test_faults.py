"""Each call that writes is made to fail, or the process to die at it: nothing is lost or half-made.

The calls of a small fuse, a conversion, two exports and a report are counted, and each is hit in
turn by every fault. After each: the inputs are as they were, each target is absent, complete or the
old one, an error is one line, and a rerun leaves the right bytes and no stray file.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.exportable import make_exportable
from support.fault_server import OPERATIONS
from support.faults import FAULTS
from support.raw import raw_with_float64
from support.tiny import LLAMA, make_adapter, make_model

SMALL = LLAMA | {"num_hidden_layers": 1, "attention_bias": False}
INPUTS = ("base", "other", "adapter", "raw", "raw-adapter", "exportable")
#: What each operation makes.
MADE = {
    "fuse": ("fused",),
    "fuse in two": ("fused",),
    "each": ("adapter", "raw-adapter"),
    "convert": ("fused",),
    "export-gguf": ("model.gguf", "Modelfile"),
    "export-lora": ("adapter.gguf",),
    "convert-adapter": ("peft",),
    "extract": ("extracted",),
    "report": ("bench.json",),
}


@dataclass
class Bench:
    """A folder with inputs, and a server that runs operations in it."""

    folder: Path
    server: "subprocess.Popen[str]"
    complete: dict[str, dict[str, str]] = field(default_factory=dict)

    def run(
        self,
        operation: str,
        at: int = 0,
        fault: str = "",
        *,
        overwrite: bool,
        lasting: bool = False,
    ) -> dict[str, Any]:
        request = {
            "operation": operation,
            "folder": str(self.folder),
            "at": at,
            "fault": fault,
            "overwrite": overwrite,
            "lasting": lasting,
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer: dict[str, Any] = json.loads(self.server.stdout.readline())
        return answer

    def put_back(self, old: bool) -> None:
        """An empty output folder, or one with what an earlier version made."""
        shutil.rmtree(self.folder / "out")
        shutil.rmtree(self.folder / "tmp")
        (self.folder / "tmp").mkdir()
        if old:
            shutil.copytree(self.folder / "old", self.folder / "out")
        else:
            (self.folder / "out").mkdir()


def digest(path: Path) -> str:
    """Of a file, or of all names and contents of a folder; of what is not there, nothing."""
    if not os.path.lexists(path):
        return "absent"
    found = hashlib.sha256()
    for file in sorted([path, *path.rglob("*")]):
        found.update(str(file.relative_to(path)).encode())
        if file.is_file():
            found.update(file.read_bytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("faults")
    make_model(folder / "base", SMALL)
    make_adapter(folder / "adapter", folder / "base", keys=["self_attn.q_proj"], num_layers=1)
    raw_with_float64(folder / "raw", SMALL)
    make_adapter(folder / "raw-adapter", folder / "base", keys=["self_attn.q_proj"], num_layers=1)
    make_exportable(folder / "exportable", SMALL)
    make_model(folder / "other", SMALL, seed=5)
    old = folder / "old"
    for name in ("peft", "extracted"):
        shutil.copytree(folder / "adapter", old / name)
    shutil.copytree(folder / "base", old / "fused")
    (old / "fused" / "only in the old one.txt").write_text("x")
    for name in ("adapter", "raw-adapter"):
        shutil.copytree(folder / "base", old / name)
    for name in ("model.gguf", "adapter.gguf"):
        (old / name).write_bytes(b"GGUF of before")
    for name in ("Modelfile", "bench.json"):
        (old / name).write_text("of before")
    (folder / "out").mkdir()
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "support.fault_server"]
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, str(Path.cwd())])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        yield Bench(folder, server)
        assert server.stdin is not None
        server.stdin.close()


def calls_of(bench: Bench, operation: str, overwrite: bool) -> list[str]:
    """The calls of an operation without a fault; notes what it makes."""
    bench.put_back(overwrite)
    answer = bench.run(operation, overwrite=overwrite)
    assert answer["code"] == 0, answer["told"]
    out = bench.folder / "out"
    bench.complete[operation] = {name: digest(out / name) for name in MADE[operation]}
    assert all(value != "absent" for value in bench.complete[operation].values())
    made: list[str] = answer["made"]
    return made


def check(
    bench: Bench, operation: str, at: int, fault: str, overwrite: bool, lasting: bool = False
) -> None:
    """One fault at one call, and the rerun after it."""
    bench.put_back(overwrite)
    out, old = bench.folder / "out", bench.folder / "old"
    before = {name: digest(bench.folder / name) for name in INPUTS}
    expected = bench.complete[operation]
    answer = bench.run(operation, at, fault, overwrite=overwrite, lasting=lasting)
    where = f"{operation}, call {at}, {fault}, overwrite {overwrite}: {answer}"
    found = {name: digest(out / name) for name in expected}
    killed = fault.startswith("killed")
    if killed:
        assert answer["signal"] == 9, where
    else:
        assert answer["code"] in (0, 1), where
        assert "\n" not in answer["told"], where
    if answer["code"] == 0:
        assert found == expected, where
    for name, value in found.items():
        before_it = digest(old / name) if overwrite else "absent"
        if value == "absent" and overwrite and operation == "fuse in two":
            # Without an exchange the old one lies beside for a moment; the rerun brings it back.
            (beside,) = out.glob(f".{name}.fusekit-old-*")
            assert digest(beside) == before_it, where
            assert killed or (lasting and beside.name in answer["told"]), where
        else:
            assert value in (expected[name], before_it), where
    if answer["code"] == 1 and not lasting:
        # What stays is told by its name.
        beside = {path.name for path in out.iterdir() if path.name not in answer["told"]}
        assert beside <= (names(old) if overwrite else set(expected)), where
    again = bench.run(operation, overwrite=overwrite or any(v != "absent" for v in found.values()))
    assert again["code"] == 0, (where, again)
    assert {name: digest(out / name) for name in expected} == expected, where
    assert names(out) == (names(old) if overwrite else set(expected)), where
    assert names(bench.folder / "tmp") == set(), where
    assert {name: digest(bench.folder / name) for name in INPUTS} == before, where


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("operation", ["fuse", "report"])
def test_a_disk_that_fails_at_any_call(bench: Bench, operation: str, overwrite: bool) -> None:
    for at in range(1, len(calls_of(bench, operation, overwrite)) + 1):
        check(bench, operation, at, "input/output error", overwrite)


@pytest.mark.real
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_fault_at_every_call(
    bench: Bench, operation: str, overwrite: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    made = calls_of(bench, operation, overwrite)
    for at in range(1, len(made) + 1):
        for fault in FAULTS:
            check(bench, operation, at, fault, overwrite)
        check(bench, operation, at, "input/output error", overwrite, lasting=True)
    with capsys.disabled():
        sys.stdout.write(f"\n{operation}, overwrite {overwrite}: {len(made)} calls, ")
        sys.stdout.write(f"{len(FAULTS) + 1} faults at each\n")
