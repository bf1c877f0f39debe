"""A base that lacks a tensor is refused, whichever it is; and none of mlx-lm's classes is."""

import json
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import pytest
from support.every_class import config_of, model_of, runnable
from support.tiny import LLAMA, make_adapter, make_model

from mlx_fusekit import fuse
from mlx_fusekit.checkpoint.header import read_header
from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.errors import CheckpointError

CONFIG = {**LLAMA, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 64}
UNTIED = {**CONFIG, "tie_word_embeddings": False, "attention_bias": False}


def leave_out(folder: Path, *gone: str) -> None:
    """Save a base's weights again without some, and without an index that would tell."""
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    mx.eval(weights)
    kept = {name: value for name, value in weights.items() if not name.startswith(gone)}
    assert len(kept) < len(weights)
    mx.save_safetensors(str(path), kept, {"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


BASES = {
    "affine": {"config": CONFIG, "group_size": 32},
    "not quantized": {"config": UNTIED, "bits": None},
    "mxfp4, with a head": {"config": UNTIED, "group_size": 32, "mode": "mxfp4"},
}


@pytest.mark.parametrize("kind", BASES)
def test_each_tensor_is_missed(kind: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", **BASES[kind])
    tensors = list(read_header(base / "model.safetensors").tensors)
    assert len(tensors) > 20
    for name in tensors:
        folder = Path(shutil.copytree(base, tmp_path / "less"))
        leave_out(folder, name)
        with pytest.raises(CheckpointError, match="lack") as refused:
            open_base(folder)
        line = str(refused.value)
        assert name in line
        assert line.startswith(f"{folder}: seems to lack ")
        assert line.endswith("; download the model again, into an empty folder")
        assert "\n" not in line
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "gone",
    [
        ("model.layers.1.",),
        ("model.layers.2.",),
        ("model.layers.0.", "model.layers.1."),
        ("model.layers.1.mlp.up_proj.",),
        ("model.layers.0.self_attn.",),
        ("model.embed_tokens.",),
        ("model.layers.",),
        ("model.layers.0.mlp.gate_proj.", "model.layers.1.mlp.up_proj."),
    ],
    ids=str,
)
def test_modules_and_layers_are_missed(gone: tuple[str, ...], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "base", CONFIG, group_size=32)
    leave_out(folder, *gone)
    with pytest.raises(CheckpointError, match=f"seems to lack .*{gone[0].split('.')[1][:5]}"):
        open_base(folder)


def test_a_fuse_refuses_it(tmp_path: Path) -> None:
    """It copied what was there."""
    base = make_model(tmp_path / "base", CONFIG, group_size=32)
    adapter = make_adapter(tmp_path / "adapter", base)
    leave_out(base, "model.embed_tokens.biases")
    with pytest.raises(CheckpointError, match=r"lack model\.embed_tokens\.biases, and mlx-lm"):
        fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("name", runnable())
def test_no_class_is_missed(name: str, tmp_path: Path) -> None:
    """Layers of many classes differ; mlx-lm is asked, and says that it is whole."""
    from mlx.utils import tree_flatten

    config = config_of(name)
    model = model_of(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for path, value in tree_flatten(model.parameters()):
        dtype = {"float32": "F32", "int32": "I32", "uint32": "U32"}.get(str(value.dtype)[9:], "")
        assert dtype or str(value.dtype).endswith(("bfloat16", "float16", "uint8")), value.dtype
        dtype = dtype or {"b": "BF16", "f": "F16", "u": "U8"}[str(value.dtype)[9:][0]]
        span = [position, position + value.nbytes]
        entries[path] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": span}
        position += value.nbytes
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)
    assert open_base(tmp_path).warnings == ()
