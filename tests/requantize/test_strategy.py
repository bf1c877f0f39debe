"""The table of strategies: one place that says what there is."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tiny import make_adapter, make_model

from mlx_fusekit import fuse, prepare_fuse
from mlx_fusekit.cli.fuse import command
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.formats.quantization import quantize_nearest
from mlx_fusekit.fusing.options import FuseOptions
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.merged import Weight
from mlx_fusekit.requantize.nearest import nearest
from mlx_fusekit.requantize.requantizer import Prepared, Request
from mlx_fusekit.requantize.strategy import STRATEGIES, Strategy, in_words


def test_an_unknown_one_is_refused_and_never_another_runs() -> None:
    with pytest.raises(ConfigurationError, match="--requantize best: choose auto, calibrated"):
        FuseOptions(requantize="best")


def test_the_command_offers_what_the_table_has() -> None:
    option = next(option for option in command.params if option.name == "requantize")
    assert list(option.type.choices) == list(STRATEGIES)  # type: ignore[attr-defined]


def test_every_strategy_that_a_report_names_has_words() -> None:
    for strategy in STRATEGIES.values():
        assert in_words(strategy.name) == strategy.words
        if strategy.otherwise is not None:
            assert in_words(strategy.otherwise.name) == strategy.otherwise.words
    assert in_words(None) is None
    assert in_words("another tool's") is None


def test_reading_the_table_imports_nothing_heavy() -> None:
    code = (
        "import sys, mlx_fusekit.requantize.strategy, mlx_fusekit.requantize.options\n"
        "print([name for name in ('numpy', 'mlx', 'mlx_lm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nearest_rounds_the_merged_rows(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    step = prepare_fuse(base, adapter, tmp_path / "fused", requantize="nearest").plan.merged[0]
    rows = RowRange(0, 8, 40)
    found = nearest(step).rows(rows)
    merged, spec = Weight.open(step).values(rows), step.target_spec
    assert spec is not None
    wanted = quantize_nearest(merged, spec, step.dtype)
    assert np.array_equal(found.codes, wanted.codes)
    assert np.array_equal(found.scales, wanted.scales)


@pytest.mark.parametrize(
    ("options", "does"),
    [
        ({}, True),
        ({"max_kl": 0.1}, False),
        ({"requantize": "calibrated"}, False),
    ],
)
def test_rounding_stands_in_only_where_nothing_else_was_asked_for(
    options: dict[str, object], does: bool
) -> None:
    assert FuseOptions(**options).rounding_will_do is does  # type: ignore[arg-type]


def test_an_entry_in_the_table_is_all_that_a_strategy_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, keys=["mlp.up_proj"])
    asked = []

    def prepare(request: Request) -> Prepared:
        asked.append(request)
        return Prepared(request.plan, nearest)

    monkeypatch.setitem(STRATEGIES, "twin", Strategy("twin", "as its twin does", prepare))
    report = fuse(base, adapter, tmp_path / "fused", requantize="twin")
    fuse(base, adapter, tmp_path / "nearest", requantize="nearest")
    assert len(asked) == 1
    assert report.requantize == "twin"
    assert in_words("twin") == "as its twin does"
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("fused", "nearest")]
    assert weights[0] == weights[1]
