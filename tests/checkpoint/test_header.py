"""Crafted safetensors files: what must be refused, and what must not."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy

from mlx_fusekit.checkpoint.header import read_header
from mlx_fusekit.errors import CheckpointError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "U8", "shape": [4], "data_offsets": [16, 20]},
}


def write(path: Path, header: Any, data: bytes = bytes(20), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def altered(**changes: Any) -> dict[str, Any]:
    return {"a": GOOD["a"], "b": {**GOOD["b"], **changes}}


def test_a_good_file_is_read(tmp_path: Path) -> None:
    data = np.arange(4, dtype=np.float32).tobytes() + bytes([1, 2, 3, 4])
    header = read_header(write(tmp_path / "m.safetensors", GOOD, data))
    assert list(header.tensors) == ["a", "b"]
    assert header.tensors["a"].read().tolist() == [[0, 1], [2, 3]]
    assert header.tensors["a"].read_rows(1, 2).tolist() == [[2, 3]]
    assert header.tensors["b"].read().tolist() == [1, 2, 3, 4]


def test_what_mlx_writes_is_read(tmp_path: Path) -> None:
    """MLX writes null as metadata, unaligned data and any order."""
    path = tmp_path / "m.safetensors"
    arrays = {f"layer.{i}.weight": mx.full((3, i + 1), i, mx.float32) for i in range(9)}
    mx.save_safetensors(str(path), arrays)
    tensors = read_header(path).tensors
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert np.array_equal(tensors[name].read(), np.array(array))


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    arrays = {"x": np.zeros((0, 4), np.float16), "y": np.array(3.5), "z": np.ones((2, 3), np.int8)}
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata["format"] == "pt"
    for name, array in arrays.items():
        assert np.array_equal(header.tensors[name].read(), array)
    assert header.tensors["y"].read_rows(0, 1).item() == 3.5


BAD = {
    "overlap": (altered(data_offsets=[12, 16]), "overlaps"),
    "hole": (altered(data_offsets=[17, 21]), "hole"),
    "short": (altered(shape=[3], data_offsets=[16, 19]), "end at byte"),
    "wrong length": (altered(shape=[5]), "offsets span"),
    "negative shape": (altered(shape=[-4]), "invalid shape"),
    "negative shapes that multiply": (altered(shape=[-2, -2]), "invalid shape"),
    "float shape": (altered(shape=[4.0]), "invalid shape"),
    "boolean shape": (altered(shape=[True, 4]), "invalid shape"),
    "shape no list": (altered(shape=4), "invalid shape"),
    "overflow": (altered(shape=[2**62, 4]), "offsets span"),
    "too large a number": (altered(shape=[2**64]), "invalid shape"),
    "negative offset": (altered(data_offsets=[-4, 0]), "invalid offsets"),
    "turned offsets": (altered(data_offsets=[20, 16]), "invalid offsets"),
    "three offsets": (altered(data_offsets=[16, 20, 24]), "invalid offsets"),
    "unknown dtype": (altered(dtype="F4"), "unknown dtype"),
    "dtype no string": (altered(dtype=["U8"]), "unknown dtype"),
    "no dtype": ({**GOOD, "b": {"shape": [4], "data_offsets": [16, 20]}}, "must have"),
    "more keys": (altered(evil=1), "must have"),
    "entry no object": ({**GOOD, "b": 3}, "must have"),
    "metadata no strings": ({**GOOD, "__metadata__": {"a": 1}}, "__metadata__"),
    "metadata no object": ({**GOOD, "__metadata__": "x"}, "__metadata__"),
    "no object": ([1, 2], "no JSON object"),
    "no json": (b"{nonsense", "not JSON"),
    "no utf-8": (b"\xff\xfe{}", "not JSON"),
    "nul in name": ({**GOOD, "b\0": GOOD["b"]}, "NUL"),
    "deep nesting": (b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_crafted_header_is_refused(tmp_path: Path, case: str) -> None:
    header, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(write(tmp_path / "m.safetensors", header))
    assert "m.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    entry = json.dumps(GOOD["a"])
    text = f'{{"a": {entry}, "a": {entry}}}'.encode()
    with pytest.raises(CheckpointError, match="twice"):
        read_header(write(tmp_path / "m.safetensors", text, bytes(16)))


@pytest.mark.parametrize(
    ("length", "message"), [(10**9, "claims"), (5000, "claims"), (2**63, "claims")]
)
def test_a_header_longer_than_the_file_is_refused(
    tmp_path: Path, length: int, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(write(tmp_path / "m.safetensors", GOOD, length=length))


@pytest.mark.parametrize("extra", [b"x", bytes(4096)])
def test_trailing_bytes_are_refused(tmp_path: Path, extra: bytes) -> None:
    with pytest.raises(CheckpointError, match="end at byte"):
        read_header(write(tmp_path / "m.safetensors", GOOD, bytes(20) + extra))


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"PK\x03\x04" + bytes(99), b"\x80\x04\x95" + bytes(99)]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_header(path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".npz", ".PT"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    # The file does not exist: a refusal by name needs no look into it.
    with pytest.raises(CheckpointError, match="never opened"):
        read_header(tmp_path / f"model{suffix}")


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", GOOD)
    tensor = read_header(path).tensors["b"]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="ended inside"):
        tensor.read()
