"""Quantizing the whole model after a merge, against mlx-lm's own converter."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import convert
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from support.command import run
from support.every_class import config_of, model_of, runnable
from support.folders import as_hugging_face, unstacked
from support.tiny import LLAMA, QWEN3_MOE, make_adapter, make_model

from mlx_fusekit import FuseReport, fuse, quantize, samples, verify
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.mlx_lm import quantizable_modules
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.inspecting import ModelFacts, inspect
from mlx_fusekit.verifying.structure import check_structure

UNTIED = {**LLAMA, "tie_word_embeddings": False}
ARCHITECTURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "tied": (LLAMA, ["self_attn.q_proj", "mlp.down_proj"]),
    "untied": (UNTIED, ["self_attn.q_proj", "lm_head"]),
    "experts": (QWEN3_MOE, ["mlp.switch_mlp.up_proj", "self_attn.v_proj"]),
}
FORMATS: dict[str, dict[str, Any]] = {
    "default": {},
    "3-bit": {"q_bits": 3, "q_group_size": 32},
    "8-bit": {"q_bits": 8},
    "mxfp4": {"q_mode": "mxfp4"},
    "nvfp4": {"q_mode": "nvfp4"},
}
FLAGS = "--q-bits, --q-group-size or --q-mode"
# Less text than by default: MLX's own BLAS library on the CPU is slow.
TOKENS = 640


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors = Checkpoint.open(folder).tensors.values()
    return {t.name: (t.dtype, t.shape, t.read().tobytes()) for t in tensors}


def formats_of(folder: Path) -> dict[str, QuantSpec | None]:
    checkpoint = Checkpoint.open(folder)
    return {module: checkpoint.quantization(module) for module in checkpoint.quantized_modules}


def converted(folder: Path, target: Path, **how: Any) -> Path:
    """What ``mlx_lm.convert -q`` makes of a model; it wants a tokenizer, which these lack."""
    names = {"q_bits": "bits", "q_group_size": "group_size", "q_mode": "mode"}
    settings = {"bits": None, "group_size": None, **{names[k]: v for k, v in how.items()}}
    model, config = load_model(folder)
    model, config = quantize_model(model, config, **settings)
    save_model(target, model)
    save_config(config, target / "config.json")
    return target


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounded_it_is_what_mlx_lm_makes_of_the_merged_model(
    tmp_path: Path, architecture: str, name: str
) -> None:
    """In float32, where merging rounds nothing: the same tensors and settings."""
    config, keys = ARCHITECTURES[architecture]
    base = make_model(tmp_path / "base", config, bits=None, dtype=mx.float32)
    adapter = make_adapter(tmp_path / "adapter", base, keys=keys)
    fuse(base, adapter, tmp_path / "merged")
    expected = converted(tmp_path / "merged", tmp_path / "expected", **FORMATS[name])
    report = fuse(
        base, adapter, tmp_path / "ours", quantize=True, requantize="nearest", **FORMATS[name]
    )
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(expected)
    assert {n: t[:2] for n, t in ours.items()} == {n: t[:2] for n, t in theirs.items()}
    if "q_mode" not in FORMATS[name]:  # MLX's scales of mxfp4 are not the nearest
        for tensor, (dtype, _, data) in theirs.items():
            words = (np.frombuffer(found, np.uint8) for found in (ours[tensor][2], data))
            other = np.count_nonzero(np.not_equal(*words))
            # MLX's kernels may round otherwise what lies in the middle between two codes.
            assert other <= (2 if dtype == "U32" else 0), tensor
    specs, wanted = (formats_of(folder) for folder in (tmp_path / "ours", expected))
    assert specs == wanted
    assert sum(report.modules.values()) == len(wanted)
    told = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert told["quantization"] == told["quantization_config"]
    load_model(tmp_path / "ours", strict=True)


def test_a_quantized_base_moves_to_another_format(tmp_path: Path) -> None:
    """From its exact values, not from what a cast would make of them."""
    base = make_model(tmp_path / "base", LLAMA, bits=4)
    adapter = make_adapter(tmp_path / "adapter", base)
    fuse(base, adapter, tmp_path / "merged", dequantize=True, dtype="float32")
    expected = converted(tmp_path / "merged", tmp_path / "expected", q_bits=3)
    report = fuse(base, adapter, tmp_path / "ours", quantize=True, q_bits=3, requantize="nearest")
    ours, wanted = tensors_of(tmp_path / "ours"), tensors_of(expected)
    codes = {name for name, (dtype, _, _) in wanted.items() if dtype == "U32"}
    assert codes == {name for name, (dtype, _, _) in ours.items() if dtype == "U32"}
    assert report.modules == {"3-bit group 64": len(codes)}
    assert any("quantized a second time" in line for line in report.warnings)
    assert {ours[name][0] for name in ours if name.endswith(".scales")} == {"BF16"}
    sources = NamedSources.find(base, adapter).open()
    found = check_structure(sources.base, sources.adapter, Checkpoint.open(tmp_path / "ours"))
    assert all(check.ok for check in found)
    # Of a model that was not quantized as a whole, fewer bits are a fault.
    recipe = json.loads((tmp_path / "ours" / "fusekit.json").read_text())
    (tmp_path / "ours" / "fusekit.json").write_text(json.dumps(recipe | {"quantize": None}))
    found = check_structure(sources.base, sources.adapter, Checkpoint.open(tmp_path / "ours"))
    assert [check.name for check in found if not check.ok] == ["same tensors as the base"]


def test_a_checkpoint_that_mlx_lm_converts_goes_in_as_it_is(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", QWEN3_MOE, bits=None)
    quantize(base, tmp_path / "expected", q_bits=3, requantize="nearest")
    as_hugging_face(base, unstacked(dict(mx.load(str(base / "model.safetensors")))))
    quantize(base, tmp_path / "ours", q_bits=3, requantize="nearest")
    assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "expected")
    assert formats_of(tmp_path / "ours") == formats_of(tmp_path / "expected")
    assert str(QuantSpec(8, 64)) in map(str, formats_of(tmp_path / "ours").values())  # routers


def test_what_has_the_format_and_no_update_stays_as_it_is(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", LLAMA, bits=4)
    adapter = make_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"])
    fuse(base, adapter, tmp_path / "plain", requantize="nearest")
    fuse(base, adapter, tmp_path / "whole", quantize=True, requantize="nearest")
    assert tensors_of(tmp_path / "whole") == tensors_of(tmp_path / "plain")


@pytest.mark.parametrize("name", runnable())
def test_the_modules_are_those_that_mlx_lm_quantizes(name: str) -> None:
    """Of every class of mlx-lm, by paths and formats; nothing is computed."""
    config, model, group_size = config_of(name), model_of(name), 32
    before = {path for path, module in model.named_modules() if "scales" in module}
    try:
        quantize_model(model, dict(config), group_size, 4)
    except TypeError as error:
        pytest.skip(f"mlx-lm does not quantize it: {error}")
    quantized = {
        path: QuantSpec(module.bits, module.group_size, getattr(module, "mode", "affine"))
        for path, module in model.named_modules()
        if "scales" in module and path not in before
    }
    assert quantizable_modules(config, QuantSpec(4, group_size)) == quantized


@pytest.fixture(scope="module")
def float_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's base, unquantized, and off every 4-bit grid."""
    target = tmp_path_factory.mktemp("float") / "base"
    convert(str(samples.model_path()), str(target), dequantize=True)
    weights = mx.load(str(target / "model.safetensors"))
    mx.random.seed(3)
    for key, value in weights.items():
        if value.ndim == 2:
            noise = mx.random.normal(value.shape) * value.astype(mx.float32).std() * 0.1
            weights[key] = (value + noise).astype(value.dtype)
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    return target


