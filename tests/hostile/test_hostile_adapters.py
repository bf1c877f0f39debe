"""Adapters of strangers: each is refused in one line, or read, in little time and memory."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.limits import in_little
from support.sweep_values import places, replaced
from support.tiny import LLAMA, make_model

from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.texts.data import training_data

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
SIZE, RANK = LLAMA["hidden_size"], 4
Q = "model.layers.1.self_attn.q_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741
DIGITS = "9" * 5000
EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
GOOD: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {
        "rank": RANK,
        "scale": 2.0,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "self_attn.o_proj"],
    },
}
#: With the settings that others write beside mlx-lm's.
EVERY_KEY: dict[str, Any] = GOOD | {
    "model": "someone/something",
    "data": "data",
    "hf_dataset": {},
    "use_dora": False,
    "peft_type": "LORA",
    "lora_alpha": 8,
    "r": RANK,
    "base_model_name_or_path": "someone/something",
    "unsloth_mlx_lora_module_ranks": {Q: RANK},
    "unsloth_mlx_lora_module_scales": {Q: 2.0},
    "optiq": {"applied_ranks": {"layer_1.self_attn.q_proj": RANK}},
    "prompt_feature": "prompt",
}
#: As mlx-lm before 0.19 wrote them.
OLD: dict[str, Any] = {
    "lora_layers": 2,
    "lora_parameters": {"rank": RANK, "scale": 2.0, "alpha": 8.0, "dropout": 0.0},
}
#: As mlx-vlm wrote them.
ALONE: dict[str, Any] = {"rank": RANK, "alpha": 2.0, "dropout": 0.0}

Tensors = dict[str, np.ndarray]
#: Makes something else of the folder of a good adapter.
Change = Callable[[Path], None]


def good_tensors() -> Tensors:
    draw = np.random.default_rng(0)
    shapes = {"lora_a": (SIZE, RANK), "lora_b": (RANK, SIZE)}
    return {
        f"{module}.{leaf}": draw.normal(0, 0.02, shape).astype(np.float32)
        for module in (Q, O)
        for leaf, shape in shapes.items()
    }


_TYPES = {"f2": "F16", "f4": "F32", "f8": "F64", "i4": "I32", "b1": "BOOL", "u1": "U8"}


def stored(tensors: Tensors) -> bytes:
    """A safetensors file of them."""
    entries, data = {}, b""
    for name, values in tensors.items():
        span = [len(data), len(data) + values.nbytes]
        kind = _TYPES[values.dtype.str[1:]]
        entries[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": span}
        data += values.tobytes()
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def settings(**changes: Any) -> Change:
    return text(json.dumps(GOOD | changes))


def parameters(**changes: Any) -> Change:
    return settings(lora_parameters=GOOD["lora_parameters"] | changes)


def parameter(name: str, value: str) -> Change:
    """With a value as it is written in JSON."""
    whole = GOOD["lora_parameters"] | {name: "VALUE"}
    return text(json.dumps(GOOD | {"lora_parameters": whole}).replace('"VALUE"', value))


def text(content: str | bytes) -> Change:
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda folder: ignore((folder / CONFIG).write_bytes(raw))


def ignore(_: Any) -> None:
    pass


def weights(change: Callable[[Tensors], Any]) -> Change:
    def write(folder: Path) -> None:
        tensors = good_tensors()
        change(tensors)
        (folder / WEIGHTS).write_bytes(stored(tensors))

    return write


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return weights(lambda t: t.update({name: np.ascontiguousarray(change(t[name]))}))


def renamed(old: str, new: str) -> Change:
    """All tensors of a module under another name."""

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return weights(rename)


def header(entries: str, data: int = 0) -> Change:
    raw = struct.pack("<Q", len(entries)) + entries.encode() + bytes(data)
    return lambda folder: ignore((folder / WEIGHTS).write_bytes(raw))


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def full(tensors: Tensors) -> Change:
    return both(
        settings(fine_tune_type="full"),
        lambda folder: ignore((folder / WEIGHTS).write_bytes(stored(tensors))),
    )


def first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(values: np.ndarray) -> np.ndarray:
        values.flat[0] = value
        return values

    return put


def dora(magnitude: np.ndarray) -> Change:
    def add(tensors: Tensors) -> None:
        tensors[f"{Q}.m"] = magnitude
        tensors[f"{O}.m"] = np.ones(SIZE, np.float32)

    return both(settings(fine_tune_type="dora"), weights(add))


def shaped(a: tuple[int, ...], b: tuple[int, ...]) -> Change:
    """A module whose matrices have these shapes."""
    return weights(
        lambda t: t.update(
            {f"{Q}.lora_a": np.zeros(a, np.float32), f"{Q}.lora_b": np.zeros(b, np.float32)}
        )
    )


def pair(name: str, rank: str, entries: int) -> str:
    shape = f'"dtype":"F32","shape":[{SIZE},{rank}],"data_offsets":[0,{entries}]'
    return f'{{"{name}.lora_a":{{{shape}}}}}'


#: By name: what makes it of a good one, and a word of why it is refused.
HOSTILE: dict[str, tuple[Change, str]] = {
    # adapter_config.json as a whole
    "no settings": (lambda f: (f / CONFIG).unlink(), "missing"),
    "settings of no bytes": (text(""), "not valid JSON"),
    "settings that are a list": (text("[]"), "JSON object"),
    "settings that are null": (text("null"), "JSON object"),
    "settings of an empty object": (text("{}"), "lora_parameters"),
    "settings in UTF-16": (text(json.dumps(GOOD).encode("utf-16")), "byte order mark"),
    "settings that are no text": (text(b"\xff\xfe\xfd"), "not valid JSON|byte order"),
    "100,000 brackets": (text("[" * 100_000), "nested too deeply"),
    "objects in objects": (text('{"a":' * 50_000 + "1" + "}" * 50_000), "nested too deeply"),
    "30 MB of settings": (text('{"a": "' + "x" * 41_000_000 + '"}'), "too large"),
    "millions of values": (text('{"a": [' + "1," * 3_000_000 + "1]}"), "values"),
    "a lone surrogate": (text('{"model": "\\ud800"}'), "surrogate"),
    "settings that are a folder": (
        lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir())[0],
        "directory|folder",
    ),
    "settings that link to themselves": (
        lambda f: ((f / CONFIG).unlink(), (f / CONFIG).symlink_to(CONFIG))[0],
        "missing|link",
    ),
    # The scale
    "a scale of 10**400": (parameter("scale", "1" + "0" * 400), "finite"),
    "a scale of 5,000 digits": (parameter("scale", DIGITS), "digits"),
    "a scale that is NaN": (parameter("scale", "NaN"), "finite"),
    "an infinite scale": (parameter("scale", "-Infinity"), "finite"),
    "a scale of 1e999": (parameter("scale", "1e999"), "finite"),
    "a scale that is text": (parameters(scale="20.0"), "finite number"),
    "a scale that is true": (parameters(scale=True), "finite number"),
    "a scale that is null": (parameters(scale=None), "no 'scale'"),
    "a scale that is a list": (parameters(scale=[2.0]), "finite number"),
    "a scale that is a long list": (parameters(scale=[2.0] * 100_000), "finite number"),
    "a scale of 1e308": (parameters(scale=1e308), "overflows"),
    "a scale of -1e39": (parameters(scale=-1e39), "overflows"),
    "an alpha of 1e308": (
        text(json.dumps({**OLD, "lora_parameters": {**OLD["lora_parameters"], "alpha": 1e308}})),
        "overflows",
    ),
    "an alpha of 10**400": (text('{"rank": 4, "alpha": 1%s}' % ("0" * 400)), "finite"),
    "a module's scale of NaN": (
        settings(unsloth_mlx_lora_module_scales={Q: float("nan")}),
        "finite",
    ),
    "a module's scale of text": (settings(unsloth_mlx_lora_module_scales={Q: "2"}), "finite"),
    # The rank
    "a rank of 2**40": (parameters(rank=2**40), "rank"),
    "a rank of 10**400": (parameter("rank", "1" + "0" * 400), "rank"),
    "a rank of 1e308": (parameters(rank=1e308), "rank"),
    "a rank of NaN": (parameter("rank", "NaN"), "rank"),
    "a negative rank": (parameters(rank=-4), "rank 4"),
    "a rank of 0": (parameters(rank=0), "rank 4"),
    "a rank of 4.5": (parameters(rank=4.5), "rank"),
    "a rank in quotes": (parameters(rank="4"), "without quotes"),
    "a rank that is true": (parameters(rank=True), "rank"),
    "a rank that is a list": (parameters(rank=[4] * 100_000), "rank"),
    "a module's rank of 2**70": (settings(unsloth_mlx_lora_module_ranks={Q: 2**70}), "rank"),
    # Keys, layers, kind
    "keys of numbers": (parameters(keys=[5]), "module names"),
    "keys that are text": (parameters(keys="self_attn.q_proj"), "module names"),
    "keys that are an object": (parameters(keys={"q": 1}), "module names"),
    "a hundred thousand wrong keys": (parameters(keys=[5] * 100_000), "module names"),
    "keys of control characters": (parameters(keys=["\x1b[2J\n\0"]), "not among|key"),
    "keys like expressions": (parameters(keys=["(a+)+$", "self_attn\\..*"]), "not among|key"),
    "no keys": (parameters(keys=[]), "not among"),
    "layers of 4.5": (settings(num_layers=4.5), "whole number"),
    "layers in quotes": (settings(num_layers="2"), "whole number"),
    "layers of 5,000 digits": (text(f'{{"num_layers": {DIGITS}}}'), "digits"),
    "layers that are a list": (settings(num_layers=[2] * 100_000), "whole number"),
    "one layer of two": (settings(num_layers=1), "last 1 layers"),
    "an unknown kind": (settings(fine_tune_type="loha"), "loha"),
    "a kind of control characters": (settings(fine_tune_type="\x1b[2J\nlora"), "known"),
    "a kind that is a list": (settings(fine_tune_type=["lora"] * 100_000), "known"),
    "parameters that are a list": (settings(lora_parameters=[4, 2.0]), "lora_parameters"),
    "parameters that are text": (settings(lora_parameters="rank 4"), "lora_parameters"),
    # Weights as a whole
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "missing"),
    "weights of no bytes": (lambda f: ignore((f / WEIGHTS).write_bytes(b"")), "0 bytes"),
    "weights of no tensors": (weights(dict.clear), "no tensors"),
    "a tensor twice": (
        header(pair(Q, "4", 0)[:-1] + "," + pair(Q, "4", 0)[1:]),
        "twice",
    ),
    "600,000 tensors": (
        header("{" + ",".join(f'"{n}":{EMPTY}' for n in range(600_000)) + "}"),
        "more than",
    ),
    "a rank of 2**60 in 20 bytes": (header(pair(Q, str(2**60), 20), 20), "bytes"),
    "a rank of 2**62 with no bytes": (header(pair(Q, str(2**62), 0)), "bytes"),
    "a negative shape": (header(pair(Q, "-4", 0)), "shape"),
    "another adapter's format": (
        both(
            settings(peft_type={"a": "\n" * 9}),
            renamed(Q + ".lora_a", "base_model.model." + Q + ".lora_A.weight"),
        ),
        "peft_type",
    ),
    # Names
    "a name with a NUL": (renamed(Q, "model\0"), "NUL"),
    "a name with a line break": (renamed(Q, "model\n\x1b[2J"), "no module"),
    "a name that leaves the folder": (renamed(Q, "../../etc/passwd"), "no module"),
    "a name from the root": (renamed(Q, "/etc/passwd"), "no module"),
    "a name of a megabyte": (renamed(Q, "x" * 1_000_000), "characters"),
    "a name without a module": (renamed(Q + ".", ""), "not one that"),
    "a layer beyond the base": (renamed(Q, Q.replace("1", "7", 1)), "no module"),
    "a layer of many digits": (renamed(Q, Q.replace("1", "9" * 400, 1)), "no module"),
    "a module that is a norm": (renamed(Q, "model.norm"), "not among"),
    "a norm that is trained": (
        both(parameters(keys=["model.norm"]), renamed(Q, "model.norm")),
        "mlx-lm cannot adapt",
    ),
    "a module that is part of a weight": (renamed(Q, Q + ".weight"), "no module"),
    # Shapes and types
    "half of a pair": (weights(lambda t: t.pop(f"{Q}.lora_b")), "missing beside"),
    "ranks that differ": (shaped((SIZE, 4), (3, SIZE)), "does not fit"),
    "another width": (shaped((SIZE - 1, 4), (4, SIZE)), "does not fit"),
    "another height": (shaped((SIZE, 4), (4, 2 * SIZE)), "does not fit"),
    "no axes": (shaped((), ()), "axes|does not fit"),
    "one axis": (shaped((SIZE,), (SIZE,)), "axes|does not fit"),
    "experts in a linear": (shaped((3, 4, SIZE), (3, SIZE, 4)), "does not fit"),
    "six axes": (shaped((1, 1, 1, 1, SIZE, 4), (1, 1, 1, 1, 4, SIZE)), "axes|does not fit"),
    "two axes and three": (shaped((SIZE, 4), (1, SIZE, 4)), "axes|does not fit"),
    "no rows": (shaped((0, 4), (4, 0)), "does not fit"),
    "no rank": (shaped((SIZE, 0), (0, SIZE)), "rank 0"),
    "whole numbers": (tensor(f"{Q}.lora_a", lambda v: v.astype("i4")), "floats"),
    "truth values": (tensor(f"{Q}.lora_a", lambda v: v.astype("b1")), "floats"),
    "NaN": (tensor(f"{Q}.lora_a", first(np.nan)), "NaN or infinity"),
    "infinity": (tensor(f"{Q}.lora_b", first(-np.inf)), "NaN or infinity"),
    "infinity in float16": (
        tensor(f"{Q}.lora_b", lambda v: first(np.inf)(v.astype("f2"))),
        "NaN or infinity",
    ),
    "numbers that overflow together": (
        weights(lambda t: [values.fill(1e25) for values in t.values()]),
        "overflows",
    ),
    # DoRA
    "a magnitude in LoRA": (
        weights(lambda t: t.update({f"{Q}.m": np.ones(SIZE, np.float32)})),
        "not one that",
    ),
    "DoRA without magnitudes": (settings(fine_tune_type="dora"), "missing"),
    "a magnitude of one row too few": (dora(np.ones(SIZE - 1, np.float32)), "does not fit"),
    "a magnitude of two axes": (dora(np.ones((SIZE, 1), np.float32)), "does not fit"),
    "a magnitude without axes": (dora(np.ones((), np.float32)), "does not fit"),
    "a magnitude of NaN": (dora(np.full(SIZE, np.nan, np.float32)), "NaN"),
    # Full fine-tunes
    "LoRA's tensors as a full fine-tune": (settings(fine_tune_type="full"), "no parameter"),
    "a full weight of another shape": (
        full({f"{Q}.weight": np.ones((SIZE, SIZE - 1), np.float32)}),
        "does not fit",
    ),
    "a full weight that is packed": (
        full({f"{Q}.weight": np.ones((SIZE, SIZE // 8), np.float32)}),
        "does not fit",
    ),
    "a full weight of NaN": (full({"model.norm.weight": np.full(SIZE, np.nan, "f4")}), "NaN"),
    "a full weight of numbers": (full({"model.norm.weight": np.ones(SIZE, "i4")}), "floats"),
    "scales as a full fine-tune": (
        full({f"{Q}.scales": np.full((SIZE, 3), 1, np.float32)}),
        "does not fit",
    ),
    "more tokens than the base has": (
        full({"model.embed_tokens.weight": np.ones((9999, SIZE), np.float32)}),
        "tokens",
    ),
    "another number of tokens in LoRA": (
        renamed(Q, "model.embed_tokens"),
        "not among|tokens|does not fit",
    ),
}
#: What is read, as mlx-lm reads it.
READ: dict[str, Change] = {
    "as it is": lambda _: None,
    "a scale of 0": parameters(scale=0),
    "a scale of -0": parameter("scale", "-0.0"),
    "a negative scale": parameters(scale=-2.0),
    "a tiny scale": parameters(scale=5e-324),
    "a rank of 4.0": parameters(rank=4.0),
    "layers of 1e9": settings(num_layers=10**9),
    "layers of -5": settings(num_layers=-5),
    "layers of 10**400": text(json.dumps(GOOD | {"num_layers": 10**400})),
    "other keys of all kinds": settings(
        **{"a": [[]], "": None, "\x1b[2J": {}, "__class__": "x", "config": "/etc/passwd"}
    ),
    "keys twice": parameters(keys=GOOD["lora_parameters"]["keys"] * 2),
    "no layers said": settings(num_layers=None),
    "a base of a long name": settings(model="a" * 100_000),
    "a base with a NUL": settings(model="a\0b"),
    "a base that is a device": settings(model="/dev/zero"),
    "a base without end": settings(model="../" * 5000),
    "a base of nobody": settings(model="~nobody-at-all/x"),
    "PEFT's alpha of 10**400": settings(peft_type="LORA", lora_alpha=10**400, r=4),
    "PEFT's rank of 10**400": settings(peft_type="LORA", lora_alpha=4, r=10**400),
    "PEFT's alpha of infinity": settings(peft_type="LORA", lora_alpha=float("inf"), r=4),
    "PEFT's rank next to nothing": settings(peft_type="LORA", lora_alpha=1e308, r=5e-324),
    "numbers in float16": weights(lambda t: t.update({n: v.astype("f2") for n, v in t.items()})),
    "zeros": weights(lambda t: [values.fill(0) for values in t.values()]),
    "hidden files beside it": lambda f: ignore((f / "._adapters.safetensors").write_bytes(b"x")),
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def base(base_folder: Path) -> BaseModel:
    return open_base(base_folder)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(GOOD))
    (folder / WEIGHTS).write_bytes(stored(good_tensors()))
    return folder


def read(folder: Path, base: BaseModel) -> None:
    """All that is asked of an adapter before anything is written."""
    opened = open_adapter(folder)
    _ = opened.mlx_lm_config, opened.notes, opened.num_layers, opened.target_tensors
    training_data(opened.config, folder)
    opened.bind(base, "someone/something")


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_a_line(name: str, adapter: Path, base: BaseModel) -> None:
    change, word = HOSTILE[name]
    change(adapter)
    with in_little(), pytest.raises(AdapterError, match=word) as refused:
        read(adapter, base)
    told = str(refused.value)
    assert told.startswith(str(adapter))
    assert len(told.splitlines()) == 1
    assert len(told) < 1500


@pytest.mark.parametrize("name", READ)
def test_it_is_read(name: str, adapter: Path, base: BaseModel) -> None:
    READ[name](adapter)
    with in_little():
        read(adapter, base)


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 50


@pytest.mark.parametrize("good", [EVERY_KEY, OLD, ALONE], ids=["every key", "old", "alone"])
def test_a_value_of_any_kind_at_any_key_is_read_or_refused(
    good: dict[str, Any], adapter: Path, base: BaseModel
) -> None:
    taken = refused = 0
    read(adapter, base)
    for changed in replaced(good):
        (adapter / CONFIG).write_text(json.dumps(changed))
        try:
            read(adapter, base)
            taken += 1
        except AdapterError as error:
            assert len(str(error).splitlines()) == 1
            assert len(str(error)) < 1500
            refused += 1
    assert taken > len(list(places(good)))
    assert refused > len(list(places(good)))
