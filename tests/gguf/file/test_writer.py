"""A GGUF file holds the model's values, is complete or absent, and says truly what it lost."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import QWEN3_MOE, make_model

import mlx_fusekit.gguf.file.rows as rows_module
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.sanitized import LazyTensor, SanitizedModel, open_base
from mlx_fusekit.errors import CheckpointError, OutputError
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.gguf.file.plan import plan_gguf
from mlx_fusekit.gguf.file.target import gguf_target
from mlx_fusekit.gguf.file.writer import WrittenFile, write_gguf
from mlx_fusekit.gguf.models.tensors import GgufTensor
from mlx_fusekit.gguf.outtypes import OUTTYPES

FORMATS: dict[str, dict[str, Any]] = {
    "2-bit-32-BF16": {"bits": 2, "group_size": 32, "dtype": mx.bfloat16},
    "3-bit-64-F32": {"bits": 3, "group_size": 64, "dtype": mx.float32},
    "4-bit-64-BF16": {"bits": 4, "group_size": 64, "dtype": mx.bfloat16},
    "5-bit-128-F16": {"bits": 5, "group_size": 128, "dtype": mx.float16},
    "6-bit-64-F16": {"bits": 6, "group_size": 64, "dtype": mx.float16},
    "8-bit-32-BF16": {"bits": 8, "group_size": 32, "dtype": mx.bfloat16},
    "8-bit-32-F32": {"bits": 8, "group_size": 32, "dtype": mx.float32},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    "BF16": {"bits": None},
    "F16": {"bits": None, "dtype": mx.float16},
    "F32": {"bits": None, "dtype": mx.float32},
}
#: What ``auto`` makes of a weight, and whether without loss.
AUTO = {
    "2-bit": GgmlType.Q4_1,
    "3-bit": GgmlType.Q4_1,
    "4-bit": GgmlType.Q4_1,
    "5-bit": GgmlType.Q5_1,
    "6-bit": GgmlType.Q8_0,
    "8-bit": GgmlType.Q8_0,
    "mxfp4": GgmlType.MXFP4,
    "mxfp8": GgmlType.BF16,
    "nvfp4": GgmlType.NVFP4,
    "BF16": GgmlType.BF16,
    "F16": GgmlType.F16,
    "F32": GgmlType.F32,
}


def keys() -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_name("tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ß"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0])
    return writer


def all_tensors(base: BaseModel) -> list[GgufTensor]:
    """Every tensor of a model under its own name."""
    tensors = []
    for name, source in base.tensors.items():
        if name.endswith((".scales", ".biases", ".global_scale")):
            continue
        shape = source.shape
        spec = base.quantization(name.removesuffix(".weight"))
        if spec is not None:
            shape = (*shape[:-1], spec.columns(shape[-1]))
        tensors.append(GgufTensor(name, name, shape))
    return tensors


def export(folder: Path, target: Path, outtype: str = "auto", **more: Any) -> WrittenFile:
    base = open_base(folder)
    plan = plan_gguf(base, all_tensors(base), outtype=outtype, workers=more.get("workers"))
    place = gguf_target(target, overwrite=more.pop("overwrite", False))
    return write_gguf(plan, keys(), place, **more)


def true_values(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as MLX dequantizes it in float32."""
    base, stored = open_base(folder), {}
    for file in folder.glob("*.safetensors"):
        stored.update(mx.load(str(file)))
    values = {}
    for tensor in all_tensors(base):
        module = tensor.source.removesuffix(".weight")
        spec, weight = base.quantization(module), stored[tensor.source]
        if spec is None:
            values[tensor.name] = np.array(weight.astype(mx.float32))
            continue
        parts = [stored.get(f"{module}.{leaf}") for leaf in ("scales", "biases", "global_scale")]
        values[tensor.name] = dequantized(weight, spec, *parts)
    return values


def dequantized(
    weight: mx.array,
    spec: QuantSpec,
    scales: mx.array,
    biases: mx.array | None,
    global_scale: mx.array | None,
) -> np.ndarray:
    if global_scale is not None and weight.ndim == 3:
        return np.stack(
            [
                dequantized(w, spec, s, None, g)
                for w, s, g in zip(weight, scales, global_scale, strict=True)
            ]
        )
    if spec.affine:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    more = {} if global_scale is None else {"global_scale": global_scale}
    return np.array(
        mx.dequantize(
            weight,
            scales,
            biases,
            spec.group_size,
            spec.bits,
            mode=spec.mode,
            dtype=mx.float32,
            **more,
        )
    )


