"""Safetensors files of strangers: each is refused in one line, or read, in little time and memory.

What the safetensors library reads is read here too, but for what no model has.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from support.limits import in_little
from support.sweep_values import replaced

from mlx_fusekit.checkpoint.header import read_header
from mlx_fusekit.errors import CheckpointError, FusekitError

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
U8 = {"dtype": "U8", "shape": [4], "data_offsets": [16, 20]}
GOOD = {"a": F32, "b": U8}
A = json.dumps(F32)
EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
DIGITS = "9" * 5000


def with_b(**changes: Any) -> dict[str, Any]:
    return {"a": F32, "b": {**U8, **changes}}


def b_as(text: str) -> str:
    """A header whose second entry is this text."""
    return f'{{"a": {json.dumps(F32)}, "b": {text}}}'


def tensors(count: int, name: str = "t{}", entry: str = EMPTY) -> str:
    return "{" + ",".join(f'"{name.format(n)}":{entry}' for n in range(count)) + "}"


def sparse(size: int, beginning: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(beginning)
            file.truncate(size)

    return write


def stored(header: Any, data: int = 20) -> bytes:
    text = header if isinstance(header, bytes | str) else json.dumps(header)
    text = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(data)


#: By name: the header, or what makes the file, and a word of why it is refused.
HOSTILE: dict[str, tuple[Any, str]] = {
    # Lengths
    "nothing": (b"", "0 bytes are no safetensors"),
    "three bytes": (b"abc", "begins with 'abc'"),
    "eight bytes": (struct.pack("<Q", 4), "claims 4 bytes"),
    "a length of 0": (struct.pack("<Q", 0) + b"{}", "claims 0 bytes"),
    "a length of 2**64 - 1": (b"\xff" * 8 + b"{}", "claims 18446744073709551615"),
    "a length of 2**63": (struct.pack("<Q", 2**63) + b"{}", "claims"),
    "a length beyond the file": (struct.pack("<Q", 999) + b"{}", "claims 999"),
    "a length in big-endian": (struct.pack(">Q", 2) + b"{}", "claims"),
    "a length that cuts the header": (struct.pack("<Q", 9) + stored(GOOD)[8:], "not JSON"),
    "a header of 99 MB": (sparse(99_000_100, struct.pack("<Q", 99_000_000)), "zeros|claims|JSON"),
    "a header of 39 MB of zeros": (sparse(39_000_100, struct.pack("<Q", 39_000_000)), "JSON"),
    "a terabyte that is not there": (sparse(1 << 40, stored(GOOD)), "end at byte"),
    # Not JSON, or not an object
    "UTF-16": (stored(json.dumps(GOOD).encode("utf-16")), "not JSON"),
    "a byte order mark": (stored(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()), "BOM"),
    "bytes that are no text": (stored(b'{"a\xff": 1}'), "utf-8"),
    "Latin-1": (stored('{"é": 1}'.encode("latin-1")), "utf-8"),
    "half a pair as bytes": (stored(b'{"\xed\xa0\x80": 1}'), "utf-8"),
    "a comma at the end": (stored(b_as(json.dumps(U8) + ",")), "not JSON"),
    "single quotes": (stored(str(GOOD)), "not JSON"),
    "a comment": (stored(json.dumps(GOOD) + "// fine"), "Extra data"),
    "two objects": (stored(json.dumps(GOOD) * 2), "Extra data"),
    "a text without an end": (stored('{"a'), "not JSON"),
    "a line break in a name": (stored('{"a\nb": 1}'), "not JSON"),
    "a list": (stored([F32]), "no JSON object"),
    "null": (stored("null"), "no JSON object"),
    "a number": (stored("12345678"), "no JSON object"),
    "NaN alone": (stored("NaN"), "no JSON object"),
    # Depth, digits, surrogates
    "100,000 brackets": (stored("[" * 100_000), "nested too deeply"),
    "100,000 objects in each other": (stored('{"a":' * 100_000), "nested too deeply"),
    "a shape nested 50,000 deep": (
        stored(b_as('{"dtype":"U8","shape":' + "[" * 50_000 + "]" * 50_000 + "}")),
        "nested too deeply",
    ),
    "5,000 digits in a shape": (
        stored(b_as('{"dtype":"U8","shape":[' + DIGITS + '],"data_offsets":[16,20]}')),
        "4,300 digits",
    ),
    "5,000 digits in an offset": (
        stored(b_as('{"dtype":"U8","shape":[4],"data_offsets":[16,' + DIGITS + "]}")),
        "4,300 digits",
    ),
    "5,000 digits in metadata": (stored('{"__metadata__":{"a":' + DIGITS + "}}"), "4,300 digits"),
    "4,000 digits in a shape": (stored(with_b(shape=[10**4000])), "invalid shape"),
    "half a pair in a name": (stored('{"\\ud800": ' + A + "}"), "surrogate"),
    "half a pair in metadata": (
        stored('{"__metadata__": {"format": "\\udc00"}, "a": ' + A + "}"),
        "surrogate",
    ),
    "half a pair in a dtype": (stored(b_as('{"dtype": "\\uDFFF"}')), "surrogate"),
    # Keys that are given twice
    "a tensor twice": (stored(f'{{"a": {A}, "a": {A}}}'), "twice"),
    "a tensor twice, once escaped": (
        stored(f'{{"a": {A}, "\\u0061": {A}}}'),
        "twice",
    ),
    "a dtype twice": (
        stored(b_as('{"dtype":"U8","dtype":"F32","shape":[4],"data_offsets":[16,20]}')),
        "'dtype' twice",
    ),
    "offsets twice": (
        stored(b_as('{"dtype":"U8","shape":[4],"data_offsets":[0,4],"data_offsets":[16,20]}')),
        "'data_offsets' twice",
    ),
    "metadata twice": (stored('{"__metadata__":{},"__metadata__":{}}'), "twice"),
    # Counts
    "600,000 empty tensors": (stored(tensors(600_000), 0), "600000 tensors"),
    "600,000 tensors, names escaped": (
        stored(tensors(600_000, entry=EMPTY.replace("data_", "data\\u005f")), 0),
        "1,200,000 values",
    ),
    "170,000 empty tensors": (stored(tensors(170_000), 0), "170000 tensors"),
    "100,001 empty tensors": (stored(tensors(100_001), 0), "100001 tensors"),
    "100,001 numbers for tensors": (stored(tensors(100_001, entry="0"), 0), "100001 tensors"),
    "ten million empty lists": (stored("[" + "[]," * 10_000_000 + "[]]"), "1,200,000 values"),
    "half a million empty objects": (
        stored(b_as("[" + "{}," * 500_000 + "{}]")),
        "must have dtype",
    ),
    "33 axes": (stored(with_b(shape=[1] * 32 + [4])), "33 axes"),
    "a million axes": (stored(with_b(shape=[1] * 900_000)), "900000 axes"),
    "a name of 30 MB": (stored({"a": F32, "b" * 30_000_000: U8}), "30000000 characters"),
    "an unknown dtype of 30 MB": (stored(with_b(dtype="U8" * 15_000_000)), "unknown dtype"),
    # Entries
    "an entry that is null": (stored({"a": F32, "b": None}), "must have"),
    "an entry that is a list": (stored({"a": F32, "b": [U8]}), "must have"),
    "an entry without a shape": (
        stored({"a": F32, "b": {"dtype": "U8", "data_offsets": [16, 20]}}),
        "must have",
    ),
    "an entry with more": (stored(with_b(strides=[1])), "must have"),
    "an entry within an entry": (stored({"a": F32, "b": {"c": U8}}), "must have"),
    "metadata of a number": (stored({**GOOD, "__metadata__": {"a": 1}}), "__metadata__"),
    "metadata of null": (stored({**GOOD, "__metadata__": {"a": None}}), "__metadata__"),
    "metadata that is a list": (stored({**GOOD, "__metadata__": ["a"]}), "__metadata__"),
    "metadata that is a tensor": (stored({"__metadata__": F32}, 16), "__metadata__"),
    "a NUL in a name": (stored({"a": F32, "b\0c": U8}), "NUL"),
    "a dtype in small letters": (stored(with_b(dtype="u8")), "unknown dtype"),
    "a dtype of half a byte": (stored(with_b(dtype="F4", shape=[8])), "unknown dtype"),
    "a dtype that is a number": (stored(with_b(dtype=3)), "unknown dtype"),
    "a dtype that is a list": (stored(with_b(dtype=["U8"])), "unknown dtype"),
    # Shapes
    "a negative axis": (stored(with_b(shape=[-4])), "invalid shape"),
    "two negative axes": (stored(with_b(shape=[-2, -2])), "invalid shape"),
    "an axis of 4.0": (stored(with_b(shape=[4.0])), "invalid shape"),
    "an axis of true": (stored(with_b(shape=[True, 4])), "invalid shape"),
    "an axis of NaN": (stored(with_b(shape=[float("nan")])), "invalid shape"),
    "an axis of infinity": (stored(b_as('{"dtype":"U8","shape":[1e999]}')), "must have"),
    "an axis in text": (stored(with_b(shape=["4"])), "invalid shape"),
    "an axis of 2**64": (stored(with_b(shape=[2**64])), "invalid shape"),
    "axes that overflow to 0": (stored(with_b(shape=[2**32, 2**32])), "offsets span"),
    "axes that overflow to 4": (stored(with_b(shape=[2**62 + 1, 4])), "offsets span"),
    "2**63 - 1, 32 times": (stored(with_b(shape=[2**63 - 1] * 32)), "offsets span"),
    "2**63 - 1 beside 0": (
        stored(with_b(shape=[2**63 - 1, 0], data_offsets=[16, 20])),
        "offsets span",
    ),
    "a shape that is null": (stored(with_b(shape=None)), "invalid shape"),
    "a shape that is an object": (stored(with_b(shape={"0": 4})), "invalid shape"),
    # Offsets
    "an overlap": (stored(with_b(data_offsets=[12, 16])), "overlaps"),
    "the same bytes twice": (stored({"a": F32, "b": F32}, 16), "overlaps"),
    "a hole": (stored(with_b(data_offsets=[17, 21]), 21), "hole"),
    "a hole before the first": (stored({"a": {**F32, "data_offsets": [4, 20]}}), "hole"),
    "an end before its beginning": (stored(with_b(data_offsets=[20, 16])), "invalid offsets"),
    "negative offsets": (stored(with_b(data_offsets=[-4, 0])), "invalid offsets"),
    "offsets of 2**63": (stored(with_b(data_offsets=[2**63, 2**63 + 4])), "invalid offsets"),
    "offsets near 2**63": (stored(with_b(data_offsets=[2**63 - 5, 2**63 - 1])), "hole"),
    "offsets that are floats": (stored(with_b(data_offsets=[16.0, 20.0])), "invalid offsets"),
    "one offset": (stored(with_b(data_offsets=[16])), "invalid offsets"),
    "three offsets": (stored(with_b(data_offsets=[16, 18, 20])), "invalid offsets"),
    "offsets that are no list": (stored(with_b(data_offsets="16")), "invalid offsets"),
    "an end beyond the file": (stored(with_b(shape=[99], data_offsets=[16, 115])), "cut off"),
    "bytes that no tensor has": (stored(GOOD, 21), "end at byte"),
    "no tensors, and bytes": (stored({}, 8), "end at byte"),
    # Other files
    "a pickle": (b"\x80\x04\x95" + bytes(99), "pickle or zip"),
    "a zip": (b"PK\x03\x04" + bytes(99), "pickle or zip"),
    "a GGUF file": (b"GGUF" + bytes(99), "GGUF"),
    "a web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    "zeros": (bytes(4096), "zeros"),
    "a header without its length": (json.dumps(GOOD).encode() + bytes(20), "is JSON"),
}

#: What is odd, but what safetensors reads.
READ: dict[str, bytes] = {
    "no tensors": stored({}, 0),
    "spaces at the end": stored(json.dumps(GOOD) + " " * 999),
    "a scalar": stored({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, 4),
    "an axis of 0": stored({"a": {"dtype": "F32", "shape": [0, 9], "data_offsets": [0, 0]}}, 0),
    "32 axes": stored(with_b(shape=[1] * 31 + [4])),
    "names in any order": stored({"b": U8, "a": F32}),
    "an empty name": stored({"": F32}, 16),
    "a name in Korean": stored({"가중치": F32}, 16),
    "a pair of surrogates": stored('{"\\ud83d\\ude00": ' + A + "}", 16),
    "what looks like half a pair": stored({"\\ud800": F32}, 16),
    "a name that is a path": stored({"../../etc/passwd": F32}, 16),
    "a terminal's commands in a name": stored({"\x1b[2J\r\n": F32}, 16),
    "metadata with commas": stored({**GOOD, "__metadata__": {"a": "[{,}]" * 1000}}),
    "20,000 empty tensors": stored(tensors(20_000), 0),
}


def written(content: Any, path: Path) -> Path:
    content(path) if callable(content) else path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    content, word = HOSTILE[name]
    path = written(content, tmp_path / "model.safetensors")
    with in_little(), pytest.raises(CheckpointError, match=word) as refused:
        read_header(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 600


@pytest.mark.parametrize("name", READ)
def test_it_is_read(name: str, tmp_path: Path) -> None:
    path = written(READ[name], tmp_path / "model.safetensors")
    with in_little():
        header = read_header(path)
    with safetensors.safe_open(path, "numpy") as theirs:
        assert set(header.tensors) == set(theirs.keys())


@pytest.mark.parametrize("name", HOSTILE)
def test_safetensors_reads_none_of_it_that_a_model_has(name: str, tmp_path: Path) -> None:
    """Refused are more: tensors and axes without number, names and types that MLX has not."""
    only_here = ("tensors", "axes", "name of", "a NUL", "twice", "with more", "half a byte")
    content = HOSTILE[name][0]
    if callable(content) or name.startswith(("ten million", "600,000")):
        pytest.skip("nothing but its size")
    path = written(content, tmp_path / "model.safetensors")
    try:
        with safetensors.safe_open(path, "numpy") as theirs:
            list(theirs.keys())
    except safetensors.SafetensorError:
        return
    assert any(word in name for word in only_here), "safetensors reads it"


def test_a_value_of_any_kind_at_any_place_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    refused = 0
    for header in replaced({"__metadata__": {"format": "mlx"}, **GOOD}):
        text = json.dumps(header)
        path.write_bytes(stored(text))
        try:
            read_header(path)
        except FusekitError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 150


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 60
