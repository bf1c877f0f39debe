"""How configurations say that a base is quantized, and who quantized it: read as mlx-lm does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from support.folders import as_hugging_face
from support.models import run_teacher
from support.tiny import (
    LINEARS,
    in_float32,
    logits,
    make_adapter,
    make_model,
    teacher_layers,
)

from mlx_fusekit import fuse
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.sanitized import SanitizedModel, open_base
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.specs import QuantSpec

Q = "model.layers.0.self_attn.q_proj"
Weights = dict[str, mx.array]


def with_config(folder: Path, **changes: Any) -> Path:
    """Change settings of ``config.json``; those that are "gone" are removed."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sound")
    base = make_model(folder / "base")
    return base, make_adapter(folder / "adapter", base)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("dense") / "base", bits=None)


def named_only_quantization_config(folder: Path) -> None:
    block = {"group_size": 64, "bits": 4}
    with_config(folder, quantization="gone", quantization_config=block)


def named_only_in_the_text_model(folder: Path) -> None:
    text = {"quantization_config": {"group_size": 64, "bits": 4}}
    with_config(folder, quantization="gone", quantization_config="gone", text_config=text)


def with_bits(bits: Any) -> Callable[[Path], object]:
    block = {"group_size": 64, "bits": bits}
    return lambda folder: with_config(folder, quantization=block, quantization_config=block)


def with_a_null_in_one_module(folder: Path) -> None:
    block = json.loads((folder / "config.json").read_text())["quantization"]
    with_config(folder, quantization={**block, Q: {"bits": None, "group_size": 64}})


#: How it is said, and whether mlx-lm itself loads such a base.
SAID: dict[str, tuple[Callable[[Path], object], bool]] = {
    "only quantization_config": (named_only_quantization_config, False),
    "only in text_config": (named_only_in_the_text_model, False),
    "bits 4.0": (with_bits(4.0), True),
    'bits "4"': (with_bits("4"), True),
    "bits null": (with_bits(None), True),
    "bits that MLX has not": (with_bits(7), True),
    "null in one module": (with_a_null_in_one_module, True),
}


