"""Configurations of strangers: refused in one line, or read, in little time and memory.

Each goes through all that reads one: the folder is opened, the formats of its modules are asked
for, mlx-lm loads it, and a GGUF file is laid out.
"""

import codecs
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import run
from support.every_class import config_of, runnable
from support.limits import in_little
from support.sweep_values import places, replaced, with_value
from support.tiny import LLAMA, make_model

from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.mlx_lm import MLX_LM_ERRORS, build, load_lazily, logical_columns
from mlx_fusekit.checkpoint.plausible import check_layers
from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.errors import CheckpointError, FusekitError
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.gguf.models.architectures import lay_out
from mlx_fusekit.inspecting import inspect

CONFIG = {**LLAMA, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
Q = "model.layers.0.self_attn.q_proj"
GONE = object()
EXPERTS = config_of("dbrx")["ffn_config"]


def everything(folder: Path) -> None:
    """All that reads a configuration."""
    checkpoint = Checkpoint.open(folder)
    for module in checkpoint.quantized_modules:
        checkpoint.quantization(module, 64)
    inspect(folder)
    load_lazily(folder)
    lay_out(open_base(folder))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "base", CONFIG, group_size=32)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


def changed(**settings: Any) -> Callable[[dict[str, Any]], bytes]:
    """The base's configuration with other settings; those that are GONE are left out."""

    def write(config: dict[str, Any]) -> bytes:
        merged = {**config, **settings}
        return json.dumps({k: v for k, v in merged.items() if v is not GONE}).encode()

    return write


def quantized(**settings: Any) -> Callable[[dict[str, Any]], bytes]:
    """With another quantization block."""
    block = {"group_size": 32, "bits": 4, **settings}
    return changed(quantization={k: v for k, v in block.items() if v is not GONE})


def one_module(**settings: Any) -> Callable[[dict[str, Any]], bytes]:
    """With another quantization of one module."""
    return quantized(**{Q: settings})


def of_class(name: str, **settings: Any) -> Callable[[dict[str, Any]], bytes]:
    def write(config: dict[str, Any]) -> bytes:
        block = {"quantization": config["quantization"]}
        return json.dumps({**config_of(name), **settings, **block}).encode()

    return write


def text(content: str) -> Callable[[dict[str, Any]], bytes]:
    return lambda _: content.encode()


def with_text(addition: str) -> Callable[[dict[str, Any]], bytes]:
    return lambda config: (json.dumps(config)[:-1] + f", {addition}}}").encode()


def nested(depth: int) -> Callable[[dict[str, Any]], bytes]:
    return with_text('"a": ' + "[" * depth + "]" * depth)


