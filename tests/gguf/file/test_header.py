"""A header is read as gguf wrote it; a damaged one is refused, or read, and nothing else."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.file.header import read_gguf_header


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file by gguf's own writer, with every kind of value."""
    path = tmp_path_factory.mktemp("header") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_rope_freq_base(1e4)
    writer.add_add_bos_token(False)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "\u00df"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0])
    for block in range(2):
        writer.add_tensor(f"blk.{block}.a.weight", np.ones((4, 32), np.float32))
        writer.add_tensor(f"blk.{block}.b.weight", np.ones((2, 3, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_what_gguf_wrote(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    ours, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert set(ours.keys) == {name for name in reader.fields if not name.startswith("GGUF.")}
    theirs = {
        t.name: (t.tensor_type, t.shape.tolist()[::-1], t.data_offset, t.n_bytes)
        for t in reader.tensors
    }
    assert len(theirs) == 4
    assert theirs == {
        t.name: (t.ggml_type, list(t.shape), t.start, t.nbytes) for t in ours.tensors.values()
    }


@pytest.mark.parametrize("kept", [0, 3, 20, 60, 200, 400, -64])
def test_cut_files_are_refused(tmp_path: Path, data: bytes, kept: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        read_gguf_header(path)


@given(place=st.integers(0, 600), value=st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_wrong_bytes_end_in_an_answer(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, place: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-m.gguf"
    damaged = bytearray(data)
    damaged[place] = value
    path.write_bytes(damaged)
    try:
        read_gguf_header(path)
    except CheckpointError as error:
        assert "m.gguf" in str(error)
