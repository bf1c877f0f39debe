"""export_gguf(): one file that holds the model, or one line that says why not, and no file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from support.exportable import as_in_file, copy_sample, make_exportable
from support.folders import rewritten
from support.tiny import dequantized

from mlx_fusekit import samples
from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.errors import CheckpointError, ConfigurationError, FusekitError, OutputError
from mlx_fusekit.gguf.exporting import ExportReport, check_export, export_gguf
from mlx_fusekit.gguf.outtypes import OUTTYPES

SAMPLE = samples.model_path()
QUANTIZED, NORMS = 29, 9
HEADS = {"q_proj": 4, "k_proj": 2}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    """The sample as GGUF, by default."""
    path = tmp_path_factory.mktemp("exported") / "sample.gguf"
    return path, export_gguf(SAMPLE, path)


def values_of(path: Path) -> dict[str, np.ndarray]:
    """The float32 values of all tensors."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}


def files_in(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder, hidden ones too, and an empty one of folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


# --- what is in the file ----------------------------------------------------------------------


def test_every_value_of_the_sample_is_in_the_file(exported: tuple[Path, ExportReport]) -> None:
    from mlx_lm.utils import load_model

    model: Any = load_model(SAMPLE)[0]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    written = values_of(exported[0])
    for path, module in model.named_modules():
        if "weight" not in module:
            continue
        quantized = "scales" in module
        weight = np.array(dequantized(module) if quantized else module.weight.astype(mx.float32))
        weight = as_in_file(path, weight, HEADS.get(path.rpartition(".")[2], 1))
        assert np.array_equal(written.pop(f"{names.get_name(path)}.weight"), weight), path
    assert not written


def test_the_metadata_are_the_models(exported: tuple[Path, ExportReport]) -> None:
    fields = gguf.GGUFReader(exported[0]).fields
    found = {name: field.contents() for name, field in fields.items()}
    assert found["general.architecture"] == "llama"
    assert found["general.type"] == "model"
    assert found["llama.block_count"] == 4
    assert found["llama.vocab_size"] == 1024 == len(found["tokenizer.ggml.tokens"])
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.chat_template"] == (SAMPLE / "chat_template.jinja").read_text()


def test_the_report_tells_what_was_written(exported: tuple[Path, ExportReport]) -> None:
    path, report = exported
    assert report.bytes == path.stat().st_size
    assert report.types == {"Q4_1": QUANTIZED, "F32": NORMS}
    assert report.exact
    assert report.inexact == report.notes == ()
    assert (report.modelfile, report.ollama_command) == (None, None)
    told = json.loads(json.dumps(report.as_json()))
    assert (told["architecture"], told["outtype"], told["model"]) == ("llama", "auto", SAMPLE.name)
    assert (told["exact"], told["inexact"], told["dry_run"]) == (True, [], False)


def test_the_same_bytes_whatever_the_number_of_workers(
    exported: tuple[Path, ExportReport], tmp_path: Path
) -> None:
    for workers in (1, 3):
        export_gguf(SAMPLE, tmp_path / "sample.gguf", workers=workers, overwrite=True)
        assert (tmp_path / "sample.gguf").read_bytes() == exported[0].read_bytes()


@pytest.mark.parametrize(
    ("outtype", "types", "exact"),
    [
        ("lossless", {"Q4_1": QUANTIZED, "F32": NORMS}, True),
        ("f32", {"F32": QUANTIZED + NORMS}, True),
        ("f16", {"F16": QUANTIZED, "F32": NORMS}, False),
        ("bf16", {"BF16": QUANTIZED, "F32": NORMS}, False),
        ("q8_0", {"Q8_0": QUANTIZED, "F32": NORMS}, False),
    ],
)
def test_outtypes(
    exported: tuple[Path, ExportReport],
    tmp_path: Path,
    outtype: str,
    types: dict[str, int],
    exact: bool,
) -> None:
    path = tmp_path / "sample.gguf"
    report = export_gguf(SAMPLE, path, outtype=outtype)
    assert report.types == types
    assert report.exact == exact
    told = {tensor["tensor"]: tensor for tensor in report.as_json()["inexact"]}
    truth, found = values_of(exported[0]), values_of(path)
    assert truth.keys() == found.keys()
    for name in truth:
        error = np.abs(found[name] - truth[name])
        if name not in told:
            assert error.max() == 0, name
            continue
        relative = np.linalg.norm(error) / np.linalg.norm(truth[name])
        assert told[name]["relative_rms_error"] == pytest.approx(relative, rel=1e-4)
        assert told[name]["max_absolute_error"] == error.max() > 0


@pytest.mark.parametrize(
    ("how", "types"),
    [
        ({"bits": None}, {"BF16": 15, "F32": 13}),
        ({"bits": None, "dtype": mx.float16}, {"F16": 15, "F32": 13}),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, {"MXFP4": 15, "F32": 13}),
        ({"mixed": {"down_proj": {"bits": 6, "group_size": 64}}}, {"Q4_1": 13, "Q8_0": 2}),
    ],
)
def test_each_weight_gets_its_own_type(
    tmp_path: Path, how: dict[str, Any], types: dict[str, int]
) -> None:
    report = export_gguf(make_exportable(tmp_path / "model", **how), tmp_path / "model.gguf")
    assert report.types.items() >= types.items()
    assert report.exact == ("Q8_0" not in types)
    assert [tensor.name for tensor in report.inexact] == [
        f"blk.{layer}.ffn_down.weight" for layer in range(2) if "Q8_0" in types
    ]


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    export_gguf(SAMPLE, tmp_path / "m.gguf", progress=lambda *step: told.append(step))
    assert {name for name, _, _ in told} == {"writing"}
    assert told[-1][1] == told[-1][2] > 1_000_000