#: By name: what makes it of the base's, and a word of why it is refused.
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    # Not JSON, or not an object
    "nothing": (text(""), "not valid JSON"),
    "half of it": (lambda config: json.dumps(config).encode()[:99], "not valid JSON"),
    "a list": (text("[]"), "a JSON object"),
    "null": (text("null"), "a JSON object"),
    "a number": (text("5"), "a JSON object"),
    "a text": (text('"llama"'), "a JSON object"),
    "random bytes": (lambda _: random.Random(0).randbytes(999), "utf-8"),
    "NUL bytes": (lambda _: bytes(999), "not valid JSON"),
    "UTF-16": (lambda config: json.dumps(config).encode("utf-16"), "byte order mark"),
    "a byte order mark": (
        lambda config: codecs.BOM_UTF8 + json.dumps(config).encode(),
        "byte order mark",
    ),
    "a web page": (text("<!DOCTYPE html><html></html>"), "web page"),
    "a pointer of Git LFS": (text("version https://git-lfs.github.com/spec/v1\n"), "LFS"),
    "Python": (text("{'model_type': 'llama'}"), "not valid JSON"),
    "a comment": (text('{} // "model_type"'), "Extra data"),
    # Depth, digits, surrogates, counts
    "100,000 brackets": (text("[" * 100_000), "nested too deeply"),
    "100,000 objects": (text('{"a":' * 100_000), "nested too deeply"),
    "5,000 digits": (with_text('"num_hidden_layers": ' + "9" * 5000), "4,300 digits"),
    "5,000 digits at any key": (with_text('"_unused": ' + "9" * 5000), "4,300 digits"),
    "5,000 digits, negative": (with_text('"eos_token_id": -' + "9" * 5000), "4,300 digits"),
    "half a surrogate pair": (with_text('"model_type": "\\ud800"'), "surrogate"),
    "half a pair in a key": (with_text('"\\udfff": 1'), "surrogate"),
    "half a pair far inside": (with_text('"a": [{"b": [["\\uD834"]]}]'), "surrogate"),
    "ten million empty lists": (with_text('"a": [' + "[]," * 9_999_999 + "[]]"), "values"),
    "41 MB": (with_text('"a": "' + "a" * 41_000_000 + '"'), "too large"),
    "900 brackets": (nested(900), "recursion"),
    # Counts of what is made
    "a billion layers": (changed(num_hidden_layers=10**9), "num_hidden_layers.* is 1000000000"),
    "10**400 layers": (changed(num_hidden_layers=10**400), "num_hidden_layers"),
    "2,000 layers": (changed(num_hidden_layers=2000), "num_hidden_layers"),
    "more layers than tensors": (changed(num_hidden_layers=900), "has 900 layers"),
    "a billion layers of a text model": (
        changed(text_config={"num_hidden_layers": 10**9}),
        "num_hidden_layers",
    ),
    "a billion layers far inside": (
        changed(a=[{"b": {"num_layers": 10**9}}]),
        "num_layers",
    ),
    "a billion layers, n_layers": (changed(n_layers=10**9), "n_layers"),
    "a billion layers, n_layer": (of_class("gpt2", n_layer=10**9), "n_layer"),
    "a billion layers, num_layers": (of_class("exaone", num_layers=10**9), "num_layers"),
    "a billion reused layers": (of_class("afm7", num_kv_reuse_layers=10**9), "num_kv_reuse"),
    "a billion layers in a list": (changed(num_hidden_layers=[10**9]), "num_hidden_layers"),
    "a million experts": (
        of_class("dbrx", ffn_config={**EXPERTS, "moe_num_experts": 10**6}),
        "moe_num_experts",
    ),
    "a billion experts": (
        of_class("dbrx", ffn_config={**EXPERTS, "moe_num_experts": 10**9}),
        "moe_num_experts",
    ),
    "a billion heads with norms": (
        of_class("stablelm", qk_layernorm=True, num_attention_heads=10**9),
        "num_attention_heads|cannot|does not",
    ),
    "a billion streams": (of_class("deepseek_v41", hc_mult=10**9), "hc_mult"),
    "no layers": (changed(num_hidden_layers=0), "cannot load|layers"),
    "minus one layer": (changed(num_hidden_layers=-1), "cannot load|layers"),
    "layers of 1e308": (changed(num_hidden_layers=1e308), "layers|cannot"),
    "layers of NaN": (changed(num_hidden_layers=float("nan")), "cannot"),
    "layers in text": (changed(num_hidden_layers="1"), "cannot"),
    "layers of true": (changed(num_hidden_layers={"a": 1}), "cannot"),
    # Sizes
    "a hidden size of 0": (changed(hidden_size=0), "cannot load"),
    "a hidden size of -64": (changed(hidden_size=-64), "cannot|correct|Invalid"),
    "a hidden size of a billion": (changed(hidden_size=10**9), "shape|correct|cannot"),
    "a hidden size of 2**63": (changed(hidden_size=2**63), "cannot"),
    "a hidden size of 64.0": (changed(hidden_size=64.5), "cannot"),
    "another hidden size": (changed(hidden_size=128), "shape|correct|columns"),
    "no heads": (changed(num_attention_heads=0), "cannot|zero"),
    "a billion heads": (changed(num_attention_heads=10**9), "cannot|shape|correct"),
    "heads of -4": (changed(num_attention_heads=-4), "cannot|correct"),
    "no key heads": (changed(num_key_value_heads=0), "cannot|correct|zero"),
    "a head of a billion": (changed(head_dim=10**9), "cannot|correct"),
    "a vocabulary of 0": (changed(vocab_size=0), "cannot|correct"),
    "a vocabulary of a billion": (changed(vocab_size=10**9), "cannot|shape|correct"),
    "an intermediate size of 0": (changed(intermediate_size=0), "wide|cannot|correct"),
    "an intermediate size of null": (changed(intermediate_size=None), "cannot"),
    # Types
    "no model type": (changed(model_type=GONE), "model_type"),
    "a model type that is null": (changed(model_type=None), "None"),
    "a model type that is a list": (changed(model_type=["llama"]), "cannot load"),
    "a model type that is a path": (changed(model_type="../../evil"), "evil"),
    "a model type of the terminal": (changed(model_type="\x1b[2J\r\n"), "Model type"),
    "a model type that is a module": (changed(model_type="os"), "os"),
    "a model file": (changed(model_file="model.py"), "trust_remote_code|custom"),
    "scaling that is a number": (changed(rope_scaling=4), "cannot|scaling|setting"),
    "scaling of a type that is a list": (
        changed(rope_scaling={"type": ["x"], "factor": 2.0}),
        "cannot|scaling|setting",
    ),
    "a base of rotations in text": (changed(rope_theta="x"), "makes no sense"),
    "epsilon in text": (changed(rms_norm_eps="x"), "eps|cannot"),
    "epsilon of 10**400": (changed(rms_norm_eps=10**400), "eps|cannot"),
    # Quantization
    "groups of 0": (quantized(group_size=0), "group_size|not .* as config"),
    "groups of -32": (quantized(group_size=-32), "group_size"),
    "groups in a list": (quantized(group_size=[32]), "group_size"),
    "groups of half a column": (quantized(group_size=0.5), "group_size"),
    "one module of 0 bits": (one_module(bits=0, group_size=32), "none that MLX has"),
    "one module of 4.0 bits": (one_module(bits=4.0, group_size=32), "cannot load"),
    "one module of 4.5 bits": (one_module(bits=4.5, group_size=32), "none that MLX has"),
    "one module of a billion bits": (one_module(bits=10**9, group_size=32), "none that MLX"),
    "one module in groups of 0": (one_module(bits=4, group_size=0), "none that MLX has"),
    "one module in groups of 7": (one_module(bits=4, group_size=7), "none that MLX has"),
    "one module of a mode that is none": (one_module(bits=4, group_size=32, mode="x"), "mode"),
    "one module of a mode that is a list": (one_module(bits=4, mode=[]), "mode|none that MLX"),
    "one module of other bits": (one_module(bits=8, group_size=32), "not 8-bit"),
    "one module that is not": (quantized(**{Q: False}), "cannot"),
    "a method that is a number": (
        changed(quantization=GONE, quantization_config={"quant_method": 3}),
        "cannot|with 3",
    ),
    "a block that is a list": (changed(quantization=[4, 32], quantization_config=GONE), "cannot"),
}

