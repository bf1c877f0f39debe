"""``--max-kl`` where no KL can be measured: a bound that was not measured was not kept."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.command import exit_code
from support.folders import rewritten
from support.tiny import make_adapter, make_model

from mlx_fusekit import fuse, samples, verify

UNMEASURED = 3
TOKENS = 300


def base_whose_logits_are_nan(folder: Path) -> Path:
    """The embedded sample, as a merge of diverged models leaves it."""

    def diverge(tensors: dict[str, mx.array]) -> None:
        name = next(name for name in tensors if name.endswith("model.norm.weight"))
        tensors[name] = tensors[name] * math.nan

    return rewritten(samples.model_path(), folder, diverge)


def adapter_with_its_training_data(folder: Path) -> Path:
    shutil.copytree(samples.adapter_path(), folder / "adapter")
    shutil.copytree(samples.train_data_path().parent, folder / "sql")
    return folder / "adapter"


def adapter_without_effect(folder: Path, base: Path) -> Path:
    make_adapter(folder, base)
    tensors = mx.load(str(folder / "adapters.safetensors"))
    zeros = {name: mx.zeros_like(value) for name, value in tensors.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), zeros)
    return folder


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("bits", "flags", "effect"),
    [(None, [], True), (4, ["--dequantize"], True), (4, [], False)],
    ids=["unquantized", "dequantized", "zero"],
)
def test_where_nothing_is_requantized(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bits: int | None,
    flags: list[str],
    effect: bool,
) -> None:
    base = make_model(tmp_path / "base", bits=bits)
    make = make_adapter if effect else adapter_without_effect
    adapter = make(tmp_path / "adapter", base)
    asked = ["fuse", "--model", str(base), "--adapter-path", str(adapter), *flags]
    asked += ["--save-path", str(tmp_path / "fused")]
    assert exit_code(monkeypatch, *asked, "--max-kl", "0.5", "--dry-run") == 0
    line = (
        "--max-kl 0.5: nothing is re-quantized, so fusing measures no KL and the bound does not "
        "count as kept; `mlx-fusekit verify --max-kl 0.5` measures the fused model"
    )
    assert line in told(capsys)
    assert exit_code(monkeypatch, *asked, "--max-kl", "0.5") == UNMEASURED
    assert line in told(capsys)
    assert (tmp_path / "fused" / "config.json").exists()
    assert exit_code(monkeypatch, *asked, "--overwrite") == 0


def test_fusing_into_a_base_that_gives_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_whose_logits_are_nan(tmp_path / "base")
    adapter = adapter_with_its_training_data(tmp_path)
    asked = ["fuse", "--model", str(base), "--adapter-path", str(adapter), "--json"]
    asked += ["--save-path", str(tmp_path / "fused"), "--calibration-tokens", str(TOKENS)]
    assert exit_code(monkeypatch, *asked, "--max-kl", "1000") == UNMEASURED
    shown = capsys.readouterr()
    assert "gives NaN or infinity" in " ".join(shown.err.split())

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    recipe = (tmp_path / "fused" / "fusekit.json").read_text()
    told, recorded = (
        json.loads(text, parse_constant=refuse)["calibration"] for text in (shown.out, recipe)
    )
    assert told["kl_mean"] is None
    assert not told["reached"]
    assert told["widened"] == recorded["widened"] == {}


def test_verifying_against_a_base_that_gives_nan(tmp_path: Path) -> None:
    """Not KL 0, though the fused model's own numbers are all right."""
    base = base_whose_logits_are_nan(tmp_path / "base")
    fuse(samples.model_path(), samples.adapter_path(), tmp_path / "fused", requantize="nearest")
    data = samples.evaluation_data_path()
    report = verify(None, None, tmp_path / "fused", reference=base, data=data, max_tokens=TOKENS)
    assert math.isnan(report.kl_mean)
    assert not report.passed
