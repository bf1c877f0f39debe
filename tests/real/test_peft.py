"""Adapters that the real PEFT saved, fused by us and merged by PEFT."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.tiny import EXPERTS, LINEARS, make_adapter

from mlx_fusekit import convert_adapter, fuse
from mlx_fusekit.checkpoint.sanitized import open_base

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "peft_reference.py"
#: By adapter, its base, as the script has them.
ADAPTERS = {
    "lora": "llama",
    "all-linear": "qwen3",
    "rslora": "llama",
    "patterns": "llama",
    "dora": "llama",
    "embedding": "llama",
    "saved": "llama",
    "bias-all": "llama",
    "bias-lora-only": "llama",
    "tokens": "llama",
    "one-layer": "qwen3",
    "experts": "qwen3_moe",
    "gate-and-up": "qwen3_moe",
    "down": "qwen3_moe",
    "norms": "qwen3_next",
    "by-turns": "gpt_oss",
}
#: Of bases, what an adapter of mlx-lm's own has.
MLX_LM = {
    "llama": [*LINEARS, "lm_head"],
    "qwen3_moe": [*EXPERTS, "mlp.gate", "self_attn.q_proj"],
}
#: Those that can be written for PEFT too.
CONVERTED = [name for name in ADAPTERS if name not in ("norms", "by-turns")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    run_peft(folder)
    return folder


def run_peft(folder: Path, *names: str) -> None:
    python = Path(f"{sys.prefix}-peft") / "bin" / "python"
    if not python.exists():
        pytest.skip("make test-real installs PEFT and PyTorch beside this environment")
    environment = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1"}
    subprocess.run([python, SCRIPT, folder, *names], check=True, env=environment, timeout=600)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """As mlx-lm names and stacks them."""
    base = open_base(folder)
    found = {}
    for name, tensor in base.tensors.items():
        rows = int(np.prod(tensor.shape[:-1])) if len(tensor.shape) > 1 else 1
        found[name] = tensor.held().read_rows(0, rows).reshape(tensor.shape)
    return found


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_merged_as_by_peft(name: str, reference: Path, tmp_path: Path) -> None:
    fuse(reference / ADAPTERS[name], reference / name, tmp_path / "fused")
    loaded = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert isinstance(loaded, dict)
    ours = {key: np.array(value) for key, value in loaded.items()}
    theirs = tensors(reference / f"{name}-merged")
    before = tensors(reference / ADAPTERS[name])
    assert ours.keys() == theirs.keys()
    changed = 0
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype == np.float32
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-7, err_msg=key)
        changed += bool(np.abs(value - before[key]).max() > 1e-3)
    assert changed >= 1


@pytest.fixture(scope="module")
def converted(reference: Path) -> Path:
    """All of them in mlx-lm's form and back in PEFT's, and mlx-lm's own, merged by PEFT."""
    pairs = []
    for name, base in ((name, ADAPTERS[name]) for name in CONVERTED):
        convert_adapter(reference / base, reference / name, reference / f"{name}-mlx", "mlx")
        there = reference / f"{name}-mlx"
        convert_adapter(reference / base, there, reference / f"{name}-back", "peft")
        pairs += [base, f"{name}-back"]
    for base, keys in MLX_LM.items():
        folder = reference / f"{base}-by-mlx-lm"
        make_adapter(folder, reference / base, keys=keys, rank=3, scale=2.5)
        convert_adapter(reference / base, folder, reference / f"{base}-written", "peft")
        pairs += [base, f"{base}-written"]
    run_peft(reference, *pairs)
    return reference


@pytest.mark.parametrize("name", CONVERTED)
def test_peft_reads_what_was_converted(name: str, converted: Path) -> None:
    wanted, found = (tensors(converted / f"{name}{end}-merged") for end in ("", "-back"))
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("base", MLX_LM)
def test_peft_reads_mlx_lms_adapters(base: str, converted: Path, tmp_path: Path) -> None:
    fuse(converted / base, converted / f"{base}-by-mlx-lm", tmp_path / "fused")
    ours, theirs = tensors(tmp_path / "fused"), tensors(converted / f"{base}-written-merged")
    before = tensors(converted / base)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-6, err_msg=key)
    changed = sum(np.abs(value - before[key]).max() > 1e-3 for key, value in ours.items())
    assert changed >= 2 * len(MLX_LM[base]) - 1, "all but the head in both layers"


def test_ties_is_pefts_at_equal_weights(reference: Path, tmp_path: Path) -> None:
    adapters = [reference / "combined" / name for name in ("a", "b")]
    fuse(reference / "llama", adapters, tmp_path / "fused", combine="ties", density=0.3)
    ours, theirs = tensors(tmp_path / "fused"), tensors(reference / "ties-merged")
    before = tensors(reference / "llama")
    for key, value in theirs.items():
        # PEFT factors the result once more, in float32.
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=2e-6, err_msg=key)
    assert sum(np.abs(v - before[key]).max() > 1e-3 for key, v in ours.items()) == 4
