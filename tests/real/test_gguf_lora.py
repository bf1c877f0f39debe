"""An exported adapter does in llama.cpp what it does in mlx-lm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model, load_tokenizer
from support.exact_match import encode_chat_item, load_chat_items
from support.models import run_teacher
from support.tiny import make_adapter
from support.tiny_architectures import CONFIGS, VOCABULARY, make_model

from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf import lora
from mlx_fusekit.gguf.exporting import export_gguf
from mlx_fusekit.gguf.file.plan import plan_gguf
from mlx_fusekit.gguf.file.target import gguf_target
from mlx_fusekit.gguf.file.writer import write_gguf
from mlx_fusekit.gguf.lora import export_lora
from mlx_fusekit.gguf.models import hyperparameters
from mlx_fusekit.gguf.models.architectures import lay_out
from mlx_fusekit.running.llamacpp import LlamaCpp

if TYPE_CHECKING:
    from pathlib import Path

    from fetch_smollm2 import ModelFolders
    from train_adapter import AdapterFolders

    from mlx_fusekit.formats.floats import Float32

pytest.importorskip("llama_cpp")

TOKENS = [(7 * i + 3) % VOCABULARY for i in range(40)]
#: As in test_gguf_architectures.py: of GELU as a table, in standard deviations of the logits.
LARGEST_ERROR = 0.01
#: What llama.cpp leaves unadapted in deepseek2.
IGNORED = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "lm_head")


@dataclass(frozen=True)
class Logits:
    """Of the same text, ``[tokens, vocabulary]``: base, and base with adapter."""

    base: Float32
    adapted: Float32


def correlation(one: Float32, other: Float32) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def export(folder: Path, path: Path, outtype: str = "f32") -> Path:
    base = open_base(folder)
    layout = lay_out(base)
    keys = gguf.GGUFWriter(None, layout.architecture)
    hyperparameters.write(layout.hyperparameters, keys)
    keys.add_tokenizer_model("none")
    write_gguf(plan_gguf(base, layout.tensors, outtype=outtype), keys, gguf_target(path))
    return path


def in_mlx(folder: Path, adapter: Path) -> Logits:
    running = run_teacher(folder, adapter)
    assert running.exact
    adapted = np.array(running.model(mx.array([TOKENS]))[0].astype(mx.float32))
    with running.without_adapter() as model:
        return Logits(np.array(model(mx.array([TOKENS]))[0].astype(mx.float32)), adapted)


def in_llama_cpp(path: Path, adapter: Path | None = None, scale: float = 1.0) -> Float32:
    with LlamaCpp(path, context=512, threads=1, adapter=adapter, adapter_scale=scale) as model:
        return model.logits(TOKENS)


def adaptable(folder: Path) -> list[str]:
    """Every module that mlx-lm trains adapters of, but those that llama.cpp cannot adapt."""
    kinds = nn.Linear | nn.Embedding | nn.QuantizedLinear | nn.QuantizedEmbedding | SwitchLinear
    model, _ = load_model(folder)
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    layout = lay_out(open_base(folder))
    if "output.weight" not in {tensor.name for tensor in layout.tensors}:
        paths = [path for path in paths if not path.endswith("embed_tokens")]
    if layout.architecture == "deepseek2":
        paths = [path for path in paths if not path.endswith(IGNORED)]
    return paths


@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_is_adapted(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "model", name)
    path = export(folder, tmp_path / "model.gguf")
    adapter = make_adapter(tmp_path / "adapter", folder, keys=adaptable(folder), num_layers=0)
    export_lora(folder, adapter, tmp_path / "adapter.gguf")
    mlx, found = in_mlx(folder, adapter), in_llama_cpp(path, tmp_path / "adapter.gguf")
    assert correlation(mlx.base, mlx.adapted) < 0.9
    assert correlation(found, mlx.adapted) >= 0.999999
    assert np.abs(found - mlx.adapted).max() < LARGEST_ERROR * mlx.adapted.std()


@pytest.mark.parametrize("name", ["llama/yarn", "qwen3_moe"])
def test_a_scale_of_zero_gives_the_base(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "model", name)
    path = export(folder, tmp_path / "model.gguf")
    adapter = make_adapter(tmp_path / "adapter", folder, keys=adaptable(folder))
    export_lora(folder, adapter, tmp_path / "adapter.gguf")
    without = in_llama_cpp(path, tmp_path / "adapter.gguf", scale=0.0)
    assert (without == in_llama_cpp(path)).all()
    assert correlation(without, in_mlx(folder, adapter).base) >= 0.999999


def test_on_a_repacked_4_bit_base(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama/tied,head_dim", bits=4)
    path = export(folder, tmp_path / "model.gguf", "auto")
    adapter = make_adapter(tmp_path / "adapter", folder, keys=adaptable(folder))
    export_lora(folder, adapter, tmp_path / "adapter.gguf")
    mlx, found = in_mlx(folder, adapter), in_llama_cpp(path, tmp_path / "adapter.gguf")
    assert correlation(found, mlx.adapted) >= 0.995
    assert correlation(found, mlx.adapted) > correlation(found, mlx.base)


def test_what_is_refused_is_ignored_by_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once this fails, llama.cpp adapts more of deepseek2, and the table may become shorter."""
    monkeypatch.setattr(lora, "_NOT_ADAPTED", {})
    folder = make_model(tmp_path / "model", "deepseek_v3")
    path = export(folder, tmp_path / "model.gguf")
    base = in_llama_cpp(path)
    layers = [f"self_attn.{name}" for name in IGNORED if name != "lm_head"]
    for key in (*layers, "lm_head"):
        adapter = make_adapter(tmp_path / key, folder, keys=[key])
        export_lora(folder, adapter, tmp_path / f"{key}.gguf")
        mlx = in_mlx(folder, adapter)
        assert correlation(mlx.base, mlx.adapted) < 0.999
        assert (in_llama_cpp(path, tmp_path / f"{key}.gguf") == base).all()