# --- where it is written ----------------------------------------------------------------------


def test_a_dry_run_foresees_and_writes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "new" / "sample.gguf"
    for outtype in OUTTYPES:
        planned = export_gguf(SAMPLE, target, outtype=outtype, dry_run=True, modelfile=True)
        assert not any(tmp_path.iterdir())
        assert planned.dry_run
        report = export_gguf(SAMPLE, tmp_path / "made.gguf", outtype=outtype)
        assert planned.types == report.types
        assert planned.exact == report.exact
        assert {tensor.rel_rmse for tensor in planned.inexact} <= {None}
        assert 0 < report.bytes - planned.bytes < 100_000
        (tmp_path / "made.gguf").unlink()


def test_an_existing_file_is_replaced_only_when_asked(
    exported: tuple[Path, ExportReport], tmp_path: Path
) -> None:
    target = tmp_path / "sample.gguf"
    target.write_bytes(b"GGUF, an older one")
    refused = pytest.raises(OutputError, match=r"sample\.gguf: exists already; add --overwrite")
    for model, dry_run in ((SAMPLE, False), (SAMPLE, True), ("owner/to-be-downloaded", False)):
        with refused:
            export_gguf(model, target, dry_run=dry_run)
    assert files_in(tmp_path).keys() == {"sample.gguf"}
    assert target.read_bytes() == b"GGUF, an older one"
    export_gguf(SAMPLE, target, overwrite=True)
    assert target.read_bytes() == exported[0].read_bytes()


def test_a_file_that_is_no_gguf_is_never_replaced(tmp_path: Path) -> None:
    folder = copy_sample(tmp_path / "sample")
    before = files_in(tmp_path)
    with pytest.raises(OutputError, match="is no GGUF file"):
        export_gguf(folder, folder / "model.safetensors", overwrite=True)
    assert files_in(tmp_path) == before


