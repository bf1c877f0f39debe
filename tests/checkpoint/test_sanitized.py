"""Raw Hugging Face checkpoints, which mlx-lm's model classes convert."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from support.folders import as_hugging_face, unstacked
from support.tiny import (
    EXPERTS,
    LINEARS,
    QWEN3_MOE,
    in_float32,
    logits,
    make_adapter,
    make_model,
    teacher_layers,
)

from mlx_fusekit import fuse
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.sanitized import SanitizedModel, open_base
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.verifying.structure import check_structure


def difference(first: Any, second: Any) -> float:
    return mx.abs(logits(first) - logits(second)).max().item()


def test_same_names_stream_as_bytes(tmp_path: Path) -> None:
    base = as_hugging_face(make_model(tmp_path / "base", bits=None))
    assert isinstance(open_base(base), Checkpoint)
    adapter = make_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"])
    fuse(base, adapter, tmp_path / "fused")
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "fused")
    for name, tensor in before.tensors.items():
        same = tensor.read().tobytes() == after.tensors[name].read().tobytes()
        assert same != name.endswith("q_proj.weight")


@pytest.mark.parametrize("options", [{}, {"dequantize": True, "dtype": "float32"}])
def test_stacked_experts_are_converted(tmp_path: Path, options: dict[str, Any]) -> None:
    base = make_model(tmp_path / "base", QWEN3_MOE, bits=None)
    keys = [*EXPERTS, "self_attn.q_proj"]
    adapter = make_adapter(tmp_path / "adapter", base, keys=keys)
    reference = teacher_layers(base, "lora", keys, 2, 4, 2.0)
    reference.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    raw = as_hugging_face(base, unstacked(mx.load(str(base / "model.safetensors"))))
    assert isinstance(open_base(raw), SanitizedModel)
    report = fuse(raw, adapter, tmp_path / "fused", **options)
    assert sum(report.modules.values()) == 2 * len(keys)
    model = in_float32(load_model(tmp_path / "fused")[0])
    assert difference(model, in_float32(reference)) < (1e-4 if options else 0.05)
    assert isinstance(open_base(tmp_path / "fused"), Checkpoint)


def test_raw_and_converted_bases_give_the_same_weights(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", QWEN3_MOE, bits=None)
    adapter = make_adapter(tmp_path / "adapter", base, keys=EXPERTS)
    fuse(base, adapter, tmp_path / "converted")
    raw = as_hugging_face(base, unstacked(mx.load(str(base / "model.safetensors"))))
    fuse(raw, adapter, tmp_path / "raw")
    first, second = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("converted", "raw"))
    assert set(first) == set(second)
    assert all(mx.array_equal(first[name], second[name]) for name in first)


def test_another_quantization_is_converted(tmp_path: Path) -> None:
    """mxfp4 as transformers names it: mlx-lm maps the config, the tensors stay packed."""
    base = make_model(tmp_path / "base", bits=4, group_size=32, mode="mxfp4")
    adapter = make_adapter(tmp_path / "adapter", base)
    reference = teacher_layers(base, "lora", LINEARS, 2, 4, 2.0)
    reference.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    config = json.loads((base / "config.json").read_text())
    del config["quantization"]
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (base / "config.json").write_text(json.dumps(config))
    as_hugging_face(base)
    fuse(base, adapter, tmp_path / "fused", dequantize=True, dtype="float32")
    assert difference(load_model(tmp_path / "fused")[0], in_float32(reference)) < 1e-4
    fuse(base, adapter, tmp_path / "same")
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    assert config["quantization"]["mode"] == "mxfp4"
    load_model(tmp_path / "same")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intermediate_size": 1}, "mlp.down_proj 1 columns wide"),
        ({"hidden_size": 0}, "mlx-lm cannot load it"),
        ({"num_attention_heads": 0}, "mlx-lm cannot load it"),
        ({"quantization": {"group_size": 0, "bits": 4}}, "group_size of quantization is 0"),
        (
            {"quantization": {"group_size": 64, "bits": 4, "lm_head": {"group_size": 0}}},
            "group_size of lm_head is 0",
        ),
    ],
)
def test_sizes_that_mlx_would_divide_by(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """In a process of its own, which MLX ends where it divides by zero."""
    as_hugging_face(make_model(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    code = (
        "import sys; from pathlib import Path; "
        "from mlx_fusekit.checkpoint.sanitized import open_base; open_base(Path(sys.argv[1]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert f"CheckpointError: {tmp_path}" in ended.stderr
    assert said in ended.stderr.splitlines()[-1]


def test_an_unknown_architecture_is_said(tmp_path: Path) -> None:
    base = as_hugging_face(make_model(tmp_path / "base", bits=None))
    adapter = make_adapter(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    with pytest.raises(CheckpointError, match=r"mlx-lm cannot load it .*nonsense"):
        fuse(base, adapter, tmp_path / "fused")


def test_model_code_needs_trust(tmp_path: Path) -> None:
    base = as_hugging_face(make_model(tmp_path / "base", bits=None))
    adapter = make_adapter(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit")
    with pytest.raises(CheckpointError, match="custom"):
        fuse(base, adapter, tmp_path / "fused")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "fused").exists()


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, Path]:
    """A raw checkpoint that mlx-lm converts, and the same model as MLX saves it."""
    base = make_model(tmp_path / "converted", QWEN3_MOE, bits=None)
    shutil.copytree(base, tmp_path / "raw")
    weights = mx.load(str(base / "model.safetensors"))
    return as_hugging_face(tmp_path / "raw", unstacked(weights)), base


def test_a_computed_tensor_can_be_read_again_and_from_any_thread(
    converted: tuple[Path, Path],
) -> None:
    raw, base = (open_base(folder) for folder in converted)
    name = "model.layers.1.mlp.switch_mlp.up_proj.weight"
    wanted = base.tensors[name].read_rows(3, 90)
    assert np.array_equal(raw.tensors[name].read_rows(3, 90), wanted)
    held = raw.tensors[name].held()
    with ThreadPoolExecutor(3) as pool:
        tensors = [raw.tensors[name], held, raw.tensors[name]]
        found = list(pool.map(lambda tensor: tensor.read_rows(3, 90), tensors))
    assert all(np.array_equal(rows, wanted) for rows in found)


def test_checks_of_files_compare_a_computed_base(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    """A DoRA adapter that was not fused is found out, though its effect is in norms alone."""
    raw, base = converted
    adapter = make_adapter(tmp_path / "adapter", base, kind="dora", keys=["self_attn.q_proj"])
    sources = NamedSources.find(raw, adapter).open()
    checks = check_structure(sources.base, sources.adapter, Checkpoint.open(base))
    assert [check.name for check in checks if not check.ok] == ["touched modules changed"]
    fuse(raw, adapter, tmp_path / "fused")
    fused = Checkpoint.open(tmp_path / "fused")
    checks = check_structure(sources.base, sources.adapter, fused)
    assert all(check.ok for check in checks)


def test_no_thread_that_ran_mlx_ends_while_python_ends(tmp_path: Path) -> None:
    """MLX frees Python objects when a thread ends, which aborts a process that is ending."""
    base = as_hugging_face(make_model(tmp_path / "base", bits=None))
    script = """
import sys, threading
from pathlib import Path
from mlx_fusekit.checkpoint.sanitized import open_base
open_base(Path(sys.argv[1]))
print([thread.name for thread in threading.enumerate() if not thread.daemon])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(base)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "['MainThread']"), done.stderr
