"""Bases with weights in types that mlx-lm does not read as the numbers they stand for."""

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support import tiny_architectures
from support.command import run
from support.models import run_model
from support.tiny import in_float32, logits, make_adapter, make_model, teacher_layers

from mlx_fusekit import export_gguf, fuse
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.verifying.structure import check_structure

Stored = tuple[str, tuple[int, ...], bytes]
KEYS = ["self_attn.q_proj", "mlp.down_proj"]
DEEPSEEK_KEYS = ["self_attn.q_a_proj", "self_attn.o_proj", "mlp.switch_mlp.up_proj"]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def as_float8(weight: mx.array) -> Stored:
    return "F8_E4M3", weight.shape, np.array(mx.to_fp8(weight.astype(mx.float32))).tobytes()


def as_wide_float8(weight: mx.array) -> Stored:
    halves = np.array(weight.astype(mx.float16)).view(np.uint16)
    return "F8_E5M2", weight.shape, (halves >> 8).astype(np.uint8).tobytes()


def as_int8(weight: mx.array) -> Stored:
    whole = mx.round(weight.astype(mx.float32) * 100).astype(mx.int8)
    return "I8", weight.shape, np.array(whole).tobytes()


def as_float64(weight: mx.array) -> Stored:
    return "F64", weight.shape, np.array(weight.astype(mx.float32)).astype("<f8").tobytes()


def as_bfloat16(weight: mx.array) -> Stored:
    bits = weight.astype(mx.bfloat16).view(mx.uint16)
    return "BF16", weight.shape, np.array(bits).tobytes()


def save(folder: Path, tensors: dict[str, Stored], form: str) -> Path:
    """Write a model's weight file anew, in types that MLX does not write."""
    header: dict[str, object] = {"__metadata__": {"format": form}}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        span = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        data += content
    text = json.dumps(header).encode()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def with_some_weights_as(
    stored: Callable[[mx.array], Stored], folder: Path, ending: str, form: str
) -> Path:
    """A llama with the weights of one kind in another type, without scales."""
    weights = mx.load(str(make_model(folder, bits=None) / "model.safetensors"))
    tensors = {
        name: stored(weight) if name.endswith(ending) else as_bfloat16(weight)
        for name, weight in weights.items()
    }
    return save(folder, tensors, form)


