"""Calibrating under a real ``mlx.launch``: the same bytes, whoever does which share."""

import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.exportable import make_exportable
from support.launching import launch
from support.tiny import make_adapter

from mlx_fusekit.formats.quantization import QuantizedRows
from mlx_fusekit.requantize.packing import packed, packed_states, unpacked, unpacked_states
from mlx_fusekit.requantize.ranks import Ranks
from mlx_fusekit.writing.work import work_path

FUSE = ("-m", "mlx_fusekit", "fuse", "--model", "base", "--adapter-path", "adapter")
TOKENS = ("--calibration-tokens", "5000")
#: Ends one rank where the second layer is noted, as ``kill -9`` does.
_KILLED = """
import os, signal
from mlx_fusekit.cli import main
from mlx_fusekit.requantize.journal import Journal
done = Journal.done
def dying(self, step, *arguments):
    if step == 1 and os.environ["MLX_RANK"] == "{rank}":
        os.kill(os.getpid(), signal.SIGKILL)
    done(self, step, *arguments)
Journal.done = dying
main()
"""
_FAILING = """
import os
from mlx_fusekit.cli import main
from mlx_fusekit.errors import FusekitError
from mlx_fusekit.requantize.walk import LayerChain
run = LayerChain.run_student
def failing(self, layer):
    if layer == 1 and os.environ["MLX_RANK"] == "1":
        raise FusekitError("the disk is made of cheese")
    run(self, layer)
LayerChain.run_student = failing
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    text = "".join(f"Some text, of which this is sentence {number}.\n" for number in range(900))
    (folder / "text.txt").write_text(text)
    make_adapter(folder / "adapter", make_exportable(folder / "base"), num_layers=2)
    return folder


def content(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file()
    }


def run(folder: Path, target: str, *more: str, ranks: int = 2, script: str = "") -> Any:
    command = (*FUSE, "--calibration", "text.txt", *TOKENS, "--save-path", target, *more)
    if script:
        (folder / "script.py").write_text(script)
        command = ("script.py", *command[2:])
    return launch(*command, cwd=folder, ranks=ranks)


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "error:" in line.lower()]


def test_arrays_go_round_as_bytes() -> None:
    random = np.random.default_rng(0)
    one = QuantizedRows(
        random.integers(0, 2**32, (3, 4), np.uint32),
        random.integers(0, 2**16, (3, 2), np.uint16),
        random.integers(0, 2**16, (3, 2), np.uint16),
        "BF16",
    )
    two = QuantizedRows(one.codes[:0], one.scales[:0].astype(np.uint8), None, "U8", 0.25)
    back = list(unpacked(packed([(one, 1.5, 2.5), (two, 0.1, float("inf"))])))
    for (rows, *numbers), (wanted, *expected) in zip(
        back, [(one, 1.5, 2.5), (two, 0.1, float("inf"))], strict=True
    ):
        assert numbers == expected
        assert (rows.scale_dtype, rows.global_scale) == (wanted.scale_dtype, wanted.global_scale)
        np.testing.assert_array_equal(rows.codes, wanted.codes)
        np.testing.assert_array_equal(rows.scales, wanted.scales)
    assert back[1][0].biases is None
    states = [mx.random.normal((2, 3, 4)).astype(kind) for kind in (mx.float32, mx.bfloat16)]
    for state, found in zip(states, unpacked_states(packed_states(states)), strict=True):
        assert found.dtype == state.dtype
        assert mx.array_equal(found, state)
    assert list(unpacked_states(packed_states([]))) == []


def test_alone_nothing_goes_round() -> None:
    alone = Ranks()
    assert (alone.number, alone.count, alone.turns) == (0, 1, 4)
    assert [list(alone.places(turn, 6)) for turn in range(4)] == [[0, 4], [1, 5], [2], [3]]
    assert alone.gathered(b"x") == [b"x"]
    assert alone.total(3, 4) == [3, 4]
    assert alone.share([], "texts") == []


@pytest.mark.real
def test_one_two_and_four_ranks_give_the_same_bytes(folder: Path) -> None:
    reports = {}
    for ranks in (1, 2, 4):
        done = run(folder, f"of-{ranks}", "--json", ranks=ranks)
        assert errors(done.stderr) == []
        reports[ranks] = json.loads(done.stdout)
        assert reports[ranks]["requantize"] == "calibrated"
    assert content(folder / "of-1") == content(folder / "of-2") == content(folder / "of-4")
    assert reports[1]["calibration"] == reports[4]["calibration"]
    assert not list(folder.glob(".of-*"))


@pytest.mark.real
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_the_run_is_resumed(folder: Path, rank: int) -> None:
    run(folder, "whole", "--overwrite")
    target = folder / f"killed-{rank}"
    started = time.monotonic()
    done = run(folder, target.name, script=_KILLED.format(rank=rank))
    assert time.monotonic() - started < 60
    assert f"Node with rank {rank} exited with code -{int(signal.SIGKILL)}" in done.stderr
    [line] = errors(done.stderr)
    # mlx.launch may end the others before they miss it.
    assert "another rank" in line or "kept in" in line
    assert not target.exists()
    assert work_path(target, rank).is_dir()

    again = run(folder, target.name)
    assert errors(again.stderr) == []
    assert "resumed an interrupted run" in " ".join(again.stderr.split())
    assert content(target) == content(folder / "whole")
    assert not list(folder.glob(f".{target.name}*"))


@pytest.mark.real
def test_the_failure_of_one_ends_all_with_its_line(folder: Path) -> None:
    done = run(folder, "failed", script=_FAILING)
    [line] = errors(done.stderr)
    assert "the disk is made of cheese" in line
    for rank in range(2):
        assert f"Node with rank {rank} exited with code 1" in done.stderr
    assert not (folder / "failed").exists()
    again = run(folder, "failed")
    assert "resumed an interrupted run" in " ".join(again.stderr.split())
    assert not list(folder.glob(".failed*"))


@pytest.mark.real
def test_mistakes_and_dry_runs_are_told_once(folder: Path) -> None:
    done = run(folder, "base", "--overwrite")
    assert len(errors(done.stderr)) == 1
    done = run(folder, "never", "--dry-run")
    assert errors(done.stderr) == []
    assert done.stdout.count("Plan") == 1
    done = run(folder, "never", "--calibration-tokens", "300", ranks=4)
    [line] = errors(done.stderr)
    assert "too few for 4 ranks" in line
    done = run(folder, "never", "--each")
    assert "not under mlx.launch" in " ".join(errors(done.stderr))
    assert not (folder / "never").exists()
