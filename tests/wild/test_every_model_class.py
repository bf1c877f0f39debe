"""docs/models.md says what becomes of every model class of mlx-lm."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from support.every_class import NOT_RUN, config_of, names
from support.folders import as_hugging_face
from support.raw_forms import UNDONE
from support.sweep import ADAPTERS, BASES, EXACT, FAILING, REFUSED, ModelClass, Outcome
from support.tiny import make_adapter, make_model

from mlx_fusekit import fuse
from mlx_fusekit.checkpoint.mlx_lm import computes_anew
from mlx_fusekit.errors import CheckpointError

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = DOCUMENT.read_text("utf-8").partition("<!-- table")[2]
NOTES = dict(re.findall(r"^(\d+)\. (.+)$", TABLE, re.MULTILINE))
ROWS = {
    name: dict(zip(BASES, (cell.split() for cell in cells.split(" | ")), strict=True))
    for name, cells in re.findall(
        r"^\| `([^`]+)`[^|]* \| ((?:[^|]+ \| ){2}[^|]+) \|", TABLE, re.MULTILINE
    )
}


def check(outcome: Outcome, name: str, base: str, adapter: str) -> None:
    """After a change: python scripts/models_table.py."""
    mark = ROWS[name][base][ADAPTERS.index(adapter)]
    said = EXACT if mark == "✓" else NOTES[mark]
    found = f"{outcome.kind}: {outcome.why}" if outcome.kind == REFUSED else outcome.kind
    assert said == found or (outcome.kind != REFUSED and said.startswith(f"{found}: ")), outcome


@pytest.mark.parametrize("name", ROWS)
def test_default_keys(tmp_path: Path, name: str) -> None:
    outcome = ModelClass(tmp_path, name).outcome("quantized", "default keys")
    check(outcome, name, "quantized", "default keys")


@pytest.mark.real
@pytest.mark.parametrize("name", ROWS)
def test_everything(tmp_path: Path, name: str) -> None:
    model = ModelClass(tmp_path, name)
    for base in BASES:
        for adapter in ADAPTERS:
            check(model.outcome(base, adapter), name, base, adapter)


@pytest.mark.real
def test_every_class_is_listed() -> None:
    """A new mlx-lm may have new ones, and they a configuration in support/every_class.py."""
    assert [*ROWS, *NOT_RUN] == [*(n for n in names() if n not in NOT_RUN), *NOT_RUN]


def test_no_class_fails_or_is_left_out() -> None:
    assert len(ROWS) > 100
    assert not [note for note in NOTES.values() if note.startswith(FAILING)]
    marks = [m for row in ROWS.values() for cell in row.values() for m in cell]
    assert len(marks) == 9 * len(ROWS)
    assert marks.count("✓") > 0.95 * len(marks)
    assert set(UNDONE) <= set(ROWS)


def test_what_mlx_lm_normalizes_when_it_loads_is_not_merged(tmp_path: Path) -> None:
    model = ModelClass(tmp_path, "baichuan_m1")
    outcome = model.outcome("converted", "explicit keys")
    assert outcome.kind == REFUSED
    assert "mlx-lm normalizes an unquantized lm_head.weight" in outcome.why
    assert outcome.why.endswith("leave lm_head out of the adapter")
    assert model.outcome("quantized", "default keys").why.endswith("drop --dequantize")


@pytest.mark.parametrize("name", ["bailing_moe", "bailing_moe_linear"])
def test_heads_that_the_configuration_wants_normalized(name: str) -> None:
    config = config_of(name)
    assert computes_anew({**config, "norm_head": True}, "lm_head.weight")
    assert not computes_anew(config, "lm_head.weight")
    assert not computes_anew({**config, "norm_head": True}, "model.norm.weight")


def raw_olmo(folder: Path) -> Path:
    """A class that ends the process where its package is missing."""
    make_model(folder, bits=None)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "olmo"}))
    return as_hugging_face(folder)


@pytest.mark.skipif(importlib.util.find_spec("hf_olmo") is not None, reason="the package is there")
def test_a_class_that_wants_another_package(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", make_model(tmp_path / "base", bits=None))
    base = raw_olmo(tmp_path / "olmo")
    with pytest.raises(
        CheckpointError, match=r"mlx-lm cannot load it \(a package .* not installed"
    ):
        fuse(base, adapter, tmp_path / "fused")


def test_a_class_that_multiplies_in_place(tmp_path: Path) -> None:
    """falcon_h1 folds its multipliers into the arrays that it is given."""
    assert ModelClass(tmp_path, "falcon_h1").outcome("raw", "default keys").kind == EXACT