def read_back(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def check_errors(written: WrittenFile, true: dict[str, np.ndarray]) -> None:
    """Every reported error is that of gguf-py's values."""
    found = read_back(written.path)
    assert list(found) == [encoding.name for encoding in written.tensors]
    for encoding in written.tensors:
        error = found[encoding.name].astype(np.float64) - true[encoding.name]
        assert encoding.exact == (not error.any())
        squares = np.square(true[encoding.name], dtype=np.float64).sum()
        assert encoding.rel_rmse == pytest.approx(np.sqrt(np.square(error).sum() / squares))
        assert encoding.max_abs_error == pytest.approx(np.abs(error).max())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of tiny models by format, made when first asked for."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make_model(root / name, **FORMATS[name])
        return made[name]

    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_auto_round_trip(tmp_path: Path, models: Any, name: str) -> None:
    written = export(models(name), tmp_path / "m.gguf")
    check_errors(written, true_values(models(name)))
    kind = name[:5] if name[1:5] == "-bit" else name
    of_matrices = [e for e in written.tensors if len(e.shape) == 2]
    assert {e.ggml_type for e in of_matrices} == {AUTO[kind]}
    assert {e.ggml_type for e in written.tensors if len(e.shape) == 1} == {GgmlType.F32}
    lossy = (name.endswith("F32") and "bit" in name) or kind in ("6-bit", "8-bit")
    assert all(e.exact for e in of_matrices) == (not lossy)
    assert max(e.rel_rmse for e in of_matrices) < (1e-2 if kind in ("6-bit", "8-bit") else 1e-3)
    assert written.nbytes == written.path.stat().st_size


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", ["6-bit-64-F16", "BF16", "nvfp4"])
def test_outtypes(tmp_path: Path, models: Any, name: str, outtype: str) -> None:
    written = export(models(name), tmp_path / "m.gguf", outtype)
    check_errors(written, true_values(models(name)))
    types = {e.ggml_type for e in written.tensors if len(e.shape) == 2}
    if outtype == "lossless":
        assert all(e.exact for e in written.tensors)
    elif outtype != "auto":
        assert types == {GgmlType[outtype.upper()]}


@given(exponent=st.integers(-50, 18), outtype=st.sampled_from(["auto", "f16", "q8_0"]))
@settings(max_examples=12, deadline=None)
def test_errors_are_true_out_of_float16s_range(
    models: Any, tmp_path_factory: pytest.TempPathFactory, exponent: int, outtype: str
) -> None:
    folder = tmp_path_factory.mktemp("scaled")
    source = models("4-bit-64-BF16")
    tensors = mx.load(str(source / "model.safetensors"))
    for name, array in tensors.items():
        if name.endswith(("scales", "biases")):
            tensors[name] = (array.astype(mx.float32) * 2.0**exponent).astype(mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    try:
        written = export(folder, folder / "m.gguf", outtype)
    except CheckpointError as error:
        assert outtype == "f16" and exponent > 10 and "--outtype bf16" in str(error)
        return
    check_errors(written, true_values(folder))


def test_metadata(tmp_path: Path, models: Any) -> None:
    written = export(models("4-bit-64-BF16"), tmp_path / "m.gguf")
    reader = gguf.GGUFReader(written.path)
    assert reader.get_field("general.name").contents() == "tiny"
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "b", "ß"]
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_1
    assert reader.get_field("general.quantization_version").contents() == gguf.GGML_QUANT_VERSION


@pytest.mark.parametrize("name", ["4-bit-64-BF16", "5-bit-128-F16", "nvfp4", "8-bit-32-BF16"])
def test_row_permutations(tmp_path: Path, models: Any, name: str) -> None:
    base = open_base(models(name))
    source = "model.layers.0.self_attn.q_proj.weight"
    scattered = np.random.default_rng(0).permutation(128)
    halves = np.arange(128).reshape(4, 2, 16).swapaxes(1, 2).reshape(-1)
    tensors = [
        GgufTensor("scattered", source, (128, 128), scattered),
        GgufTensor("halves", source, (128, 128), halves),
        GgufTensor("part", source, (40, 128), np.arange(30, 70)),
        GgufTensor("bias", source.replace("weight", "bias"), (128,)),
    ]
    write_gguf(plan_gguf(base, tensors), keys(), gguf_target(tmp_path / "m.gguf"))
    write_gguf(
        plan_gguf(base, [GgufTensor("w", source, (128, 128))]),
        keys(),
        gguf_target(tmp_path / "w.gguf"),
    )
    found, plain = read_back(tmp_path / "m.gguf"), read_back(tmp_path / "w.gguf")["w"]
    for tensor in tensors[:3]:
        assert np.array_equal(found[tensor.name], plain[tensor.rows])


@pytest.mark.parametrize("global_scale", [False, True])
def test_expert_stacks(tmp_path: Path, global_scale: bool) -> None:
    folder = make_model(
        tmp_path / "moe",
        QWEN3_MOE,
        bits=4,
        group_size=16,
        mode="nvfp4",
        global_scale=global_scale,
        dtype=mx.float32,
    )
    true = true_values(folder)
    written = export(folder, tmp_path / "m.gguf")
    check_errors(written, true)
    types = {e.ggml_type for e in written.tensors if len(e.shape) == 3}
    assert types == {GgmlType.F16 if global_scale else GgmlType.NVFP4}
    base = open_base(folder)
    source = "model.layers.0.mlp.switch_mlp.up_proj.weight"
    rows = np.random.default_rng(0).permutation(4 * 64)
    tensors = [GgufTensor("experts", source, (4, 64, 128), rows)]
    plan = plan_gguf(base, tensors, outtype="f32")
    write_gguf(plan, keys(), gguf_target(tmp_path / "p.gguf"))
    found = read_back(tmp_path / "p.gguf")["experts"]
    assert np.array_equal(found, true[source].reshape(256, 128)[rows].reshape(4, 64, 128))


def test_columns_transforms_and_forced_float32(tmp_path: Path, models: Any) -> None:
    folder = models("4-bit-64-BF16")
    source, norm = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    tensors = [
        GgufTensor("doubled", source, (64, 256), transform=lambda w: 2 * w),
        GgufTensor("turned", source, (128, 128), columns=np.arange(128)[::-1]),
        GgufTensor("plus", norm, (128,), transform=lambda w: w + 1),
        GgufTensor("float", source, (128, 128), float32=True),
        GgufTensor("reshaped", norm, (1, 128)),
    ]
    plan = plan_gguf(open_base(folder), tensors, outtype="f32")
    written = write_gguf(plan, keys(), gguf_target(tmp_path / "m.gguf"))
    found, true = read_back(tmp_path / "m.gguf"), true_values(folder)
    assert np.array_equal(found["doubled"], 2 * true[source].reshape(64, 256))
    assert np.array_equal(found["turned"], true[source][:, ::-1])
    assert np.array_equal(found["plus"], true[norm] + 1)
    assert np.array_equal(found["float"], true[source])
    assert np.array_equal(found["reshaped"], true[norm].reshape(1, 128))
    assert all(e.exact and e.ggml_type == GgmlType.F32 for e in written.tensors)
    auto = plan_gguf(open_base(folder), tensors)
    types = [planned.encoding.ggml_type for planned in auto.tensors]
    assert types == [GgmlType.F16, GgmlType.F16, GgmlType.F32, GgmlType.F32, GgmlType.BF16]


def test_bytes_do_not_depend_on_workers_or_block_size(
    tmp_path: Path, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = export(models("8-bit-32-BF16"), tmp_path / "one.gguf", workers=1)
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", 700)
    many = export(models("8-bit-32-BF16"), tmp_path / "many.gguf", workers=5)
    assert one.path.read_bytes() == many.path.read_bytes()
    for first, second in zip(one.tensors, many.tensors, strict=True):
        assert first.rel_rmse == pytest.approx(second.rel_rmse)
        assert first.max_abs_error == second.max_abs_error
    again = export(models("8-bit-32-BF16"), tmp_path / "again.gguf", workers=2)
    assert again.tensors == many.tensors


def test_tensors_that_mlx_lm_computes_are_written_as_stored_ones(
    tmp_path: Path, models: Any
) -> None:
    """Also where two tensors of the file are made from one."""
    checkpoint = open_base(models("4-bit-64-BF16"))
    lazy = SanitizedModel(
        checkpoint.folder,
        checkpoint.config,
        checkpoint.headers,
        {
            name: LazyTensor(
                name, ref.dtype, ref.shape, lambda name: checkpoint.tensors[name].read()
            )
            for name, ref in checkpoint.tensors.items()
        },
        {m: checkpoint.quantization(m) for m in checkpoint.quantized_modules},
    )
    tensors = all_tensors(checkpoint)
    twice = GgufTensor("output.weight", tensors[0].source, tensors[0].shape)
    write_gguf(plan_gguf(lazy, [*tensors, twice]), keys(), gguf_target(tmp_path / "lazy.gguf"))
    write_gguf(
        plan_gguf(checkpoint, [*tensors, twice]), keys(), gguf_target(tmp_path / "plain.gguf")
    )
    assert (tmp_path / "lazy.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_progress(tmp_path: Path, models: Any) -> None:
    told: list[tuple[int, int]] = []
    written = export(
        models("4-bit-64-BF16"),
        tmp_path / "m.gguf",
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1][0] == told[-1][1] == sum(e.nbytes for e in written.tensors)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def damaged(folder: Path, source: Path, name: str, value: float) -> Path:
    tensors = mx.load(str(source / "model.safetensors"))
    array = tensors[name]
    array[..., -1] = value
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("name", "leaf", "value"),
    [
        ("4-bit-64-BF16", "mlp.up_proj.scales", np.nan),
        ("8-bit-32-F32", "mlp.up_proj.biases", -np.inf),
        ("BF16", "mlp.up_proj.weight", np.nan),
        ("F16", "mlp.up_proj.weight", -np.inf),
        ("F32", "mlp.up_proj.weight", np.nan),
        ("BF16", "input_layernorm.weight", -np.inf),
    ],
)
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, models: Any, name: str, leaf: str, value: float
) -> None:
    (tmp_path / "bad").mkdir()
    folder = damaged(tmp_path / "bad", models(name), f"model.layers.1.{leaf}", value)
    part = leaf.rpartition(".")[0]
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.{part}\.weight.*NaN"):
        export(folder, tmp_path / "out" / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_nan_codes_of_mxfp8_are_refused(tmp_path: Path, models: Any) -> None:
    (tmp_path / "bad").mkdir()
    name = "model.layers.1.mlp.up_proj.weight"
    folder = damaged(tmp_path / "bad", models("mxfp8"), name, 0x7F)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*NaN"):
        export(folder, tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_what_float16_cannot_hold_is_refused(tmp_path: Path, models: Any) -> None:
    (tmp_path / "big").mkdir()
    name = "model.layers.1.mlp.up_proj.weight"
    folder = damaged(tmp_path / "big", models("BF16"), name, 70000)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*70144.*--outtype bf16 or f32"):
        export(folder, tmp_path / "m.gguf", "f16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big"]
    assert export(folder, tmp_path / "m.gguf", "bf16").path.exists()


def test_a_missing_source_is_refused(models: Any) -> None:
    base = open_base(models("BF16"))
    with pytest.raises(CheckpointError, match=r"no tensor model\.x\.weight.*blk\.0"):
        plan_gguf(base, [GgufTensor("blk.0.x.weight", "model.x.weight", (2, 2))])


@pytest.mark.parametrize("name", ["BF16", "4-bit-64-BF16"])
def test_weights_that_do_not_fit_are_refused(models: Any, name: str) -> None:
    base, source = open_base(models(name)), "model.layers.0.self_attn.k_proj.weight"
    for tensor in (
        GgufTensor("w", source, (128, 128)),
        GgufTensor("w", source, (64, 128), np.arange(32)),
        GgufTensor("w", source, (64, 128), np.arange(1, 65)),
    ):
        with pytest.raises(CheckpointError, match=r"k_proj\.weight.*config\.json"):
            plan_gguf(base, [tensor])


def test_existing_targets(tmp_path: Path, models: Any) -> None:
    target = tmp_path / "m.gguf"
    export(models("4-bit-64-BF16"), target)
    before = target.read_bytes()
    with pytest.raises(OutputError, match="add --overwrite"):
        export(models("BF16"), target)
    assert target.read_bytes() == before
    export(models("BF16"), target, overwrite=True)
    assert target.read_bytes() != before
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no GGUF file"):
        export(models("BF16"), tmp_path / "thesis.txt", overwrite=True)
    (tmp_path / "link.gguf").symlink_to(target)
    with pytest.raises(OutputError, match="is a link"):
        export(models("BF16"), tmp_path / "link.gguf", overwrite=True)
    with pytest.raises(OutputError, match="is a folder"):
        export(models("BF16"), tmp_path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.gguf", "m.gguf", "thesis.txt"]


def test_a_full_disk_is_seen_before_the_first_byte(
    tmp_path: Path, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="make room"):
        export(models("4-bit-64-BF16"), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path: Path, models: Any) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(models("4-bit-64-BF16"), tmp_path / "m.gguf", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, models: Any) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(OutputError, match="add --overwrite"):
        export(models("F16"), target, progress=lambda done, total: target.write_text("mine"))
    assert target.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]