@pytest.fixture(scope="module")
def ours(float_sample: Path) -> tuple[Path, FuseReport]:
    target = float_sample.with_name("ours")
    data = samples.train_data_path()
    options = {"calibration": data, "calibration_tokens": TOKENS}
    return target, fuse(
        float_sample, samples.adapter_path(), target, quantize=True, q_bits=3, **options
    )


def test_calibrated_it_is_closer_than_rounded(
    float_sample: Path, ours: tuple[Path, FuseReport]
) -> None:
    rounded = float_sample.with_name("rounded")
    fuse(
        float_sample,
        samples.adapter_path(),
        rounded,
        quantize=True,
        q_bits=3,
        requantize="nearest",
    )
    assert ours[1].requantize == "calibrated"
    assert {n: v[:2] for n, v in tensors_of(rounded).items()} == {
        n: v[:2] for n, v in tensors_of(ours[0]).items()
    }
    theirs, own = (
        verify(
            float_sample,
            samples.adapter_path(),
            folder,
            data=samples.evaluation_data_path(),
            max_tokens=800,
        )
        for folder in (rounded, ours[0])
    )
    assert own.structure_ok
    assert theirs.structure_ok
    assert own.kl_mean < theirs.kl_mean / 3


def test_the_recipe_tells_the_format(ours: tuple[Path, FuseReport]) -> None:
    recipe = json.loads((ours[0] / "fusekit.json").read_text())
    assert recipe["quantize"] == {"bits": 3, "group_size": 64, "mode": "affine"}


