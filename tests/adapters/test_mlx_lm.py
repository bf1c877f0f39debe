"""Adapters that must be refused before any work, each with one line that names tensor and cure."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.tiny import QWEN3_MOE, make_adapter, make_model

from mlx_fusekit import prepare_fuse
from mlx_fusekit.errors import AdapterError

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def change_tensors(adapter: Path, change: Callable[[dict[str, mx.array]], Any]) -> None:
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    change(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(adapter / "adapters.safetensors"), tensors)


def change_config(adapter: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def refused(base: Path, adapter: Path, match: str) -> None:
    target = adapter.parent / "fused"
    with pytest.raises(AdapterError, match=match) as caught:
        prepare_fuse(base, adapter, target)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def rename(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def replaced(
    name: str, value: Callable[[mx.array], mx.array]
) -> Callable[[dict[str, mx.array]], Any]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


TENSORS: dict[str, tuple[Callable[[dict[str, mx.array]], Any], str]] = {
    "unknown module": (
        lambda t: [
            t.update({f"model.layers.1.self_attn.qq_proj.{leaf}": t.pop(f"{Q}.{leaf}")})
            for leaf in ("lora_a", "lora_b")
        ],
        r"qq_proj is no module of the base model \(closest: model.layers.1.self_attn.q_proj\)",
    ),
    "unknown leaf": (
        rename(f"{Q}.lora_b", f"{Q}.lora_c"),
        "lora_c.*is not one that a lora adapter",
    ),
    "missing pair": (lambda t: t.pop(f"{Q}.lora_b"), "lora_b is missing beside"),
    "magnitude in a lora": (
        lambda t: t.update({f"{Q}.m": mx.ones(128)}),
        "q_proj.m.*is not one that a lora",
    ),
    "rank differs between the pair": (replaced(f"{Q}.lora_b", lambda a: a[:2]), "does not fit"),
    "wrong columns": (replaced(f"{Q}.lora_a", lambda a: a[:64]), "does not fit"),
    "wrong rows": (replaced(f"{Q}.lora_b", lambda a: a[:, :64]), "does not fit"),
    "one axis": (replaced(f"{Q}.lora_b", lambda a: a.reshape(-1)), "does not fit|want 2 or 3 axes"),
    "three axes": (
        lambda t: [
            t.update({f"{Q}.{leaf}": t[f"{Q}.{leaf}"][None]}) for leaf in ("lora_a", "lora_b")
        ],
        "does not fit",
    ),
    "not a number": (
        replaced(f"{Q}.lora_a", lambda a: a.at[3, 1].add(mx.nan)),
        "lora_a holds NaN or infinity",
    ),
    "infinity": (
        replaced(f"{Q}.lora_b", lambda a: a.at[0, 0].add(mx.inf)),
        "lora_b holds NaN or infinity",
    ),
    "overflow after scaling": (
        replaced(f"{Q}.lora_b", lambda a: a * 0 + 3e38),
        "overflows float32 when multiplied with scale",
    ),
    "overflow of the product": (
        lambda t: [
            t.update({f"{Q}.{leaf}": t[f"{Q}.{leaf}"] * 0 + 1e25}) for leaf in ("lora_a", "lora_b")
        ],
        "update of .*q_proj overflows float32",
    ),
    "integers": (replaced(f"{Q}.lora_a", lambda a: a.astype(mx.int32)), "floats are expected"),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_bad_tensors(base: Path, adapter: Path, case: str) -> None:
    change, message = TENSORS[case]
    change_tensors(adapter, change)
    refused(base, adapter, message)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown type": (lambda c: c.update(fine_tune_type="loha"), "fine_tune_type is 'loha'"),
    "no parameters": (lambda c: c.pop("lora_parameters"), "has no lora_parameters"),
    "no scale": (lambda c: c["lora_parameters"].pop("scale"), "has no 'scale'"),
    "alpha": (
        lambda c: c["lora_parameters"].update(alpha=c["lora_parameters"].pop("scale")),
        "what others call alpha / rank",
    ),
    "infinite scale": (lambda c: c["lora_parameters"].update(scale=float("inf")), "finite number"),
    "scale no number": (lambda c: c["lora_parameters"].update(scale="20"), "finite number"),
    "wrong rank": (lambda c: c["lora_parameters"].update(rank=8), "has rank 4, but .* says 8"),
    "fewer layers": (lambda c: c.update(num_layers=1), r"not among the last 1 layers"),
    "fewer keys": (
        lambda c: c["lora_parameters"]["keys"].remove("self_attn.q_proj"),
        "not among lora_parameters.keys",
    ),
    "dora without magnitude": (lambda c: c.update(fine_tune_type="dora"), r"\.m is missing"),
    "full": (lambda c: c.update(fine_tune_type="full"), "is no parameter of the base"),
    "rank in quotes": (
        lambda c: c["lora_parameters"].update(rank="4"),
        "rank is '4', which is no whole number; write 4 without quotes",
    ),
    "keys in one": (
        lambda c: c["lora_parameters"].update(keys="self_attn.q_proj"),
        "must be a list of module names",
    ),
    "layers in quotes": (lambda c: c.update(num_layers="2"), "num_layers is '2'; it must be"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configurations(base: Path, adapter: Path, case: str) -> None:
    change, message = CONFIGS[case]
    change_config(adapter, change)
    refused(base, adapter, message)


@pytest.mark.parametrize("layers", [-1, 0, 2, 16])
def test_all_layers_are_meant_as_mlx_lm_means_them(base: Path, adapter: Path, layers: int) -> None:
    change_config(adapter, lambda c: c.update(num_layers=layers))
    prepare_fuse(base, adapter, adapter.parent / "fused")


def test_no_folder(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="neither a folder here nor a Hub id"):
        prepare_fuse(base, tmp_path / "nothing", tmp_path / "fused")


def test_missing_config(base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    refused(base, adapter, r"adapter_config\.json: the file is missing")


def test_config_that_is_no_json(base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")
    refused(base, adapter, "not valid JSON")


def test_missing_weights_name_a_checkpoint(base: Path, adapter: Path) -> None:
    (adapter / "adapters.safetensors").rename(adapter / "0000100_adapters.safetensors")
    refused(base, adapter, "to fuse 0000100_adapters.safetensors, copy it")


@pytest.mark.parametrize("name", ["adapters.npz", "adapter_model.bin", "adapters.pt"])
def test_pickled_weights_are_never_opened(base: Path, adapter: Path, name: str) -> None:
    (adapter / "adapters.safetensors").rename(adapter / name)
    refused(base, adapter, f"{name}: pickled or old-format weights are never opened")


def test_a_pickle_under_another_name(base: Path, adapter: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (adapter / "exploded",))

    (adapter / "adapters.safetensors").write_bytes(pickle.dumps(Bomb()) + bytes(64))
    refused(base, adapter, r"adapters\.safetensors: ")
    assert not (adapter / "exploded").exists()


def test_dora_magnitude_of_wrong_length(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "dora", base, kind="dora")
    change_tensors(adapter, replaced(f"{Q}.m", lambda m: m[:-1]))
    refused(base, adapter, r"m \[127\], which does not fit")


def test_experts_of_another_number(tmp_path: Path) -> None:
    moe = make_model(tmp_path / "moe", QWEN3_MOE)
    adapter = make_adapter(tmp_path / "adapter", moe, keys=["mlp.switch_mlp.up_proj"])
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    change_tensors(
        adapter,
        lambda t: [
            t.update({f"{name}.{leaf}": t[f"{name}.{leaf}"][:3]}) for leaf in ("lora_a", "lora_b")
        ],
    )
    refused(moe, adapter, "switch_mlp.up_proj has .* does not fit")


def test_another_base_is_a_warning(base: Path, adapter: Path) -> None:
    target = adapter.parent / "fused"
    change_config(adapter, lambda c: c.update(model="mlx-community/Other-4bit"))
    warnings = prepare_fuse(base, adapter, target).report().warnings
    assert any("trained on mlx-community/Other-4bit" in warning for warning in warnings)
    change_config(adapter, lambda c: c.update(model=f"mlx-community/{base.name}"))
    warnings = prepare_fuse(base, adapter, target).report().warnings
    assert not any("trained on" in warning for warning in warnings)


def test_full_weights_of_a_wrong_shape(base: Path, tmp_path: Path) -> None:
    from support.tiny import save_adapter

    adapter = save_adapter(tmp_path / "full", {f"{Q}.weight": mx.zeros((128, 64))}, kind="full")
    refused(base, adapter, "does not fit the base's")


def test_full_weights_with_nan(base: Path, tmp_path: Path) -> None:
    from support.tiny import save_adapter

    weight = mx.zeros((128, 128)).at[5, 5].add(mx.nan)
    adapter = save_adapter(tmp_path / "full", {f"{Q}.weight": weight}, kind="full")
    refused(base, adapter, "holds NaN or infinity")


def test_hidden_files_are_no_adapters(base: Path, adapter: Path) -> None:
    """macOS puts them beside each file on other systems' disks."""
    (adapter / "adapters.safetensors").unlink()
    for name in ("._adapters.safetensors", "._0000100_adapters.safetensors", "._adapters.npz"):
        (adapter / name).write_bytes(b"\0\5\x16\7")
    refused(base, adapter, r"adapters\.safetensors: the file is missing$")
