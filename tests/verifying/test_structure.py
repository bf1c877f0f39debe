"""What a fused model's files must be like: every fault is found, and nothing else is one."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from support.folders import as_hugging_face, rewritten, unstacked
from support.tiny import (
    LINEARS,
    LLAMA,
    QWEN3_MOE,
    make_adapter,
    make_model,
    save_adapter,
    teacher_layers,
)

from mlx_fusekit import fuse
from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.sanitized import SanitizedModel, open_base
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.verifying.structure import Check, check_same_model, check_structure

UNTOUCHED, TOUCHED = "untouched tensors byte-identical", "touched modules changed"
SAME, CLEAN = "same tensors as the base", "no adapter layers left"


def structure_of(base: Path, adapter: Path, fused: Path) -> dict[str, Check]:
    opened = open_adapter(adapter)
    model = open_base(base, wanted=opened.target_tensors)
    checks = check_structure(model, opened.bind(model), Checkpoint.open(fused))
    return {check.name: check for check in checks}


def failed(base: Path, adapter: Path, fused: Path) -> list[str]:
    return [check.name for check in structure_of(base, adapter, fused).values() if not check.ok]


FORMATS: dict[str, dict[str, Any]] = {
    "affine-4": {"bits": 4},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    "float16": {"bits": None, "dtype": mx.float16},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "same": {},
    "wider": {"bits": 8},
    "dequantized": {"dequantize": True},
    "float32": {"dequantize": True, "dtype": "float32"},
}


@pytest.mark.parametrize(
    ("name", "option"),
    [("float16", "same"), *((n, o) for n in ("affine-4", "nvfp4") for o in OPTIONS)],
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_fuse_writes_is_in_order(tmp_path: Path, name: str, option: str, kind: str) -> None:
    base = make_model(tmp_path / "base", mixed={"k_proj": False}, **FORMATS[name])
    keys = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]
    adapter = make_adapter(tmp_path / "adapter", base, kind=kind, keys=keys)
    fuse(base, adapter, tmp_path / "fused", **OPTIONS[option])
    checks = structure_of(base, adapter, tmp_path / "fused")
    assert [check for check in checks.values() if not check.ok] == []
    assert "differ" not in checks[UNTOUCHED].detail
    if option == "same":
        assert checks[TOUCHED].detail == "6 changed"
    elif option == "wider":
        assert "4 in another format" in checks[TOUCHED].detail
        assert "2 changed" in checks[TOUCHED].detail
    else:
        assert "not compared" in checks[UNTOUCHED].detail


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_without_effect_need_not_change_anything(tmp_path: Path, kind: str) -> None:
    base = make_model(tmp_path / "base")
    model = teacher_layers(base, kind, LINEARS, num_layers=2, rank=4, scale=2.0)
    leaves = ("lora_a", "lora_b", "m")
    fresh = {n: v for n, v in tree_flatten(model.parameters()) if n.rpartition(".")[2] in leaves}
    adapter = save_adapter(tmp_path / "adapter", fresh, kind=kind, keys=LINEARS)
    fuse(base, adapter, tmp_path / "fused")
    checks = structure_of(base, adapter, tmp_path / "fused")
    assert all(check.ok for check in checks.values())
    assert "14 without effect" in checks[TOUCHED].detail


def test_a_full_fine_tune_may_leave_parameters_as_they_were(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None)
    stored = mx.load(str(base / "model.safetensors"))
    tensors = {
        n: v if n.endswith("bias") else 1.5 * v for n, v in stored.items() if "self_attn" in n
    }
    adapter = save_adapter(tmp_path / "adapter", tensors, kind="full")
    fuse(base, adapter, tmp_path / "fused")
    assert failed(base, adapter, tmp_path / "fused") == []
    assert failed(base, adapter, base) == [TOUCHED]


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE])
def test_damage_is_found_and_named(tmp_path: Path, config: dict[str, Any]) -> None:
    base = make_model(tmp_path / "base", config)
    adapter = make_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"])
    fuse(base, adapter, tmp_path / "fused")
    assert failed(base, adapter, tmp_path / "fused") == []
    untouched, touched = (f"model.layers.1.self_attn.{n}_proj" for n in "kq")

    def broken(name: str, change: Any) -> tuple[list[str], str]:
        folder = rewritten(tmp_path / "fused", tmp_path / name, change)
        checks = structure_of(base, adapter, folder)
        wrong = [check for check in checks.values() if not check.ok]
        return [check.name for check in wrong], "; ".join(check.detail for check in wrong)

    def flip(tensors: dict[str, mx.array]) -> None:
        tensors[f"{untouched}.weight"][-1, -1] ^= mx.array(1, mx.uint32)

    names, detail = broken("flipped", flip)
    assert names == [UNTOUCHED]
    assert f"{untouched}.weight" in detail

    names, detail = broken("lost", lambda tensors: tensors.pop("model.norm.weight"))
    assert names == [SAME]
    assert "missing: model.norm.weight" in detail

    names, detail = broken(
        "layers", lambda tensors: tensors.update({f"{touched}.lora_a": mx.zeros((4, 4))})
    )
    assert names == [CLEAN, SAME]
    assert f"extra: {touched}.lora_a" in detail

    def promote(tensors: dict[str, mx.array]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(mx.float32)

    names, detail = broken("promoted", promote)
    assert names == [SAME]
    assert "model.norm.weight BF16 [128] -> F32 [128]" in detail

    def restore(tensors: dict[str, mx.array]) -> None:
        before = mx.load(str(base / "model.safetensors"))
        tensors.update({n: v for n, v in before.items() if n.startswith(touched)})

    names, detail = broken("unmerged", restore)
    assert names == [TOUCHED]
    assert touched in detail


def test_fewer_bits_than_the_base_are_not_in_order(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=8)
    narrow = make_model(tmp_path / "narrow", bits=4)
    adapter = make_adapter(tmp_path / "adapter", base)
    checks = structure_of(base, adapter, narrow)
    assert not checks[SAME].ok
    assert "8-bit group 64 -> 4-bit group 64" in checks[SAME].detail


def test_a_converted_base_is_compared_as_mlx_lm_converts_it(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", QWEN3_MOE, bits=None)
    adapter = make_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"])
    raw = as_hugging_face(base, unstacked(mx.load(str(base / "model.safetensors"))))
    assert isinstance(open_base(raw), SanitizedModel)
    fuse(raw, adapter, tmp_path / "fused")
    checks = structure_of(raw, adapter, tmp_path / "fused")
    assert all(check.ok for check in checks.values())
    assert checks[TOUCHED].detail == "2 changed"

    def spoil(tensors: dict[str, mx.array]) -> None:
        tensors["model.layers.0.mlp.switch_mlp.up_proj.weight"][1, 2, 3] += 1

    spoiled = rewritten(tmp_path / "fused", tmp_path / "spoiled", spoil)
    assert failed(raw, adapter, spoiled) == [UNTOUCHED]


def test_doras_magnitudes_are_adapter_layers_too(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"])
    fuse(base, adapter, tmp_path / "fused")
    name = "model.layers.0.self_attn.q_proj"
    left = {f"{name}.m": mx.zeros((4,)), f"{name}.lora_a": mx.zeros((4, 4))}
    folder = rewritten(tmp_path / "fused", tmp_path / "left", lambda t: t.update(left))
    assert structure_of(base, adapter, folder)[CLEAN].detail == f"{name}.lora_a, {name}.m"


def test_another_shape_is_not_in_order(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None)
    adapter = make_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"])
    fuse(base, adapter, tmp_path / "fused")

    def widen(tensors: dict[str, mx.array]) -> None:
        tensors["model.norm.weight"] = mx.concatenate(2 * [tensors["model.norm.weight"]])

    checks = structure_of(base, adapter, rewritten(tmp_path / "fused", tmp_path / "wide", widen))
    assert [check.name for check in checks.values() if not check.ok] == [SAME]
    assert "other shape or type: model.norm.weight BF16 [128] -> BF16 [256]" in checks[SAME].detail


def test_long_lists_are_cut(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    found = structure_of(base, adapter, base)[TOUCHED]
    assert not found.ok
    assert "14 as in the base: " in found.detail
    assert " and 11 more; 0 changed" in found.detail


def test_the_bytes_compared_are_told(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    calls: list[tuple[int, int]] = []
    model, fused = open_base(base), Checkpoint.open(base)
    bound = open_adapter(adapter).bind(model)
    check_structure(model, bound, fused, lambda *step: calls.append(step))
    total = sum(tensor.nbytes for tensor in fused.tensors.values())
    assert len(calls) == len(fused.tensors)
    assert calls == sorted(set(calls))
    assert calls[-1] == (total, total)


def test_another_architecture_cannot_be_compared(tmp_path: Path) -> None:
    base, other = make_model(tmp_path / "base"), make_model(tmp_path / "other", QWEN3_MOE)
    check_same_model(open_base(base), Checkpoint.open(base), "--model a", "--fused b")
    with pytest.raises(CheckpointError, match="--fused b: its architecture is qwen3_moe, but that"):
        check_same_model(open_base(base), Checkpoint.open(other), "--model a", "--fused b")
