"""Adapters that the real PEFT saved, fused by us and merged by PEFT."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_fusekit import fuse
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
    "one-layer": "qwen3",
    "experts": "qwen3_moe",
    "gate-and-up": "qwen3_moe",
    "down": "qwen3_moe",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    python = Path(f"{sys.prefix}-peft") / "bin" / "python"
    if not python.exists():
        pytest.skip("make test-real installs PEFT and PyTorch beside this environment")
    environment = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1"}
    subprocess.run([python, SCRIPT, folder], check=True, env=environment, timeout=600)
    return folder


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
