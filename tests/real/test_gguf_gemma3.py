"""Gemma 3 270M, a real model of a second family: from its GGUF file to MLX, and out again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, get_tensor_name_map
from gguf.constants import MODEL_ARCH
from gguf.quants import dequantize
from mlx_lm import convert
from support.models import run_model
from support.tokenizer_folders import sentencepiece_folder

from mlx_fusekit import verify
from mlx_fusekit.gguf.exporting import export_gguf
from mlx_fusekit.running.llamacpp import LlamaCpp

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("llama_cpp")

TEXT = (
    "The river that crosses the old town was once its main road. Boats carried grain, stone and "
    "letters, and every house along the bank had a door to the water. Today the boats are gone, "
    "but the doors remain, and visitors wonder why they open to nothing."
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The original file, and MLX folders made from it: float32, and 4-bit in groups of 64."""
    from fetch_gguf_fixtures import fetch_gemma3

    folder = tmp_path_factory.mktemp("gemma3")
    original = fetch_gemma3()
    write_mlx(original, folder / "float32")
    convert(
        str(folder / "float32"), str(folder / "4bit"), quantize=True, q_bits=4, dtype="bfloat16"
    )
    return {"original": original, "float32": folder / "float32", "4bit": folder / "4bit"}


def write_mlx(original: Path, folder: Path) -> None:
    """The weights of the file as float32 under Hugging Face's names."""
    folder.mkdir()
    sentencepiece_folder(folder, original, prepend=False, by_id=True)
    reader = GGUFReader(original)
    config = model_config(reader)
    names = get_tensor_name_map(MODEL_ARCH.GEMMA3, config["num_hidden_layers"])
    unread = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for module in modules(config["num_hidden_layers"]):
        tensor = unread.pop(f"{names.get_name(module)}.weight")
        values = dequantize(tensor.data, tensor.tensor_type)
        weights[f"{module}.weight"] = mx.array(values - 1 if module.endswith("norm") else values)
    assert not unread
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


def modules(layers: int) -> list[str]:
    attention = [f"self_attn.{name}" for name in ATTENTION]
    within = [*attention, *NORMS, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    paths = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in within]
    return ["model.embed_tokens", "model.norm", *paths]


def model_config(reader: GGUFReader) -> dict[str, Any]:
    def key(name: str) -> Any:
        return reader.fields[f"gemma3.{name}"].contents()

    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262_144,
        "hidden_size": key("embedding_length"),
        "num_hidden_layers": key("block_count"),
        "intermediate_size": key("feed_forward_length"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": key("attention.key_length"),
        "rms_norm_eps": 1e-6,
        "rope_theta": key("rope.freq_base"),
        "rope_local_base_freq": 10_000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": key("attention.sliding_window"),
        "sliding_window_pattern": 6,
        "max_position_embeddings": key("context_length"),
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def test_float32_gives_mlx_logits(models: dict[str, Path], tmp_path: Path) -> None:
    report = export_gguf(models["float32"], tmp_path / "f32.gguf", outtype="f32")
    assert report.exact
    running = run_model(models["float32"])
    tokens = list(running.tokenizer.encode(TEXT))
    ours = np.array(running.model(mx.array([tokens]))[0])
    with LlamaCpp(tmp_path / "f32.gguf", context=256) as llama:
        assert llama.tokenize(TEXT, add_special=True) == tokens
        theirs = llama.logits(tokens)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] >= 0.999999
    assert (ours.argmax(1) == theirs.argmax(1)).all()


def test_its_keys_are_those_of_the_original(models: dict[str, Path], tmp_path: Path) -> None:
    export_gguf(models["4bit"], tmp_path / "again.gguf")
    before, after = (GGUFReader(path) for path in (models["original"], tmp_path / "again.gguf"))
    ours = {tensor.name: tensor for tensor in after.tensors}
    assert set(ours) == {tensor.name for tensor in before.tensors}
    for name in (field for field in before.fields if field.startswith("gemma3.")):
        assert after.fields[name].contents() == pytest.approx(before.fields[name].contents()), name
    for tensor in before.tensors:
        assert list(ours[tensor.name].shape) == list(tensor.shape), tensor.name


def test_4_bits_are_repacked_and_answer_alike(models: dict[str, Path], tmp_path: Path) -> None:
    report = export_gguf(models["4bit"], tmp_path / "model.gguf")
    assert report.exact
    assert report.types["Q4_1"] == 127
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    found = verify(
        None, None, tmp_path / "model.gguf", reference=models["4bit"], data=text, max_tokens=200
    )
    assert found.structure_ok
    assert found.kl_mean < 0.01
    assert found.perplexity_fused == pytest.approx(found.perplexity_reference, rel=0.02)
