"""An adapter's GGUF file holds its numbers under the right names, or it is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model
from support.tiny import LINEARS, LLAMA, make_adapter, make_model, save_adapter
from support.tiny_architectures import make_model as make_architecture

from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.errors import AdapterError, CheckpointError, FusekitError, OutputError
from mlx_fusekit.gguf.lora import LoraReport, export_lora
from mlx_fusekit.gguf.models.architectures import lay_out

UNTIED = {**LLAMA, "tie_word_embeddings": False}
HEADS, HEAD_DIM = 4, 32
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit llama with its own output matrix."""
    return make_model(tmp_path_factory.mktemp("base") / "tiny-llama-4bit", UNTIED)


def read(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {name: f.contents() for name, f in reader.fields.items() if name[:5] != "GGUF."}


def adapter_tensors(folder: Path) -> dict[str, np.ndarray]:
    stored = mx.load(str(folder / "adapters.safetensors"))
    return {name: np.array(value.astype(mx.float32)) for name, value in stored.items()}


def update(path: Path, name: str) -> np.ndarray:
    """What llama.cpp adds to a tensor; alpha is divided by the rank of the tensor at hand."""
    tensors, alpha = read(path), keys(path)["adapter.lora.alpha"]
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    scale = alpha / b.shape[-1]
    return scale * (a @ b.T if name == "token_embd.weight" else b @ a)


def random_adapter(folder: Path, shapes: dict[str, tuple[int, int, int]], scale: float) -> Path:
    """Modules of these rows, columns and ranks; the configuration names no rank."""
    tensors = {}
    for module, (rows, columns, rank) in shapes.items():
        tensors[f"{module}.lora_a"] = mx.random.normal((columns, rank))
        tensors[f"{module}.lora_b"] = mx.random.normal((rank, rows))
    save_adapter(folder, tensors, scale=scale)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_parameters"]["rank"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def adaptable(folder: Path) -> list[str]:
    """Every module that mlx-lm trains adapters of."""
    kinds = nn.Linear | nn.Embedding | SwitchLinear
    model, _ = load_model(folder)
    return [path for path, module in model.named_modules() if isinstance(module, kinds)]


def test_keys_names_and_shapes(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "my-adapter", base, rank=4, scale=2.5)
    report = export_lora(base, adapter, tmp_path / "out.gguf")
    found = keys(tmp_path / "out.gguf")
    assert found["general.type"] == "adapter"
    assert found["general.architecture"] == "llama"
    assert found["general.name"] == "my-adapter"
    assert found["general.base_model.0.name"] == "tiny llama 4bit"
    assert found["adapter.type"] == "lora"
    assert found["adapter.lora.alpha"] == 10
    for folder in (tmp_path, base.parent):
        assert not any(str(folder) in str(value) for value in found.values())
    shapes = {name: values.shape for name, values in read(tmp_path / "out.gguf").items()}
    expected = {
        "attn_q": (128, 128),
        "attn_k": (64, 128),
        "attn_v": (64, 128),
        "attn_output": (128, 128),
        "ffn_gate": (256, 128),
        "ffn_up": (256, 128),
        "ffn_down": (128, 256),
    }
    assert shapes == {
        f"blk.{block}.{name}.weight.lora_{part}": (4, columns) if part == "a" else (rows, 4)
        for block in range(2)
        for name, (rows, columns) in expected.items()
        for part in "ab"
    }
    types = {tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert types == {gguf.GGMLQuantizationType.F32}
    size = (tmp_path / "out.gguf").stat().st_size
    assert report == LoraReport(
        gguf_path=str(tmp_path / "out.gguf"),
        architecture="llama",
        tensors=28,
        modules=14,
        rank=4,
        alpha=10.0,
        bytes=size,
        seconds=report.seconds,
        notes=(),
    )
    assert json.loads(json.dumps(report.as_json()))["bytes"] == size


def test_the_numbers_are_the_adapters_own(base: Path, tmp_path: Path) -> None:
    """Not multiplied with a scale that is no power of two, and divided by it again."""
    adapter = make_adapter(tmp_path / "adapter", base, scale=2.7)
    export_lora(base, adapter, tmp_path / "out.gguf")
    stored, written = adapter_tensors(adapter), read(tmp_path / "out.gguf")
    for place, part in (("a", "lora_a"), ("b", "lora_b")):
        np.testing.assert_array_equal(
            written[f"blk.0.attn_v.weight.lora_{place}"], stored[f"{V}.{part}"].T
        )


def test_rows_of_queries_move_as_the_bases_do(base: Path, tmp_path: Path) -> None:
    """Row i of a head and row i + head_dim / 2 lie side by side in llama.cpp."""
    adapter = make_adapter(tmp_path / "adapter", base)
    export_lora(base, adapter, tmp_path / "out.gguf")
    stored, written = adapter_tensors(adapter), read(tmp_path / "out.gguf")
    np.testing.assert_array_equal(written["blk.0.attn_q.weight.lora_a"], stored[f"{Q}.lora_a"].T)
    heads = stored[f"{Q}.lora_b"].T.reshape(HEADS, HEAD_DIM, -1)
    moved = written["blk.0.attn_q.weight.lora_b"].reshape(HEADS, HEAD_DIM, -1)
    np.testing.assert_array_equal(moved[:, 0::2], heads[:, : HEAD_DIM // 2])
    np.testing.assert_array_equal(moved[:, 1::2], heads[:, HEAD_DIM // 2 :])


@settings(max_examples=12, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=2, max_size=2),
    scale=st.floats(0.01, 100).flatmap(lambda size: st.sampled_from([size, -size])),
)
def test_modules_of_different_rank(
    base: Path, tmp_path_factory: pytest.TempPathFactory, ranks: list[int], scale: float
) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    down = "model.layers.1.mlp.down_proj"
    shapes = {V: (64, 128, ranks[0]), down: (128, 256, ranks[1])}
    adapter = random_adapter(folder / "adapter", shapes, scale)
    report = export_lora(base, adapter, folder / "out.gguf")
    assert report.rank == max(ranks)
    assert report.alpha == pytest.approx(scale * max(ranks))
    stored = adapter_tensors(adapter)
    for module, name in ((V, "blk.0.attn_v.weight"), (down, "blk.1.ffn_down.weight")):
        expected = scale * (stored[f"{module}.lora_a"] @ stored[f"{module}.lora_b"]).T
        found = update(folder / "out.gguf", name)
        np.testing.assert_allclose(found, expected, atol=1e-5 * abs(scale))


def test_embedding_and_head(base: Path, tmp_path: Path) -> None:
    """llama.cpp takes rows of the embedding's lora_a, and does not transpose its lora_b."""
    modules = ["model.embed_tokens", "lm_head"]
    adapter = make_adapter(tmp_path / "adapter", base, keys=modules)
    export_lora(base, adapter, tmp_path / "out.gguf")
    stored, written = adapter_tensors(adapter), read(tmp_path / "out.gguf")
    expected = {
        "token_embd.weight.lora_a": stored["model.embed_tokens.lora_a"],
        "token_embd.weight.lora_b": stored["model.embed_tokens.lora_b"].T,
        "output.weight.lora_a": stored["lm_head.lora_a"].T,
        "output.weight.lora_b": stored["lm_head.lora_b"].T,
    }
    assert list(written) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(written[name], values)


@pytest.mark.parametrize(
    "name", ["qwen2_moe", "gpt_oss", "granitemoe", "olmo2", "qwen3_next", "qwen3_5"]
)
def test_updates_become_what_weights_become(tmp_path: Path, name: str) -> None:
    """Experts, gates of one row, a matrix split in two or used twice, rows and columns moved."""
    folder = make_architecture(tmp_path / "model", name)
    modules = adaptable(folder)
    if name == "qwen3_5":
        modules.remove("language_model.model.embed_tokens")
    adapter = make_adapter(tmp_path / "adapter", folder, keys=modules, num_layers=4)
    report = export_lora(folder, adapter, tmp_path / "out.gguf")
    opened = open_base(folder)
    layout = lay_out(opened)
    seen = 0
    for module, low_rank in open_adapter(adapter).bind(opened).weights.items():
        full = low_rank.up @ low_rank.down
        for tensor in layout.tensors_of(module):
            values = full if len(tensor.shape) == 3 else full[0]
            values = values if tensor.rows is None else values[tensor.rows]
            found = update(tmp_path / "out.gguf", tensor.name).reshape(tensor.shape)
            np.testing.assert_allclose(found, tensor.of_rows(values), atol=1e-6)
            seen += 2
    assert report.modules == len(modules)
    assert report.tensors == seen


def test_an_adapter_of_another_base_is_noted(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "model": "owner/other"}))
    (note,) = export_lora(base, adapter, tmp_path / "out.gguf").notes
    assert "trained on owner/other" in note


def test_same_bytes_again(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    for name in ("a.gguf", "b.gguf"):
        export_lora(base, adapter, tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_an_existing_file_stays_without_overwrite(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    adapter = make_adapter(tmp_path / "adapter", base)
    export_lora(base, adapter, target)
    before = target.read_bytes()
    other = make_adapter(tmp_path / "other", base, rank=2)
    with pytest.raises(OutputError, match="add --overwrite"):
        export_lora(base, other, target)
    assert target.read_bytes() == before
    export_lora(base, other, target, overwrite=True)
    assert read(target)["blk.0.attn_q.weight.lora_a"].shape == (2, 128)


def refused(
    folder: Path,
    adapter: Path,
    kind: type[FusekitError],
    *texts: str,
    cure: str = "mlx-fusekit fuse",
) -> None:
    """Exporting fails with one line that has these texts, and leaves nothing behind."""
    target = adapter.parent / "new" / "out.gguf"
    with pytest.raises(kind) as caught:
        export_lora(folder, adapter, target)
    message = str(caught.value)
    assert "\n" not in message
    for text in (*texts, cure):
        assert text in message
    assert not target.parent.exists()


@pytest.mark.parametrize(("kind", "text"), [("dora", "a DoRA adapter"), ("full", "full fine-tune")])
def test_what_is_no_lora_is_refused(base: Path, tmp_path: Path, kind: str, text: str) -> None:
    if kind == "dora":
        adapter = make_adapter(tmp_path / "adapter", base, kind=kind)
    else:
        tensors = {"model.norm.weight": mx.ones((128,))}
        adapter = save_adapter(tmp_path / "adapter", tensors, kind=kind)
    refused(base, adapter, AdapterError, str(adapter), text)


@pytest.mark.parametrize("name", ["llama/tied,head_dim", "gemma3"])
def test_an_embedding_that_is_the_output_matrix_too(tmp_path: Path, name: str) -> None:
    folder = make_architecture(tmp_path / "model", name)
    (module,) = (path for path in adaptable(folder) if path.endswith("embed_tokens"))
    adapter = make_adapter(tmp_path / "adapter", folder, keys=[module])
    refused(folder, adapter, AdapterError, f"{module} is both embedding and output matrix")


@pytest.mark.parametrize(
    ("key", "tensor"),
    [("self_attn.q_a_proj", "attn_q_a.weight"), ("lm_head", "output.weight")],
)
def test_what_llama_cpp_would_ignore(tmp_path: Path, key: str, tensor: str) -> None:
    folder = make_architecture(tmp_path / "model", "deepseek_v3")
    adapter = make_adapter(tmp_path / "adapter", folder, keys=[key])
    refused(folder, adapter, AdapterError, f"{key} is ", tensor, "architecture deepseek2")


@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("lfm2", "model.layers.0.conv.conv", (128, 3, 1)),
        ("qwen3_5", "language_model.model.layers.0.linear_attn.conv1d", (256, 4, 1)),
    ],
)
def test_a_convolution(tmp_path: Path, name: str, module: str, shape: tuple[int, ...]) -> None:
    """mlx-lm trains none, but files can say anything."""
    folder = make_architecture(tmp_path / "model", name)
    channels, width, columns = shape
    tensors = {
        f"{module}.lora_a": mx.ones((channels, 2, columns)),
        f"{module}.lora_b": mx.ones((channels, width, 2)),
    }
    adapter = save_adapter(tmp_path / "adapter", tensors, rank=2, num_layers=3)
    refused(folder, adapter, AdapterError, module, "another shape")


@pytest.mark.parametrize("scale", [0.0, 1e-60])
def test_a_scale_that_alpha_cannot_hold(base: Path, tmp_path: Path, scale: float) -> None:
    """llama.cpp takes an alpha of zero for a scale of one."""
    adapter = random_adapter(tmp_path / "adapter", {V: (64, 128, 4)}, scale)
    refused(
        base, adapter, AdapterError, "adapter_config.json", f"scale is {scale:g}", cure="correct"
    )


def test_a_rank_of_zero(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", {V: (64, 128, 0), Q: (128, 128, 4)}, 2.0)
    refused(base, adapter, AdapterError, f"{V} has rank 0", cure="train")


def test_another_base(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    other = make_model(tmp_path / "other", {**UNTIED, "intermediate_size": 512})
    refused(other, adapter, AdapterError, "mlp.", cure="the model the adapter was trained on")


def test_a_base_of_unknown_type(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    (other / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    refused(other, adapter, CheckpointError, "'unheard_of' cannot be exported", cure="these can")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_fusekit", "export-lora", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_command(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, keys=LINEARS[:2], scale=2.5)
    arguments = ("--model", str(base), "--adapter-path", "adapter", "--gguf-path", "out.gguf")
    result = run(*arguments, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["modules"], report["tensors"], report["alpha"]) == (4, 8, 10.0)
    replaced = run(*arguments, "--overwrite", cwd=tmp_path)
    assert replaced.returncode == 0, replaced.stderr
    assert "Wrote out.gguf" in replaced.stdout
    assert "--lora out.gguf" in replaced.stdout