@pytest.mark.parametrize("case", SAID)
def test_a_quantization_said_otherwise(sound: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    say, loads = SAID[case]
    base, adapter = tmp_path / "base", sound[1]
    shutil.copytree(sound[0], base)
    say(base)
    if loads:
        assert mx.array_equal(logits(load_model(base)[0]), logits(load_model(sound[0])[0]))
    else:
        with pytest.raises(KeyError, match="quant_method"):
            load_model(base)
    opened = open_base(base)
    assert isinstance(opened, Checkpoint)
    assert {opened.quantization(m) for m in opened.quantized_modules} == {QuantSpec(4, 64)}
    fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    fuse(sound[0], adapter, tmp_path / "wanted", requantize="nearest")
    fused, wanted = (load_model(tmp_path / name)[0] for name in ("fused", "wanted"))
    assert mx.array_equal(logits(fused), logits(wanted))
    # The teacher that calibration listens to is loaded by mlx-lm, and is the same.
    teacher = run_teacher(base, adapter)
    reference = teacher_layers(sound[0], "lora", LINEARS, 2, 4, 2.0)
    reference.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    assert mx.abs(logits(teacher.model) - logits(in_float32(reference))).max().item() < 1e-4


def test_a_raw_base_that_names_only_quantization_config(
    sound: tuple[Path, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(sound[0], base)
    named_only_quantization_config(as_hugging_face(base))
    assert isinstance(open_base(base), Checkpoint)
    fuse(base, sound[1], tmp_path / "fused", requantize="nearest")
    load_model(tmp_path / "fused")


def linears(weights: Weights) -> list[str]:
    return [name.removesuffix("weight") for name in weights if name.endswith("_proj.weight")]


def packed_by_bitsandbytes(weights: Weights) -> None:
    for name in linears(weights):
        weight = f"{name}weight"
        count = weights[weight].size
        weights[weight] = mx.zeros((count // 2, 1), mx.uint8)
        weights[f"{weight}.absmax"] = mx.zeros((count // 64,))
        weights[f"{weight}.quant_map"] = mx.zeros((16,))
        weights[f"{weight}.quant_state.bitsandbytes__nf4"] = mx.zeros((80,), mx.uint8)


def packed_by_gptq(act_order: bool) -> Callable[[Weights], None]:
    def pack(weights: Weights) -> None:
        for name in linears(weights):
            rows, columns = weights.pop(f"{name}weight").shape
            weights[f"{name}qweight"] = mx.zeros((columns // 8, rows), mx.int32)
            weights[f"{name}qzeros"] = mx.zeros((columns // 64, rows // 8), mx.int32)
            weights[f"{name}scales"] = mx.ones((columns // 64, rows), mx.float16)
            if act_order:
                weights[f"{name}g_idx"] = mx.zeros((columns,), mx.int32)

    return pack


def packed_by_compressed_tensors(weights: Weights) -> None:
    for name in linears(weights):
        rows, columns = weights.pop(f"{name}weight").shape
        weights[f"{name}weight_packed"] = mx.zeros((rows, columns // 8), mx.int32)
        weights[f"{name}weight_scale"] = mx.ones((rows, columns // 32), mx.bfloat16)
        weights[f"{name}weight_shape"] = mx.array([rows, columns])


def left_as_they_are(_weights: Weights) -> None:
    """The weights of a model that was dequantized, while its configuration was not."""


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}
COMPRESSED = {"quant_method": "compressed-tensors"}
UNREADABLE: dict[str, tuple[Callable[[Weights], None], Any, str]] = {
    "bitsandbytes": (
        packed_by_bitsandbytes,
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        r"with bitsandbytes, and .*Received 42 parameters not in model: .*\.absmax, .* and 39 more",
    ),
    "bitsandbytes of old": (packed_by_bitsandbytes, {"load_in_4bit": True}, "with bitsandbytes"),
    "GPTQ with act-order": (packed_by_gptq(True), {**GPTQ, "desc_act": True}, "with gptq.*g_idx"),
    "GPTQ": (packed_by_gptq(False), {**GPTQ, "desc_act": False}, "with gptq"),
    "compressed integers": (
        packed_by_compressed_tensors,
        {**COMPRESSED, "format": "pack-quantized"},
        "with compressed-tensors.*not in model: .*weight_packed",
    ),
    "compressed float8": (
        packed_by_compressed_tensors,
        {**COMPRESSED, "format": "float-quantized"},
        "with compressed-tensors.*'float-quantized'",
    ),
    "AWQ that is none": (
        left_as_they_are,
        {"quant_method": "awq", "bits": 4, "group_size": 64},
        "with awq",
    ),
    "no settings": (left_as_they_are, "int4", "with a method that config.json does not name"),
}


@pytest.mark.parametrize("written_by", ["pt", "mlx"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_what_mlx_lm_does_not_read(dense: Path, tmp_path: Path, case: str, written_by: str) -> None:
    pack, settings, cause = UNREADABLE[case]
    base = tmp_path / "base"
    shutil.copytree(dense, base)
    adapter = make_adapter(tmp_path / "adapter", base)
    weights = dict(mx.load(str(base / "model.safetensors")))
    pack(weights)
    as_hugging_face(base, weights)
    if written_by == "mlx":
        stored = mx.load(str(base / "model.safetensors"))
        mx.eval(stored)
        mx.save_safetensors(str(base / "model.safetensors"), stored, {"format": "mlx"})
    with_config(base, quantization_config=settings)
    with pytest.raises(CheckpointError, match=f"is quantized {cause}") as caught:
        fuse(base, adapter, tmp_path / "fused")
    line = str(caught.value)
    assert line.endswith("; use the 16-bit original instead")
    assert "\n" not in line
    assert not (tmp_path / "fused").exists()


def test_modelopt_keeps_its_settings_aside(dense: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(dense, base)
    adapter = make_adapter(tmp_path / "adapter", base)
    as_hugging_face(base)
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (base / "hf_quant_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="is quantized with modelopt"):
        fuse(base, adapter, tmp_path / "fused")


def test_a_method_that_left_only_its_name_behind(dense: Path, tmp_path: Path) -> None:
    """Dequantized weights under a name that mlx-lm does not ask for: it loads them as they are."""
    base = tmp_path / "base"
    shutil.copytree(dense, base)
    adapter = make_adapter(tmp_path / "adapter", base)
    with_config(base, quantization_config={"quant_method": "bitsandbytes"})
    assert isinstance(open_base(base), Checkpoint)
    fuse(base, adapter, tmp_path / "fused")
    fuse(dense, adapter, tmp_path / "wanted")
    fused, wanted = (load_model(tmp_path / name)[0] for name in ("fused", "wanted"))
    assert mx.array_equal(logits(fused), logits(wanted))


@pytest.mark.parametrize("inside", [True, False])
def test_awq_is_read_as_mlx_lm_reads_it(dense: Path, tmp_path: Path, inside: bool) -> None:
    base = tmp_path / "base"
    shutil.copytree(dense, base)
    adapter = make_adapter(tmp_path / "adapter", base)
    weights = dict(mx.load(str(base / "model.safetensors")))
    mx.random.seed(3)
    for name in linears(weights):
        rows, columns = weights.pop(f"{name}weight").shape
        weights[f"{name}qweight"] = mx.random.randint(0, 2**31 - 1, (columns, rows // 8))
        weights[f"{name}qzeros"] = mx.random.randint(0, 2**31 - 1, (columns // 64, rows // 8))
        scales = mx.random.uniform(0.001, 0.01, (columns // 64, rows))
        weights[f"{name}scales"] = scales.astype(mx.float16)
    as_hugging_face(base, weights)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64}
    place = {"text_config": {"quantization_config": settings}}
    with_config(base, **(place if inside else {"quantization_config": settings}))
    opened = NamedSources.find(base, adapter).open().base
    assert isinstance(opened, SanitizedModel)
    model = load_model(base)[0]
    for module in ("q_proj", "o_proj"):
        path = f"model.layers.1.self_attn.{module}"
        assert opened.quantization(path) == QuantSpec(4, 64)
        wanted = np.array(model.layers[1].self_attn[module].weight)
        assert np.array_equal(opened.tensors[f"{path}.weight"].read_rows(0, len(wanted)), wanted)
    fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    load_model(tmp_path / "fused")
