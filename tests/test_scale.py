"""The benchmark of scale: its rows, its model of cost, and that its parts run."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny import EXPERTS, LINEARS, QWEN3_MOE, make_adapter, make_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from scale_cases import Subject, planned  # noqa: E402
from scale_cost import KINDS, Fit, Point, fit, repeated  # noqa: E402
from scale_cost import points as points_of  # noqa: E402
from scale_rows import Rows  # noqa: E402
from scale_steps import picture  # noqa: E402
from scale_steps import table as steps_table  # noqa: E402

from mlx_fusekit import samples  # noqa: E402
from mlx_fusekit.requantize import effort  # noqa: E402
from mlx_fusekit.requantize.effort import (  # noqa: E402
    WRITTEN,
    Effort,
    Rates,
    shapes_of,
    stated,
    work_of,
)
from mlx_fusekit.requantize.needs import calibration_needs  # noqa: E402
from mlx_fusekit.requantize.options import CalibrationOptions  # noqa: E402
from mlx_fusekit.texts.sequences import most_held_out  # noqa: E402

RATES = Rates("a machine", running=1e9, solving=2e9, memory=1e9, reading=1e8)


def test_a_row_is_kept_and_found_again(tmp_path: Path) -> None:
    rows = Rows(tmp_path, "abc", {"items": 8})
    assert not rows.has("fuses", "one")
    rows.keep("fuses", "one", {"seconds": 1.5})
    assert rows.has("fuses", "one")
    (row,) = rows.read("fuses")
    assert (row["name"], row["commit"], row["seconds"]) == ("one", "abc", 1.5)


def test_rows_of_two_commits_make_no_table(tmp_path: Path) -> None:
    Rows(tmp_path, "abc").keep("fuses", "one", {})
    Rows(tmp_path, "def").keep("fuses", "two", {})
    with pytest.raises(SystemExit, match="several commits"):
        Rows(tmp_path, None).read("fuses")


def test_a_row_of_other_code_or_options_is_not_taken_for_this(tmp_path: Path) -> None:
    Rows(tmp_path, "abc", {"items": 8}).keep("fuses", "one", {})
    with pytest.raises(SystemExit, match="commit abc, and now it is def"):
        Rows(tmp_path, "def", {"items": 8}).has("fuses", "one")
    with pytest.raises(SystemExit, match="asked"):
        Rows(tmp_path, "abc", {"items": 9}).has("fuses", "one")


def test_no_rows_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no rows of kills yet"):
        Rows(tmp_path, None).read("kills")


def test_subjects_are_called_by_what_they_were_trained_with() -> None:
    assert Subject("0.5b").name == "0.5b-sql-r8-3e-05"
    assert Subject("0.5b").adapter.name == "qwen2.5-coder-0.5b-sql-lora-3e-5"
    assert Subject("135m").adapter.name == "smollm2-sql-lora-1e-4"
    assert Subject("135m", "style", 32, 3e-4).adapter.name == "smollm2-style-lora-3e-4-r32"


def test_the_shapes_of_the_sample_are_those_of_its_modules() -> None:
    shapes = shapes_of(planned(samples.model_path(), samples.adapter_path()))
    # Four layers of q, k, v together, o, gate and up together, down; 256 wide, two key heads of 64.
    assert sorted(shapes["solved"])[:4] == [
        [0, 256, 256, 1],
        [0, 256, 512, 1],
        [0, 256, 1280, 1],
        [0, 640, 256, 1],
    ]
    assert len(shapes["solved"]) == 16
    assert shapes["layers"] == [256 * (256 + 512 + 1280) + 640 * 256] * 4
    assert shapes["trunk"] == 1024 * 256
    again = repeated(shapes, 4)
    assert sorted(again["solved"]) == sorted(shapes["solved"])
    assert (again["layers"], again["bytes"]) == (shapes["layers"], shapes["bytes"])


def test_work_is_what_the_formula_says() -> None:
    shapes = {"solved": [[1, 10, 20, 1]], "used": 1, "layers": [200, 200], "trunk": 50}
    shapes |= {"bytes": 7, "merged_bytes": 3}
    work = work_of(shapes, 100, passes=2)
    # 20 tokens are held out; the first layer runs the text once, the second twice.
    running = 2 * (3 * 20 * 450 + 200 * 100 + 2 * 200 * 100)
    assert work.running == running
    assert work_of(shapes, 100, written=30).running == running + 2 * WRITTEN * 30 * 450
    # Of the two forms of the drift this one takes less than 4 * 100 * 10 * 20.
    drift = 2 * 100 * 10**2 + 2 * 10**2 * 20
    assert work.solving == pytest.approx(10**2 * 100 + drift + 10**3 / 3 + 10**2 * 20 * (5 + 2 * 2))
    assert (work.elements, work.read_bytes, work.layers) == (200 * 7, 17, 1)


def test_text_that_nobody_gave_takes_the_time_of_writing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(effort, "measured_rates", lambda: RATES)
    plan, options = planned(samples.model_path(), samples.adapter_path()), CalibrationOptions()
    given, written = (calibration_needs(plan, options, data).seconds for data in (True, False))
    shapes = shapes_of(plan)
    tokens = 0.75 * options.tokens + most_held_out(options.tokens)
    operations = 2 * WRITTEN * tokens * (sum(shapes["layers"]) + shapes["trunk"])
    assert written - given == pytest.approx(effort._OVER_IDEAL * operations / RATES.running)


def test_of_experts_those_that_a_token_goes_to_run_and_all_are_solved(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", QWEN3_MOE)
    adapter = make_adapter(tmp_path / "adapter", base, keys=[*LINEARS[:4], *EXPERTS])
    shapes = shapes_of(planned(tmp_path / "base", adapter))
    hidden, width = QWEN3_MOE["hidden_size"], QWEN3_MOE["moe_intermediate_size"]
    of_experts = [group for group in shapes["solved"] if group[3] > 1]
    assert sorted(of_experts[:2]) == sorted([[0, hidden, 2 * width, 4], [0, width, hidden, 4]])
    assert shapes["used"] == 2
    all_of_them = work_of(shapes | {"used": 4}, 100)
    assert shapes["layers"][0] < 2 * 3 * hidden * width + 6 * hidden**2
    # Two of four: the inputs that come to experts, and nothing else of solving, are twice as many.
    squares = sum(columns**2 for _, columns, _, experts in shapes["solved"] if experts > 1)
    work = work_of(shapes, 100)
    assert all_of_them.solving - work.solving == pytest.approx(2 * 100 * 2 * squares)


@pytest.mark.parametrize(
    ("config", "used"),
    [
        ({"num_experts_per_tok": 8}, 8),
        ({"text_config": {"moe_k": [1, 6]}}, 6),
        ({"moe_topk": "all", "text_config": 3}, None),
        ({"num_experts_per_tok": 0}, None),
    ],
)
def test_what_a_configuration_says_of_experts(config: dict[str, Any], used: int | None) -> None:
    assert stated(config, ("num_experts_per_tok", "moe_topk", "moe_k")) == used


def points(constants: list[float], count: int) -> list[Point]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        work = Effort(*(rng.uniform(1, 10, 5) * [1e9, 1e9, 1e8, 1e8, 1]))
        seconds = float(RATES.ideal(work) @ constants)
        found.append(Point(str(number), work, seconds, fitted=True))
    return found


def test_constants_are_found_again_where_there_are_rows_enough() -> None:
    wanted = [3.0, 2.0, 7.0, 0.0, 0.5]
    found = fit(points(wanted, 8), RATES)
    assert found.constants == pytest.approx(wanted, abs=1e-9)
    assert (len(found.grouping), found.different, found.freedom) == (5, 8, 3)


@pytest.mark.parametrize(("count", "constants"), [(1, 1), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5)])
def test_no_more_constants_than_the_rows_carry(count: int, constants: int) -> None:
    rows = points([1.0, 1, 1, 1, 1], count)
    found = fit([*rows, rows[0]], RATES)
    assert (found.rows, found.different) == (count + 1, count)
    assert len(found.grouping) == constants


def test_no_constant_is_negative() -> None:
    rows = points([5.0, 0, 0, 0, 0], 6)
    rows = [Point(p.name, p.work, p.seconds - 0.4 * p.work.layers, True) for p in rows]
    assert (fit(rows, RATES).constants >= 0).all()


def test_nothing_to_fit_to_is_said_so() -> None:
    rows = [Point(p.name, p.work, p.seconds, False) for p in points([1.0] * 5, 3)]
    with pytest.raises(SystemExit, match="--fit"):
        fit(rows, RATES)


def test_seconds_of_a_fit_add_up() -> None:
    fitted = Fit(np.array([1.0, 2, 3, 4, 5]), ((0,), (1,), (2,), (3,), (4,)), 8, 8)
    assert fitted.seconds(np.ones(len(KINDS))) == 15


@pytest.mark.real
def test_parts_run_on_tiny_models(tmp_path: Path) -> None:
    small = ["--calibration-tokens", "200"]
    ways = ["--contender", "mlx_lm.fuse", "--contender", "calibrated"]
    assert "mlx_lm.fuse" in run(
        tmp_path, "models", "--size", "sample", "--items", "2", *small, *ways
    )
    shapes = ["--shape", "tiny", "--shape", "tiny experts", "--layers", "1"]
    table = run(tmp_path, "layers", *shapes, *small)
    assert "| tiny | 1 |" in table
    assert "| tiny experts | 1 |" in table
    ranks = ["--ranks", "1", "--ranks", "2", "--start", "by hand"]
    shared = run(tmp_path, "ranks", *ranks, "--items", "2", "--calibration-tokens", "3000")
    assert re.search(r"\| sample \| 2 \| by hand \|.*\| yes \|", shared)
    rows = Rows(tmp_path, None)
    fuses, layers = rows.read("fuses"), rows.read("layers")
    assert "closer" in steps_table(fuses).markdown()
    assert picture(fuses, ".svg").startswith(b"<?xml")
    found = points_of([*fuses, *layers], ["sample"])
    assert [point.fitted for point in found] == [True, False, False]
    assert layers[0]["cost"]["report"]["calibration"]["streamed"]
    assert "| predicted |" in run(tmp_path, "model", "--fit", "sample", "--constants", "1")


def run(folder: Path, part: str, *arguments: str) -> str:
    """A part of the benchmark in a process of its own; what it printed."""
    script = str(ROOT / "benchmarks" / "scale.py")
    command = [sys.executable, script, part, "--out", str(folder), "--markdown", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
