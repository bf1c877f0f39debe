"""What differs between two models, and the adapter that comes back out of one."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.command import run
from support.exportable import make_exportable
from support.tiny import EXPERTS, LINEARS, LLAMA, QWEN3_MOE, make_adapter, make_model, save_adapter

from mlx_fusekit import diff, extract, fuse, verify
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.errors import CheckpointError, ConfigurationError

Q = "model.layers.0.self_attn.q_proj"
#: Configuration of the base, how it is stored, and what is adapted.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "4 bits": (LLAMA, {"bits": 4}, LINEARS),
    "16 bits": (LLAMA, {"bits": None}, LINEARS),
    "mxfp4": (LLAMA, {"bits": 4, "group_size": 32, "mode": "mxfp4"}, LINEARS[:2]),
    "embedding": (LLAMA, {"bits": 4}, ["self_attn.q_proj", "model.embed_tokens"]),
    "experts": (QWEN3_MOE, {"bits": 4}, [*EXPERTS, "mlp.gate", "lm_head"]),
}


def deltas(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    bound = NamedSources.find(base, adapter).open().adapter
    found = {}
    for module, update in bound.weights.items():
        assert isinstance(update, LowRankUpdate)
        found[module] = update.up.astype(np.float64) @ update.down
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["mlx", "peft"])
def test_a_float_fuse_gives_the_adapter_back(kind: str, to: str, tmp_path: Path) -> None:
    config, stored, keys = KINDS[kind]
    base = make_model(tmp_path / "base", config, **stored)
    adapter = make_adapter(tmp_path / "adapter", base, keys=keys, rank=4)
    fuse(base, adapter, tmp_path / "fused", dequantize=True, dtype="float32")
    report = extract(base, tmp_path / "fused", tmp_path / "back", rank=4, to=to)
    assert report.energy > 1 - 1e-9
    assert report.rank <= (8 if to == "peft" and kind == "experts" else 4)
    wanted, found = deltas(base, adapter), deltas(base, tmp_path / "back")
    assert wanted.keys() <= found.keys()
    for module, delta in wanted.items():
        error = np.linalg.norm(found[module] - delta) / np.linalg.norm(delta)
        assert error < 1e-5, module
    assert report.recipe is not None
    assert report.recipe["adapters"][0]["id"] == "adapter"


def test_as_few_ranks_as_the_energy_takes(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None, dtype=mx.float32)
    adapter = make_adapter(tmp_path / "adapter", base, keys=LINEARS[:3], rank=6)
    fuse(base, adapter, tmp_path / "fused")
    report = extract(base, tmp_path / "fused", tmp_path / "back", energy=0.9)
    for module in report.modules:
        values = np.linalg.svd(deltas(base, adapter)[module.module][0], compute_uv=False)
        shares = np.cumsum(np.square(values)) / np.square(values).sum()
        assert module.rank == int(np.argmax(shares >= 0.9)) + 1
        assert module.energy == pytest.approx(shares[module.rank - 1], rel=1e-4)


def test_rounding_is_told_by_the_energy(tmp_path: Path) -> None:
    """Of a model in 4 bits most of the difference is rounding, which no low rank has."""
    base = make_exportable(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, rank=4, strength=0.0005)
    fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    low = extract(base, tmp_path / "fused", tmp_path / "low", rank=4)
    assert low.energy < 0.8
    high = extract(base, tmp_path / "fused", tmp_path / "high", energy=1.0)
    assert high.energy > 1 - 1e-6
    assert high.rank > 100
    found = verify(base, tmp_path / "high", tmp_path / "fused", max_tokens=256)
    assert found.kl_mean < 1e-6


def full_fine_tune(tmp_path: Path, base: Path) -> Path:
    stored = mx.load(str(base / "model.safetensors"))
    names = [f"{Q}.weight", f"{Q}.bias", "model.norm.weight"]
    return save_adapter(tmp_path / "full", {n: 1.5 * stored[n] + 0.1 for n in names}, kind="full")


@pytest.mark.parametrize("to", ["mlx", "peft"])
def test_what_is_no_matrix_is_saved_whole(to: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None, dtype=mx.float32)
    fuse(base, full_fine_tune(tmp_path, base), tmp_path / "fused")
    report = extract(base, tmp_path / "fused", tmp_path / "back", energy=1.0, to=to)
    assert [module.module for module in report.modules] == [Q]
    assert set(report.parameters) == {f"{Q}.bias", "model.norm.weight"}
    fuse(base, tmp_path / "back", tmp_path / "again")
    one, other = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("fused", "again"))
    assert one.keys() == other.keys()
    assert all(mx.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_diff_names_what_changed(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None, dtype=mx.float32)
    adapter = make_adapter(tmp_path / "a", base, keys=LINEARS[:2], rank=3, num_layers=1)
    fuse(base, adapter, tmp_path / "fused")
    report = diff(base, tmp_path / "fused")
    wanted = deltas(base, adapter)
    assert {change.module for change in report.changed} == wanted.keys()
    assert report.parameters == ()
    stored = mx.load(str(base / "model.safetensors"))
    for change in report.changed:
        delta = wanted[change.module][0]
        size = np.linalg.norm(np.array(stored[f"{change.module}.weight"]))
        assert change.relative == pytest.approx(np.linalg.norm(delta) / size, rel=1e-4)
        squares = np.square(np.linalg.svd(delta, compute_uv=False))
        expected = squares.sum() ** 2 / np.square(squares).sum()
        assert change.effective_rank == pytest.approx(expected, rel=1e-3)
        assert change.effective_rank < 3.01


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_another_type_is_no_change(tmp_path: Path, dtype: str) -> None:
    """A model that is only stored in another type of floats differs by nothing."""
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base, keys=LINEARS[:1], num_layers=1)
    fuse(base, adapter, tmp_path / "fused", dequantize=True, dtype=dtype)
    report = diff(base, tmp_path / "fused")
    assert [change.module for change in report.changed] == ["model.layers.1.self_attn.q_proj"]
    assert report.changed[0].formats[0] == "4-bit group 64"
    assert report.parameters == ()


def test_diff_of_full_fine_tunes_and_of_nothing(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None)
    fuse(base, full_fine_tune(tmp_path, base), tmp_path / "fused")
    report = diff(base, tmp_path / "fused")
    assert [change.module for change in report.changed] == [Q]
    assert set(report.parameters) == {f"{Q}.bias", "model.norm.weight"}
    same = diff(base, base)
    assert (same.changed, same.parameters) == ((), ())
    with pytest.raises(ConfigurationError, match="there is nothing to extract"):
        extract(base, base, tmp_path / "back", rank=2)
    assert not (tmp_path / "back").exists()


def test_models_of_other_shapes_are_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    wide = make_model(tmp_path / "wide", LLAMA | {"intermediate_size": 512})
    deep = make_model(tmp_path / "deep", LLAMA | {"num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"mlp.* is \[.*512.*\], and \[.*256.*\] in"):
        diff(base, wide)
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.2"):
        extract(base, deep, tmp_path / "back", rank=2)
    with pytest.raises(ConfigurationError, match="--rank: give the rank"):
        extract(base, base, tmp_path / "back")


def test_the_commands(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base, keys=LINEARS)
    fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    named = [str(base), str(tmp_path / "fused")]
    shown = run("diff", *named, "--plot", str(tmp_path / "diff.png"))
    assert shown.returncode == 0, shown.stderr
    assert "14 of 15 differ" in shown.stdout
    assert "a, nearest" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert (tmp_path / "diff.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(run("diff", *named, "--json").stdout)["changed"]) == 14
    arguments = ["--model", named[0], "--fused", named[1], "--save-path", str(tmp_path / "back")]
    made = run("extract", *arguments, "--rank", "4")
    assert made.returncode == 0, made.stderr
    assert "energy kept" in made.stdout
    again = run("extract", *arguments, "--energy", "0.5", "--overwrite", "--to", "peft", "--json")
    report = json.loads(again.stdout)
    assert (report["to"], len(report["modules"])) == ("peft", 14)
    assert "exists already" in run("extract", *arguments, "--rank", "4").stderr
