"""A second fine-tune, onto a model that was fused before."""

import json
from pathlib import Path

import pytest
from support.exportable import make_exportable
from support.tiny import make_adapter

from mlx_fusekit import fuse, verify


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in 4 bits, of the model ``base`` and the adapter ``first``."""
    folder = tmp_path_factory.mktemp("fused")
    base = make_exportable(folder / "base")
    fuse(base, make_adapter(folder / "first", base), folder / "tuned", requantize="nearest")
    return folder / "tuned"


def adapter_of(folder: Path, base: Path, trained_on: str) -> Path:
    adapter = make_adapter(folder / "second", base, seed=9)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": trained_on}))
    return adapter


def test_it_is_like_the_fused_model_with_its_adapter(fused: Path, tmp_path: Path) -> None:
    """The teacher is the model that the adapter was trained on, with its rounding."""
    adapter = adapter_of(tmp_path, fused, str(fused))
    report = fuse(fused, adapter, tmp_path / "again", calibration_tokens=512)
    assert not any("better start" in warning for warning in report.warnings)
    found = verify(fused, adapter, tmp_path / "again", max_tokens=512)
    assert found.recovered is not None
    assert found.recovered > 0.9
    recipe = json.loads((tmp_path / "again" / "fusekit.json").read_text())
    assert [entry["id"] for entry in recipe["earlier_adapters"]] == ["first"]


def test_an_adapter_of_the_first_base_is_told_to_start_there(fused: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, fused, "/home/me/base")
    report = fuse(fused, adapter, tmp_path / "again", requantize="nearest")
    (line,) = [warning for warning in report.warnings if "better start" in warning]
    assert "`mlx-fusekit fuse --model base --adapter-path first --adapter-path second`" in line


@pytest.mark.parametrize("recipe", ["[]", '{"base": 3}', '{"base": {"id": []}}', "{"])
def test_a_recipe_that_is_not_ours_says_nothing(recipe: str, fused: Path, tmp_path: Path) -> None:
    base = make_exportable(tmp_path / "tuned")
    (base / "fusekit.json").write_text(recipe)
    adapter = adapter_of(tmp_path, base, "base")
    report = fuse(base, adapter, tmp_path / "again", requantize="nearest")
    assert not any("better start" in warning for warning in report.warnings)