def block_scaled_float8(weights: dict[str, mx.array], scalar: bool = False) -> dict[str, Stored]:
    """Matrices of layers as float8, and the inverse scales of their blocks beside them."""
    tensors = {}
    for name, weight in weights.items():
        if ".layers." not in name or weight.ndim != 2 or "proj" not in name:
            tensors[name] = as_bfloat16(weight)
            continue
        tensors[name] = as_float8(mx.clip(weight.astype(mx.float32) / 0.01, -440, 440))
        blocks = () if scalar else tuple(-(-size // 128) for size in weight.shape)
        scales = 0.01 + 0.001 * mx.arange(int(np.prod(blocks))).reshape(blocks)
        tensors[f"{name}_scale_inv"] = as_bfloat16(scales)
    return tensors


def add_fp8_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": FP8}))


def deepseek_v3_as_released(folder: Path, form: str = "pt") -> Path:
    """Float8 with scales of blocks, one matrix an expert: mlx-lm's class converts it."""
    tiny_architectures.make_model(folder, "deepseek_v3")
    raw: dict[str, mx.array] = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        prefix, stacked, rest = name.partition(".switch_mlp.")
        if stacked:
            raw |= {f"{prefix}.experts.{e}.{rest}": value[e] for e in range(value.shape[0])}
        elif ".embed_q." in name:
            layer = name.partition(".embed_q.")[0]
            # As mlx-lm takes them apart: rows of keys, then of values, head after head.
            values = mx.load(str(folder / "model.safetensors"))[f"{layer}.unembed_out.weight"]
            both = mx.concatenate([value.swapaxes(-1, -2), values], axis=1)
            raw[f"{layer}.kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])
        elif ".unembed_out." not in name:
            raw[name] = value
    add_fp8_config(folder)
    return save(folder, block_scaled_float8(raw), form)


def qwen3_fp8(folder: Path) -> Path:
    """As Qwen3-8B-FP8: mlx-lm's class does not know the scales."""
    tiny_architectures.make_model(folder, "qwen3")
    add_fp8_config(folder)
    return save(folder, block_scaled_float8(mx.load(str(folder / "model.safetensors"))), "pt")


def ministral3_fp8(folder: Path) -> Path:
    """As Ministral-3-8B-Instruct-2512: mlx-lm 0.32 multiplies the bytes by their scale."""
    tiny_architectures.make_model(folder, "ministral3")
    add_fp8_config(folder)
    weights = mx.load(str(folder / "model.safetensors"))
    return save(folder, block_scaled_float8(weights, scalar=True), "pt")


@pytest.mark.parametrize("form", ["pt", "mlx"])
def test_what_mlx_lm_converts_is_merged_as_mlx_lm_runs_it(tmp_path: Path, form: str) -> None:
    base = deepseek_v3_as_released(tmp_path / "base", form)
    adapter = make_adapter(tmp_path / "adapter", base, keys=DEEPSEEK_KEYS)
    reference = teacher_layers(base, "lora", DEEPSEEK_KEYS, 2, 4, 2.0)
    reference.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    report = fuse(base, adapter, tmp_path / "fused")
    assert report.modules == {"bfloat16": 2 * 3}  # the first layer has other matrices
    fused, config = load_model(tmp_path / "fused")
    assert "quantization_config" not in config
    untouched = dict(tree_flatten(load_model(base)[0].parameters()))
    for name, value in tree_flatten(fused.parameters()):
        if not any(key in name for key in DEEPSEEK_KEYS):
            assert mx.array_equal(value, untouched[name])
    distance = mx.abs(logits(in_float32(fused)) - logits(in_float32(reference))).max().item()
    assert distance < 0.05


@pytest.mark.parametrize("form", ["pt", "mlx"])
@pytest.mark.parametrize("ending", ["q_proj.weight", "input_layernorm.weight", "k_proj.bias"])
@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (as_int8, "I8, which mlx-lm would take for whole numbers; .*16-bit original"),
    ],
)
def test_weights_that_mlx_lm_misreads_are_refused_by_name(
    tmp_path: Path, stored: Callable[[mx.array], Stored], ending: str, form: str, told: str
) -> None:
    good = make_model(tmp_path / "good", bits=None)
    adapter = make_adapter(tmp_path / "adapter", good, keys=KEYS)
    base = with_some_weights_as(stored, tmp_path / "base", ending, form)
    where = rf"base/model.safetensors: model.layers.\d.*{ending} is stored as {told}"
    with pytest.raises(CheckpointError, match=where):
        fuse(base, adapter, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    with pytest.raises(CheckpointError, match=where):
        export_gguf(base, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=where):
        run_model(base)


def float8_as_bfloat16(weight: mx.array) -> Stored:
    float8 = mx.to_fp8(weight.astype(mx.float32))
    return as_bfloat16(mx.from_fp8(float8, dtype=mx.bfloat16))


def wide_float8_as_bfloat16(weight: mx.array) -> Stored:
    halves = np.array(weight.astype(mx.float16)).view(np.uint16) & 0xFF00
    return as_bfloat16(mx.array(halves.view(np.float16)))


def as_float32(weight: mx.array) -> Stored:
    return "F32", weight.shape, np.array(weight.astype(mx.float32)).tobytes()


@pytest.mark.parametrize("form", ["pt", "mlx"])
@pytest.mark.parametrize("ending", ["q_proj.weight", "input_layernorm.weight", "k_proj.bias"])
@pytest.mark.parametrize(
    ("stored", "same", "told"),
    [
        (as_float8, float8_as_bfloat16, "are stored as float8 without scales"),
        (as_wide_float8, wide_float8_as_bfloat16, "they are taken F8_E5M2 as BF16"),
        (as_float64, as_float32, "they are taken F64 as F32"),
    ],
)
def test_what_has_a_defined_value_is_taken_for_it(
    tmp_path: Path,
    stored: Callable[[mx.array], Stored],
    same: Callable[[mx.array], Stored],
    told: str,
    ending: str,
    form: str,
) -> None:
    """As if the same numbers were stored in a type that MLX has."""
    base = with_some_weights_as(stored, tmp_path / "base", ending, form)
    wide = with_some_weights_as(same, tmp_path / "wide", ending, form)
    adapter = make_adapter(tmp_path / "adapter", wide, keys=KEYS)
    report = fuse(base, adapter, tmp_path / "one")
    assert told in " ".join(report.warnings)
    fuse(wide, adapter, tmp_path / "two")
    first, second = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    models = [run_model(folder).model for folder in (base, wide)]
    assert mx.array_equal(*(logits(model) for model in models))
    sources = NamedSources.find(base, adapter).open()
    checks = check_structure(sources.base, sources.adapter, Checkpoint.open(tmp_path / "one"))
    assert all(check.ok for check in checks)


def test_float8_with_scales_that_mlx_lm_does_not_know(tmp_path: Path) -> None:
    base = qwen3_fp8(tmp_path / "base")
    good = tiny_architectures.make_model(tmp_path / "good", "qwen3")
    adapter = make_adapter(tmp_path / "adapter", good, keys=KEYS)
    told = (
        r"is stored as F8_E4M3, which mlx-lm does not convert for the model type qwen3 \(Received"
    )
    with pytest.raises(CheckpointError, match=told):
        fuse(base, adapter, tmp_path / "fused")


def test_float8_of_which_mlx_lm_multiplies_the_bytes(tmp_path: Path) -> None:
    base = ministral3_fp8(tmp_path / "base")
    good = tiny_architectures.make_model(tmp_path / "good", "ministral3")
    adapter = make_adapter(tmp_path / "adapter", good, keys=KEYS)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert mx.all(dict(tree_flatten(load_model(base)[0].parameters()))[name] >= 0).item()
    with pytest.raises(CheckpointError, match=r"F8_E4M3, which mlx-lm would take for whole"):
        fuse(base, adapter, tmp_path / "fused")


def test_integers_that_are_no_weights_come_along(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", bits=None)
    adapter = make_adapter(tmp_path / "adapter", base, keys=KEYS)
    weights = mx.load(str(base / "model.safetensors"))
    tensors = {name: as_bfloat16(weight) for name, weight in weights.items()}
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save(base, {**tensors, buffer: ("I64", (2,), bytes(range(16)))}, "pt")
    fuse(base, adapter, tmp_path / "fused")
    assert Checkpoint.open(tmp_path / "fused").tensors[buffer].read().tobytes() == bytes(range(16))
    load_model(tmp_path / "fused")


def test_the_command_ends_with_one_line(tmp_path: Path) -> None:
    base = with_some_weights_as(as_int8, tmp_path / "base", "q_proj.weight", "mlx")
    good = make_model(tmp_path / "good", bits=None)
    adapter = make_adapter(tmp_path / "adapter", good, keys=KEYS)
    done = run("fuse", "--model", str(base), "--adapter-path", str(adapter), "--max-kl", "0.1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_wide_float8_with_scales(tmp_path: Path) -> None:
    base = with_some_weights_as(as_wide_float8, tmp_path / "base", "q_proj.weight", "pt")
    tensors = {
        name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
        for name, tensor in Checkpoint.open(base).tensors.items()
    }
    scale = {"model.layers.0.self_attn.q_proj.weight_scale": ("F32", (1,), bytes(4))}
    save(base, tensors | scale, "pt")
    adapter = make_adapter(tmp_path / "adapter", make_model(tmp_path / "good", bits=None))
    with pytest.raises(CheckpointError, match=r"is stored as F8_E5M2 with scales, which mlx-lm"):
        fuse(base, adapter, tmp_path / "fused")


def test_what_is_decoded_leaves_nothing_behind(tmp_path: Path) -> None:
    base = with_some_weights_as(as_float64, tmp_path / "base", "q_proj.weight", "pt")
    adapter = make_adapter(tmp_path / "adapter", make_model(tmp_path / "good", bits=None))
    (place := tmp_path / "temporary").mkdir()
    command = ["fuse", "--model", str(base), "--adapter-path", str(adapter)]
    done = run(*command, "--save-path", str(tmp_path / "fused"), TMPDIR=str(place))
    assert (done.returncode, list(place.iterdir())) == (0, [])
    load_model(tmp_path / "fused")


def test_no_place_to_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = with_some_weights_as(as_float64, tmp_path / "base", "q_proj.weight", "pt")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"decoding it into .*nowhere failed \(No such file"):
        run_model(base)