def test_an_embedding_that_is_the_output_matrix_too_ends_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once this fails, such adapters need not be refused any more."""
    monkeypatch.setattr(lora, "_HEAD", lora._EMBEDDING)
    folder = make_model(tmp_path / "model", "qwen3")
    export(folder, tmp_path / "model.gguf")
    adapter = make_adapter(tmp_path / "adapter", folder, keys=["model.embed_tokens"])
    export_lora(folder, adapter, tmp_path / "adapter.gguf")
    code = (
        "from pathlib import Path; from mlx_fusekit.running.llamacpp import LlamaCpp\n"
        "LlamaCpp(Path('model.gguf'), adapter=Path('adapter.gguf')).logits([1, 2])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == -signal.SIGABRT
    assert "ggml_can_mul_mat" in result.stderr


def test_llama_cpp_refuses_another_base(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3")
    adapter = make_adapter(tmp_path / "adapter", folder)
    export_lora(folder, adapter, tmp_path / "adapter.gguf")
    other = export(make_model(tmp_path / "other", "mistral"), tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"adapter\.gguf: llama\.cpp cannot .* mismatch"):
        in_llama_cpp(other, tmp_path / "adapter.gguf")


def test_smollm2_answers_in_sql_with_its_adapter_only(
    tmp_path: Path, smollm2: ModelFolders, smollm2_sql_adapter: AdapterFolders
) -> None:
    """On the 4-bit base, repacked: questions that nobody was trained on."""
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    assert export_gguf(smollm2.four_bit, base).exact
    report = export_lora(smollm2.four_bit, smollm2_sql_adapter.adapter, adapter)
    assert report.modules == 112
    tokenizer = load_tokenizer(smollm2.four_bit)
    items = load_chat_items(smollm2_sql_adapter.data / "test.jsonl")[:3]
    for scale, correct in ((1.0, True), (0.0, False)):
        with LlamaCpp(base, context=512, adapter=adapter, adapter_scale=scale) as llama:
            for tokens, offset in (encode_chat_item(tokenizer, item) for item in items):
                likely = llama.logits(tokens[:-1]).argmax(axis=1)[offset - 1 :]
                assert (likely.tolist() == tokens[offset:]) == correct