#: What is odd, but what mlx-lm reads too.
READ: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "as it is": changed(),
    "bits of 4.0": quantized(bits=4.0),
    "groups of 32.0": quantized(group_size=32.0),
    "a context of ten million": changed(max_position_embeddings=10**7),
    "rotations of a hundred million": changed(rope_theta=10**8),
    "ids of tokens without number": changed(eos_token_id=[10**9, 2**40], pad_token_id=-1),
    "layers that the model does not have": changed(max_window_layers=70),
    "infinity": changed(time_step_limit=[0.0, float("inf")]),
    "a number of parameters": changed(num_parameters=8 * 10**9, seed=2**62),
    "100 brackets": nested(100),
    "a head of 0": changed(head_dim=0),
    "a text model that is a list": changed(text_config=[1]),
    "groups of infinity": quantized(group_size=float("inf")),
    "a thousand keys": changed(**{f"key_{n}": n for n in range(1000)}),
    "a key twice": with_text('"hidden_size": 64'),
    "a pair of surrogates": with_text('"name": "\\ud83d\\ude00"'),
}


def write(folder: Path, make: Callable[[dict[str, Any]], bytes]) -> None:
    path = folder / "config.json"
    path.write_bytes(make(json.loads(path.read_text())))


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_a_line(name: str, folder: Path) -> None:
    make, word = HOSTILE[name]
    write(folder, make)
    with in_little(), pytest.raises(CheckpointError, match=word) as refused:
        everything(folder)
    line = str(refused.value)
    assert str(folder) in line or "config.json" in line
    assert "\n" not in line
    assert len(line) < len(str(folder)) + 800


@pytest.mark.parametrize("name", READ)
def test_it_is_read(name: str, folder: Path) -> None:
    write(folder, READ[name])
    with in_little():
        everything(folder)
    assert Checkpoint.open(folder).quantization(Q, 64) == QuantSpec(4, 32)


def test_a_value_of_any_kind_at_any_key_is_read_or_refused(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]  # the same once more
    refused = 0
    for changed_config in replaced({**config, "quantization": {**config["quantization"], Q: {}}}):
        path.write_text(json.dumps(changed_config))
        try:
            everything(folder)
        except FusekitError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.real if place % 6 else ())
        for place, name in enumerate(runnable())
    ],
)
def test_a_billion_of_anything_in_any_class(name: str, tmp_path: Path) -> None:
    """Whatever a class calls its counts; what is made is never computed."""
    config, refused = config_of(name), 0
    numbers = [p for p in places(config) if type(value_at(config, p)) is int]
    for path in numbers:
        many = with_value(config, path, 10**9)
        with in_little():
            try:
                check_layers(many, 99, tmp_path)
                build(many)
            except MLX_LM_ERRORS as error:
                refused += isinstance(error, CheckpointError)
    assert refused


@pytest.mark.parametrize("name", runnable())
def test_no_class_is_refused(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    check_layers(config, 1, tmp_path)
    build(config)
    assert logical_columns(config)


def test_exporting_a_billion_layers_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    """It grew without end."""
    write(folder, changed(num_hidden_layers=10**9))
    result = run("export-gguf", "--model", str(folder), "--gguf-path", str(tmp_path / "a.gguf"))
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "'num_hidden_layers' is 1000000000, and the weights are only" in result.stderr
    assert not (tmp_path / "a.gguf").exists()


def value_at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 60