def test_an_unknown_outtype(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--outtype q4_k: choose one of auto, lossless"):
        export_gguf(SAMPLE, tmp_path / "m.gguf", outtype="q4_k")


# --- Ollama -----------------------------------------------------------------------------------


def test_the_modelfile_has_what_the_generation_config_says(tmp_path: Path) -> None:
    folder = copy_sample(tmp_path / "sample")
    generation = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    report = export_gguf(
        folder, tmp_path / "My model.gguf", modelfile=True, system='Say "SQL".\nOnly that.'
    )
    assert report.modelfile == str(tmp_path / "Modelfile")
    assert (tmp_path / "Modelfile").read_text().splitlines() == [
        "FROM ./My model.gguf",
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.9",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        'SYSTEM "Say "SQL".',
        'Only that."',
    ]
    command = f"ollama create my-model -f {tmp_path / 'Modelfile'}"
    assert report.ollama_command == command


def test_an_existing_modelfile_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text("FROM mine")
    with pytest.raises(OutputError, match="Modelfile: exists already; add --overwrite"):
        export_gguf(SAMPLE, tmp_path / "m.gguf", modelfile=True)
    assert files_in(tmp_path).keys() == {"Modelfile"}
    export_gguf(SAMPLE, tmp_path / "m.gguf")
    assert (tmp_path / "Modelfile").read_text() == "FROM mine"
    export_gguf(SAMPLE, tmp_path / "m.gguf", modelfile=True, overwrite=True)
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./m.gguf\n")
    (tmp_path / "other" / "Modelfile").mkdir(parents=True)
    with pytest.raises(OutputError, match="Modelfile: is a folder"):
        export_gguf(SAMPLE, tmp_path / "other" / "m.gguf", modelfile=True, overwrite=True)
    assert not (tmp_path / "other" / "m.gguf").exists()


@pytest.mark.parametrize(
    ("generation", "options", "message"),
    [
        ({"temperature": "hot"}, {"modelfile": True}, r"generation_config\.json: temperature"),
        ({}, {"system": 'ends in "\nquotes"""\n.'}, "the system prompt .* let no line end"),
        ({}, {"ollama": "my model"}, "--ollama my model: not a name"),
        ({}, {"ollama": "my-model"}, "--ollama my-model: the program ollama is not on the PATH"),
    ],
)
def test_what_ollama_would_not_take_is_refused_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generation: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = copy_sample(tmp_path / "sample")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    before = files_in(tmp_path)
    with pytest.raises(FusekitError, match=message):
        export_gguf(folder, tmp_path / "m.gguf", **options)
    assert files_in(tmp_path) == before


# --- what cannot be exported ------------------------------------------------------------------


def set_value(name: str, value: float) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        def change(tensors: dict[str, mx.array]) -> None:
            tensors[name][..., -1] = value

        return rewritten(SAMPLE, folder, change)

    return damage


def without(name: str) -> Callable[[Path], Path]:
    return lambda folder: rewritten(SAMPLE, folder, lambda tensors: tensors.pop(name))


def with_tensor(name: str) -> Callable[[Path], Path]:
    return lambda folder: rewritten(SAMPLE, folder, lambda t: t.update({name: mx.zeros(256)}))


def with_config(**settings: Any) -> Callable[[Path], Path]:
    return in_json("config.json", lambda config: config.update(settings))


def in_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        path = copy_sample(folder) / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return folder

    return damage


def fewer_rows(folder: Path) -> Path:
    def change(tensors: dict[str, mx.array]) -> None:
        for leaf in ("weight", "scales", "biases"):
            tensors[f"{UP}.{leaf}"] = tensors[f"{UP}.{leaf}"][:-64]

    return rewritten(SAMPLE, folder, change)


def truncated(folder: Path) -> Path:
    path = copy_sample(folder) / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    return folder


def without_file(*names: str) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        copy_sample(folder)
        for name in names:
            (folder / name).unlink()
        return folder

    return damage


def emptied(name: str) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        (copy_sample(folder) / name).write_text("")
        return folder

    return damage


def one_token_more(tokenizer: Any) -> None:
    tokenizer["model"]["vocab"]["one more"] = 1024


def cuts_otherwise(tokenizer: Any) -> None:
    tokenizer["pre_tokenizer"]["pretokenizers"][0] = {
        "type": "Split",
        "pattern": {"Regex": "[aeiou]+"},
        "behavior": "Isolated",
        "invert": False,
    }


#: What is wrong with a folder, how it is made so, and what the line must say.
DAMAGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated shard": (truncated, r"model\.safetensors: .*(truncated|cut|offsets|bytes)"),
    "NaN scale": (set_value(f"{UP}.scales", np.nan), rf"{UP}\.weight.* NaN, infinite"),
    "infinite bias": (set_value(f"{UP}.biases", -np.inf), rf"{UP}\.weight.* NaN, infinite"),
    "NaN norm": (set_value("model.norm.weight", np.nan), r"model\.norm\.weight.*NaN"),
    "vocabulary larger than the embedding": (
        in_json("tokenizer.json", one_token_more),
        r"tokenizer\.json: token 'one more' has id 1024, but the embedding has 1024 rows",
    ),
    "missing tokenizer": (
        without_file("tokenizer.json"),
        "has neither tokenizer.json nor tokenizer.model",
    ),
    "empty tokenizer": (emptied("tokenizer.json"), r"tokenizer\.json: not valid JSON"),
    "unknown pre-tokenizer": (in_json("tokenizer.json", cuts_otherwise), r"tokenizer\.json: .*"),
    "wrong shape": (fewer_rows, rf"{UP}\.weight has shape \[576, 256\].* \[640, 256\]"),
    "wrong config": (with_config(intermediate_size=512), r"mlp\.\w+\.weight has shape"),
    "missing tensor": (without("model.norm.weight"), r"Missing 1 parameters: model\.norm\.weight"),
    "unknown tensor": (with_tensor("model.memory.weight"), r"model\.memory\.weight is none"),
    "unknown architecture": (
        with_config(model_type="gpt2"),
        r"config\.json: models of type 'gpt2' cannot .* these can: .*llama.*qwen3_moe",
    ),
    "unknown activation": (with_config(hidden_act="relu"), "hidden_act is 'relu'"),
    "missing shard": (without_file("model.safetensors"), r"model\.safetensors"),
    "missing config": (without_file("config.json"), r"config\.json: the file is missing"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_damaged_is_refused_and_nothing_is_left(tmp_path: Path, damage: str) -> None:
    make, message = DAMAGED[damage]
    folder = make(tmp_path / "model")
    (tmp_path / "old.gguf").write_bytes(b"GGUF, an older one")
    before = files_in(tmp_path)
    for target in ("old.gguf", "new/model.gguf"):
        with pytest.raises(CheckpointError, match=message) as raised:
            export_gguf(folder, tmp_path / target, overwrite=True, modelfile=True)
        assert "\n" not in str(raised.value)
        assert files_in(tmp_path) == before


#: What only reading the values shows, so that fusing cannot be spared.
IN_THE_VALUES = ("NaN scale", "infinite bias", "NaN norm")


@pytest.mark.parametrize("damage", [name for name in DAMAGED if name not in IN_THE_VALUES])
def test_headers_show_what_cannot_be_exported(tmp_path: Path, damage: str) -> None:
    make, message = DAMAGED[damage]
    with pytest.raises(CheckpointError, match=message):
        check_export(open_base(make(tmp_path / "model")))