@pytest.fixture(scope="module")
def alone(float_sample: Path) -> tuple[Path, FuseReport]:
    """The model by itself, on text that it writes."""
    target = float_sample.with_name("alone")
    return target, quantize(float_sample, target, q_bits=3, calibration_tokens=TOKENS)


def test_a_model_without_adapters_is_quantized(
    float_sample: Path, alone: tuple[Path, FuseReport]
) -> None:
    folder, report = alone
    quantize(float_sample, float_sample.with_name("near"), q_bits=3, requantize="nearest")
    ours, theirs = (
        verify(None, None, path, reference=float_sample, data=samples.general_data_path())
        for path in (folder, float_sample.with_name("near"))
    )
    assert ours.kl_mean < theirs.kl_mean / 1.5
    assert report.calibration is not None
    assert report.calibration.source == "generated by the model"
    assert report.calibration.recovered is None
    assert report.calibration.max_kl is None
    assert report.modules == {"3-bit group 64": 29}
    assert not report.warnings
    recipe = json.loads((folder / "fusekit.json").read_text())
    assert (recipe["adapters"], recipe["kind"], recipe["modules"]) == ([], "none", [])
    assert str(float_sample.parent) not in (folder / "fusekit.json").read_text()


def test_a_budget_is_spent_where_it_gains_most(
    float_sample: Path, alone: tuple[Path, FuseReport]
) -> None:
    """In no more bytes than 3 bits for all take, closer to the model."""
    uniform = alone[1].bits_per_weight
    target = float_sample.with_name("fitted")
    report = quantize(float_sample, target, target_bpw=uniform, calibration_tokens=TOKENS)
    assert len(report.modules) > 2
    assert uniform - 0.1 < report.bits_per_weight <= uniform
    facts = inspect(target)
    assert isinstance(facts, ModelFacts)
    assert facts.bits_per_weight == pytest.approx(report.bits_per_weight)
    fitted, plain = (
        verify(None, None, path, reference=float_sample, data=samples.general_data_path())
        for path in (target, alone[0])
    )
    assert fitted.kl_mean < plain.kl_mean


def test_the_command_prints_no_adapter(float_sample: Path, tmp_path: Path) -> None:
    command = ["quantize", "--model", str(float_sample), "--save-path", str(tmp_path / "made")]
    done = run(*command, "--requantize", "nearest", "--q-mode", "mxfp4")
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout
    assert "Quantized into" in shown
    assert "29 as mxfp4" in shown
    assert "adapter" not in shown


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"q_bits": 4}, "--q-bits goes with --quantize; add that, or drop it"),
        ({"q_mode": "mxfp4"}, "--q-mode goes with --quantize; add that, or drop it"),
        (
            {"quantize": True, "q_bits": 7},
            f"{FLAGS}: MLX has no quantization 7-bit group 64",
        ),
        (
            {"quantize": True, "q_bits": 0},
            f"{FLAGS}: MLX has no quantization 0-bit group 64",
        ),
        (
            {"quantize": True, "q_mode": "mxfp4", "q_bits": 8},
            f"{FLAGS}: MLX has no quantization mxfp4",
        ),
        ({"quantize": True, "dequantize": True}, "--quantize and --dequantize exclude each other"),
        ({"quantize": True, "bits": 8}, "--bits 8: with --quantize the width is --q-bits"),
        ({"target_bpw": 4.0}, "--target-bpw 4: goes with --quantize"),
        ({"quantize": True, "target_bpw": 0.0}, "--target-bpw 0.0: must be a number of bits"),
        ({"quantize": True, "target_bpw": 2.0}, "--target-bpw 2: with all modules at 2 bits"),
        (
            {"quantize": True, "target_bpw": 4.0, "max_kl": 0.1},
            "--target-bpw 4 and --max-kl both say",
        ),
        (
            {"quantize": True, "target_bpw": 4.0, "requantize": "calibrated"},
            "--target-bpw 4: goes with --requantize auto",
        ),
        (
            {"quantize": True, "q_group_size": 128},
            "--q-group-size 128: no module of",
        ),
    ],
)
def test_settings_that_contradict_each_other(
    tmp_path: Path, options: dict[str, Any], line: str
) -> None:
    base = make_model(
        tmp_path / "base", {**LLAMA, "hidden_size": 64, "intermediate_size": 192}, bits=None
    )
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(ConfigurationError, match=line):
        fuse(base, adapter, tmp_path / "fused", **options)
    assert not (tmp_path / "fused").exists()
