"""What a fuse will do, decided from headers."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.folders import as_hugging_face, unstacked
from support.tiny import EXPERTS, LINEARS, QWEN3_MOE, make_adapter, make_model, save_adapter

from mlx_fusekit import prepare_fuse
from mlx_fusekit.checkpoint import header
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.merging.plan import FusePlan, ParameterStep, WeightStep


def planned(folder: Path, base: Path, adapter: Path, **options: Any) -> FusePlan:
    return prepare_fuse(base, adapter, folder / "fused", requantize="nearest", **options).plan


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base, keys=["mlp.down_proj"])


def test_only_what_the_adapter_touches_is_computed(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    plan = planned(tmp_path, base, adapter)
    touched = {f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)}
    assert {step.module for step in plan.merged} == touched
    (file,) = plan.files
    assert file.base is not None
    computed = {tensor.name for tensor in file.tensors if tensor.copied is None}
    leaves = ("weight", "scales", "biases")
    assert computed == {f"{step.module}.{leaf}" for step in plan.merged for leaf in leaves}
    assert plan.computed_bytes == sum(t.nbytes for t in file.tensors if t.name in computed)
    assert plan.output_bytes == plan.base_bytes
    assert plan.quantization is None


def test_no_weight_is_read(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    rows = header.TensorRef.read_rows
    monkeypatch.setattr(
        header.TensorRef, "read_rows", lambda s, *a: read.append(s.name) or rows(s, *a)
    )
    planned(tmp_path, base, adapter)
    assert read == []


def test_an_update_of_zero_is_no_step(tmp_path: Path, base: Path) -> None:
    tensors = {
        "model.layers.1.mlp.down_proj.lora_a": mx.random.normal((256, 4)),
        "model.layers.1.mlp.down_proj.lora_b": mx.zeros((4, 128)),
    }
    zero = save_adapter(tmp_path / "zero", tensors, keys=["mlp.down_proj"])
    plan = planned(tmp_path, base, zero)
    assert plan.steps == ()
    assert plan.unchanged == ("model.layers.1.mlp.down_proj",)
    assert planned(tmp_path, base, zero, bits=8).merged


def test_wider_bits_get_a_layout_and_a_configuration_of_their_own(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    plan = planned(tmp_path, base, adapter, bits=8)
    assert all(file.base is None for file in plan.files)
    assert plan.quantization is not None
    modules = {step.module for step in plan.merged}
    overrides = {name: block for name, block in plan.quantization.items() if name in modules}
    assert set(overrides) == modules
    assert all(o == {"bits": 8, "group_size": 64, "mode": "affine"} for o in overrides.values())
    assert plan.output_bytes > plan.base_bytes


def test_dequantizing_is_a_step_for_every_quantized_module(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    plan = planned(tmp_path, base, adapter, dequantize=True, dtype="float32")
    weights = [step for step in plan.steps if isinstance(step, WeightStep)]
    assert {step.module for step in weights} >= set(plan.base.quantized_modules)
    assert all(step.target_spec is None and step.dtype == "F32" for step in weights)
    others = [step for step in plan.steps if isinstance(step, ParameterStep)]
    assert {step.output.dtype for step in others} == {"F32"}
    assert plan.quantization == {}


def test_what_a_converted_base_gives_is_taken_over_by_steps(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", QWEN3_MOE, bits=None)
    adapter = make_adapter(tmp_path / "adapter", base, keys=EXPERTS)
    as_hugging_face(base, unstacked(mx.load(str(base / "model.safetensors"))))
    plan = planned(tmp_path, base, adapter)
    assert plan.base.converted
    names = {output.name for file in plan.files for output in file.tensors}
    assert names == set(plan.base.tensors)
    merged = {f"{step.module}.weight" for step in plan.merged}
    taken = {s.output.name for s in plan.steps if isinstance(s, ParameterStep)}
    assert taken == names - merged
    sizes = {name: tensor.nbytes for name, tensor in plan.base.tensors.items()}
    assert plan.computed_bytes == sum(sizes[name] for name in merged)


@pytest.mark.parametrize(
    ("options", "how", "text"),
    [
        ({"bits": 8}, {"bits": None}, "--bits 8: the base is not quantized"),
        ({"bits": 3}, {}, "--bits 3: the merged modules have 4 bits already"),
        ({"bits": 7}, {}, "--bits 7: choose one of"),
        ({"bits": 8, "dequantize": True}, {}, "exclude each other"),
        ({"dtype": "float32"}, {}, "--dtype goes with --dequantize only"),
    ],
)
def test_formats_that_make_no_sense(
    tmp_path: Path, options: dict[str, Any], how: dict[str, Any], text: str
) -> None:
    base = make_model(tmp_path / "base", **how)
    adapter = make_adapter(tmp_path / "adapter", base, keys=LINEARS[:1])
    with pytest.raises(ConfigurationError, match=text):
        planned(tmp_path, base, adapter, **options)
