"""Model folders: index, links, and how each module is quantized."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.tiny import make_model

from mlx_fusekit.checkpoint.belongings import INDEX_NAME
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.specs import QuantSpec

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_model(tmp_path / "base")


def set_index(base: Path, weight_map: Any) -> None:
    (base / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def index_of(base: Path) -> dict[str, str]:
    return dict(json.loads((base / INDEX_NAME).read_text())["weight_map"])


def refused(base: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        Checkpoint.open(base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "C:model.safetensors",
     "model.bin", "..", "", "model\\x.safetensors", "other.safetensors", 3],
)  # fmt: skip
def test_an_index_names_plain_files_only(base: Path, file: Any) -> None:
    set_index(base, {**index_of(base), f"{Q}.weight": file})
    refused(base, "only files model")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({f"{Q}.weight": "model-00002-of-00002.safetensors"},
         r"names model-00002-of-00002\.safetensors, which is not there"),
        ({f"{Q}.weight": "model-00002-of-00002.safetensors", "a": "model-7.safetensors"},
         r"names model-00002-of-00002\.safetensors \(and 1 more\), which is not there"),
        ({"ghost.weight": "model.safetensors"}, "lists ghost.weight, which no file holds"),
        ({f"{Q}.weight": None}, rf"leaves {Q}\.weight out"),
    ],
)  # fmt: skip
def test_an_index_that_is_out_of_date(base: Path, change: dict[str, Any], fault: str) -> None:
    weight_map: dict[str, Any] = {**index_of(base), **change}
    set_index(base, {name: file for name, file in weight_map.items() if file is not None})
    (warning,) = Checkpoint.open(base).warnings
    assert re.search(f"index.json: {fault}; it is out of date", warning)
    assert "\n" not in warning


def test_a_true_index_is_not_warned_of(base: Path) -> None:
    assert Checkpoint.open(base).warnings == ()


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map(base: Path, weight_map: Any) -> None:
    set_index(base, weight_map)
    (warning,) = Checkpoint.open(base).warnings
    assert "has no weight_map" in warning


def test_a_stale_shard_is_noticed(base: Path) -> None:
    mx.save_safetensors(str(base / "model-00001-of-00009.safetensors"), {"stale": mx.zeros(3)})
    refused(
        base,
        r"leaves out model-00001-of-00009\.safetensors, and mlx-lm cannot load it "
        r"\(Received 1 parameters not in model: stale\)",
    )


def test_a_tensor_in_two_files(base: Path) -> None:
    (base / INDEX_NAME).unlink()
    mx.save_safetensors(str(base / "model-x.safetensors"), {f"{Q}.weight": mx.zeros(3)})
    refused(base, "is in both")


def test_a_weight_file_that_is_a_link_out(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (base / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(base, "link that leads out")


def test_a_hub_snapshot_may_link_to_its_blobs(base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        path.rename(blobs / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"sha-{path.name}")
    assert Checkpoint.open(snapshot).quantization(Q) == QuantSpec(4, 64)


def test_missing_pieces_are_named(base: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such model folder")
    (base / "config.json").rename(base / "c.json")
    refused(base, r"config\.json: the file is missing")
    (base / "config.json").write_text("[]")
    refused(base, "must hold a JSON object")
    (base / "config.json").write_text("{}")
    (base / INDEX_NAME).unlink()
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    refused(base, "no model.*safetensors file; pytorch_model.bin is pickled")


def change_config(base: Path, **changes: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    config.update(changes)
    (base / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )


def test_quantization_from_the_defaults(base: Path) -> None:
    assert Checkpoint.open(base).quantization(Q) == QuantSpec(4, 64)
    assert Checkpoint.open(base).quantization("model.norm") is None


def test_quantization_from_an_override(tmp_path: Path) -> None:
    base = make_model(tmp_path / "mixed", mixed={"q_proj": {"bits": 8, "group_size": 32}})
    checkpoint = Checkpoint.open(base)
    assert checkpoint.quantization(Q) == QuantSpec(8, 32)
    assert checkpoint.quantization(Q.replace("q_proj", "k_proj")) == QuantSpec(4, 64)


def test_quantization_config_serves_as_well(base: Path) -> None:
    change_config(base, quantization=None)
    assert Checkpoint.open(base).quantization(Q) == QuantSpec(4, 64)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32), (2, 128), (3, 64), (6, 128)])
def test_quantization_from_shapes(tmp_path: Path, bits: int, group_size: int) -> None:
    base = make_model(tmp_path / "base", bits=bits, group_size=group_size)
    change_config(base, quantization=None, quantization_config=None)
    assert Checkpoint.open(base).quantization(Q, columns=128) == QuantSpec(bits, group_size)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_codebook_modes_from_shapes(tmp_path: Path, mode: str, bits: int, group_size: int) -> None:
    base = make_model(tmp_path / "base", bits=bits, group_size=group_size, mode=mode)
    change_config(base, quantization=None, quantization_config=None)
    assert Checkpoint.open(base).quantization(Q, columns=128) == QuantSpec(bits, group_size, mode)


def test_a_default_that_fits_by_its_product_only(tmp_path: Path) -> None:
    """4 bits in groups of 64 and 8 bits in groups of 32 have the same shapes for half the width."""
    base = make_model(tmp_path / "base", bits=8, group_size=32)
    block = {"bits": 4, "group_size": 64}
    change_config(base, quantization=block, quantization_config=None)
    assert Checkpoint.open(base).quantization(Q, columns=128) == QuantSpec(8, 32)


def test_ambiguous_shapes_are_said(base: Path) -> None:
    change_config(base, quantization=None, quantization_config=None, model_type="unknown")
    with pytest.raises(CheckpointError, match="does not say how"):
        Checkpoint.open(base).quantization(Q)


def test_a_wrong_override_is_refused(base: Path) -> None:
    block = json.loads((base / "config.json").read_text())["quantization"]
    change_config(base, quantization={**block, Q: {"bits": 8, "group_size": 64}})
    with pytest.raises(CheckpointError, match="correct its quantization"):
        Checkpoint.open(base).quantization(Q)
    change_config(base, quantization={**block, Q: {"bits": "4", "group_size": 64}})
    with pytest.raises(CheckpointError, match="none that MLX has"):
        Checkpoint.open(base).quantization(Q)
