"""Index files of strangers: refused in one line, or told of where mlx-lm would read the model.

mlx-lm reads no index, so one that is wrong is no obstacle where the files hold the whole model; it
must not name a file elsewhere.
"""

import codecs
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.limits import in_little
from support.sweep_values import replaced
from support.tiny import LLAMA, make_model

from mlx_fusekit.checkpoint.folder import INDEX_NAME, Checkpoint
from mlx_fusekit.errors import CheckpointError, FusekitError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"
Index = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in two files, with its index."""
    config = {**LLAMA, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    folder = make_model(tmp_path_factory.mktemp("base") / "base", config, group_size=32)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    (folder / "model.safetensors").unlink()
    placed: dict[str, str] = {}
    for number, file in enumerate((FIRST, SECOND)):
        part = dict(sorted(weights.items())[number::2])
        mx.save_safetensors(str(folder / file), part, {"format": "mlx"})
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


def text(content: str) -> Callable[[Index], bytes]:
    return lambda _: content.encode()


def placing(**placed: Any) -> Callable[[Index], bytes]:
    """The index with some tensors elsewhere, by the last parts of their names."""

    def write(index: Index) -> bytes:
        named = {"model." + name.replace("_weight", ".weight"): f for name, f in placed.items()}
        return json.dumps({**index, "weight_map": {**index["weight_map"], **named}}).encode()

    return write


def mapping(weight_map: Any) -> Callable[[Index], bytes]:
    return lambda index: json.dumps({**index, "weight_map": weight_map}).encode()


def only(*files: str) -> Callable[[Index], bytes]:
    """The index with the tensors of some files only."""

    def write(index: Index) -> bytes:
        kept = {name: file for name, file in index["weight_map"].items() if file in files}
        return json.dumps({"weight_map": kept}).encode()

    return write


ELSEWHERE = "only files model.*beside the index are allowed"
#: By name, what makes it of the right one, and what is said: all of these are refused.
REFUSED: dict[str, tuple[Callable[[Index], bytes], str]] = {
    "a file above": (placing(norm_weight="../model.safetensors"), ELSEWHERE),
    "a file in a folder": (placing(norm_weight="sub/model.safetensors"), ELSEWHERE),
    "an absolute path": (placing(norm_weight="/etc/passwd"), ELSEWHERE),
    "an absolute path to weights": (placing(norm_weight="/model.safetensors"), ELSEWHERE),
    "a path of Windows": (placing(norm_weight="C:model.safetensors"), ELSEWHERE),
    "a backslash": (placing(norm_weight="model\\..\\x.safetensors"), ELSEWHERE),
    "a NUL": (placing(norm_weight="model\0.safetensors"), ELSEWHERE),
    "an address": (placing(norm_weight="https://example.com/model.safetensors"), ELSEWHERE),
    "a home folder": (placing(norm_weight="~/model.safetensors"), ELSEWHERE),
    "a pickle": (placing(norm_weight="pytorch_model.bin"), ELSEWHERE),
    "the configuration": (placing(norm_weight="config.json"), ELSEWHERE),
    "two dots": (placing(norm_weight=".."), ELSEWHERE),
    "an empty name": (placing(norm_weight=""), ELSEWHERE),
    "another name": (placing(norm_weight="weights.safetensors"), ELSEWHERE),
    "a line break at the end": (placing(norm_weight=f"{FIRST}\n"), ELSEWHERE),
    "a name of 30 MB": (placing(norm_weight="x" * 30_000_000), ELSEWHERE),
    "a file that is null": (placing(norm_weight=None), ELSEWHERE),
    "a file that is a number": (placing(norm_weight=1), ELSEWHERE),
    "a file that is a list": (placing(norm_weight=[FIRST]), ELSEWHERE),
    "a file that is an object": (placing(norm_weight={"file": FIRST}), ELSEWHERE),
}

#: All of these are told of.
TOLD: dict[str, tuple[Callable[[Index], bytes], str]] = {
    "nothing": (text(""), "is no JSON object"),
    "half of it": (lambda index: json.dumps(index).encode()[:99], "is no JSON object"),
    "a list": (text("[]"), "is no JSON object"),
    "null": (text("null"), "is no JSON object"),
    "random bytes": (lambda _: random.Random(0).randbytes(999), "is no JSON object"),
    "a byte order mark": (
        lambda index: codecs.BOM_UTF8 + json.dumps(index).encode(),
        "is no JSON object",
    ),
    "100,000 brackets": (text("[" * 100_000), "is no JSON object"),
    "5,000 digits": (text('{"metadata": ' + "9" * 5000 + "}"), "is no JSON object"),
    "half a surrogate pair": (text('{"weight_map": {"\\ud800": "a"}}'), "is no JSON object"),
    "ten million lists": (text("[" + "[]," * 9_999_999 + "[]]"), "is no JSON object"),
    "41 MB": (text('{"a": "' + "a" * 41_000_000 + '"}'), "is no JSON object"),
    "an empty object": (text("{}"), "has no weight_map"),
    "a map that is null": (mapping(None), "has no weight_map"),
    "a map that is a list": (mapping([NORM, FIRST]), "has no weight_map"),
    "a map that is a text": (mapping(FIRST), "has no weight_map"),
    "a map that is a number": (mapping(2), "has no weight_map"),
    "an empty map": (mapping({}), "has no weight_map"),
    "a file that is not there": (placing(norm_weight="model-3.safetensors"), "is not there"),
    "a name with a terminal's commands": (
        placing(norm_weight="model\x1b[2J.safetensors"),
        "is not there",
    ),
    "a name that is too long": (
        placing(norm_weight=f"model{'x' * 5000}.safetensors"),
        "is not there",
    ),
    "tensors that no file holds": (placing(ghost_weight=FIRST), "which no file holds"),
    "600,000 tensors that no file holds": (
        placing(**{f"ghost_{n}": FIRST for n in range(600_000)}),
        "600000|and 599999 more",
    ),
    "one file only": (only(FIRST), f"leaves out {SECOND}"),
    "the other way round": (
        lambda index: json.dumps(
            {
                "weight_map": {
                    name: SECOND if file == FIRST else FIRST
                    for name, file in index["weight_map"].items()
                }
            }
        ).encode(),
        "in another file",
    ),
}


def write(folder: Path, make: Callable[[Index], bytes]) -> None:
    path = folder / INDEX_NAME
    path.write_bytes(make(json.loads(path.read_text())))


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_a_line(name: str, folder: Path) -> None:
    make, words = REFUSED[name]
    write(folder, make)
    with in_little(), pytest.raises(CheckpointError, match=words) as refused:
        Checkpoint.open(folder)
    line = str(refused.value)
    assert line.startswith(f"{folder / INDEX_NAME}: ")
    assert "\n" not in line
    assert len(line) < len(str(folder)) + 600


@pytest.mark.parametrize("name", TOLD)
def test_it_is_told_of(name: str, folder: Path) -> None:
    make, words = TOLD[name]
    write(folder, make)
    with in_little():
        (warning,) = Checkpoint.open(folder).warnings
    assert words.partition("|")[0] in warning or words.rpartition("|")[2] in warning
    assert warning.startswith(f"{folder / INDEX_NAME}: ")
    assert "\n" not in warning
    assert len(warning) < len(str(folder)) + 600


@pytest.mark.parametrize("name", TOLD)
def test_it_hides_no_file_that_is_missing(name: str, folder: Path) -> None:
    make, _ = TOLD[name]
    write(folder, make)
    (folder / SECOND).unlink()
    with in_little(), pytest.raises(CheckpointError) as refused:
        Checkpoint.open(folder)
    assert "\n" not in str(refused.value)
    assert "download the model again" in str(refused.value)


@pytest.mark.parametrize("kind", ["a folder", "a link to nothing", "a link to itself"])
def test_what_is_no_file(kind: str, folder: Path) -> None:
    path = folder / INDEX_NAME
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("gone" if kind == "a link to nothing" else INDEX_NAME)
    with in_little():
        try:
            opened = Checkpoint.open(folder)
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:
            assert len(opened.tensors) > 9


def test_a_value_of_any_kind_at_any_place_is_told_of_or_refused(folder: Path) -> None:
    path = folder / INDEX_NAME
    refused = told = 0
    for index in replaced(json.loads(path.read_text())):
        path.write_text(json.dumps(index))
        try:
            told += len(Checkpoint.open(folder).warnings)
        except FusekitError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100
    assert told > 20


def test_there_are_enough() -> None:
    assert len(REFUSED) + len(TOLD) >= 20
