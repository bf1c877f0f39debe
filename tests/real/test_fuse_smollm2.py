"""Fusing a trained adapter into the 4-bit SmolLM2: loads, generates, and equals its teacher."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx_lm import generate, load
from mlx_lm.utils import load_adapters
from support.exact_match import exact_match, load_chat_items

from mlx_fusekit import FuseReport, fuse, samples, verify
from mlx_fusekit.checkpoint.folder import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from fetch_smollm2 import ModelFolders
    from train_adapter import AdapterFolders

ITEMS = 24
#: Share of answers. The adapter is trained where the tests run, and of a few hundred tokens one may
#: be such a near thing in the teacher that calibrated weights of that machine decide otherwise.
NEARLY_ALL = 0.9


@pytest.fixture(scope="module")
def items(smollm2_sql_adapter: AdapterFolders) -> Any:
    return load_chat_items(smollm2_sql_adapter.data / "test.jsonl")[:ITEMS]


def as_float32(folder: Path) -> tuple[Any, Any]:
    from train_adapter import load_for_training

    return load_for_training(folder)


def logits(model: Any, tokenizer: Any, items: Any) -> mx.array:
    return model(mx.array([tokenizer.apply_chat_template(items[0]["messages"])]))


def digests(folder: Path) -> dict[str, str]:
    tensors = Checkpoint.open(folder).tensors.values()
    return {t.name: hashlib.sha256(t.read().tobytes()).hexdigest() for t in tensors}


def test_dequantized_in_float32_it_is_the_teacher(
    tmp_path: Path, smollm2: ModelFolders, smollm2_sql_adapter: AdapterFolders, items: Any
) -> None:
    fuse(
        smollm2.four_bit,
        smollm2_sql_adapter.adapter,
        tmp_path / "fused",
        dequantize=True,
        dtype="float32",
    )
    fused, tokenizer = load(str(tmp_path / "fused"))
    teacher, _ = as_float32(smollm2.four_bit)
    teacher = load_adapters(teacher, str(smollm2_sql_adapter.adapter))
    teacher.eval()
    expected = logits(teacher, tokenizer, items)
    assert mx.abs(logits(fused, tokenizer, items) - expected).max().item() < 2e-3
    assert mx.abs(expected).max().item() > 10
    assert exact_match(fused, tokenizer, items) >= 0.95


def test_the_fine_tune_survives_at_the_same_size(
    tmp_path: Path,
    smollm2: ModelFolders,
    smollm2_sql_adapter: AdapterFolders,
    smollm2_fused: tuple[Path, FuseReport],
) -> None:
    """Rounding loses this adapter; calibrated, the model answers as base and adapter do."""
    sources = smollm2.four_bit, smollm2_sql_adapter.adapter
    rounded = fuse(*sources, tmp_path / "rounded", requantize="nearest")
    assert rounded.warnings
    data = smollm2_sql_adapter.data / "test.jsonl"
    lost, kept = (
        verify(*sources, folder, data=data, max_tokens=1000)
        for folder in (tmp_path / "rounded", smollm2_fused[0])
    )
    assert kept.structure_ok
    assert lost.exact_match_reference == 1.0
    assert kept.exact_match_fused is not None
    assert kept.exact_match_fused >= NEARLY_ALL
    assert kept.kl_mean < lost.kl_mean / 200
    assert lost.exact_match_fused is not None
    assert lost.exact_match_fused < 0.5
    report = smollm2_fused[1]
    assert report.requantize == "calibrated"
    assert not report.warnings
    assert report.output_bytes == report.base_bytes


def test_calibrated_it_is_closer_away_from_the_task_too(
    tmp_path: Path,
    smollm2: ModelFolders,
    smollm2_sql_adapter: AdapterFolders,
    smollm2_fused: tuple[Path, FuseReport],
) -> None:
    sources = smollm2.four_bit, smollm2_sql_adapter.adapter
    fuse(*sources, tmp_path / "rounded", requantize="nearest")
    data = samples.general_data_path()
    rounded, ours = (
        verify(*sources, folder, data=data, max_tokens=800)
        for folder in (tmp_path / "rounded", smollm2_fused[0])
    )
    assert ours.kl_mean < rounded.kl_mean / 3


def test_fused_loads_and_answers(smollm2_fused: tuple[Path, FuseReport], items: Any) -> None:
    model, tokenizer = load(str(smollm2_fused[0]))
    prompt = tokenizer.apply_chat_template(items[0]["messages"][:1], add_generation_prompt=True)
    assert generate(model, tokenizer, prompt, max_tokens=6).startswith("SELECT")
    assert exact_match(*as_float32(smollm2_fused[0]), items) >= NEARLY_ALL


def test_at_8_bits_rounding_is_enough(
    tmp_path: Path, smollm2: ModelFolders, smollm2_sql_adapter: AdapterFolders, items: Any
) -> None:
    report = fuse(smollm2.four_bit, smollm2_sql_adapter.adapter, tmp_path / "fused", bits=8)
    assert report.requantize == "nearest"
    assert not report.warnings
    assert exact_match(*as_float32(tmp_path / "fused"), items) >= 0.95


def test_a_zero_adapter_changes_no_byte(
    tmp_path: Path, smollm2: ModelFolders, smollm2_sql_adapter: AdapterFolders
) -> None:
    adapter = tmp_path / "zero"
    adapter.mkdir()
    source = smollm2_sql_adapter.adapter
    (adapter / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = mx.load(str(source / "adapters.safetensors"))
    zero = {n: mx.zeros_like(v) if n.endswith("lora_b") else v for n, v in tensors.items()}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), zero)
    fuse(smollm2.four_bit, adapter, tmp_path / "fused")
    assert digests(tmp_path / "fused") == digests(smollm2.four_bit)


def test_only_what_the_adapter_touches_changes(
    smollm2: ModelFolders, smollm2_fused: tuple[Path, FuseReport]
) -> None:
    before, after = digests(smollm2.four_bit), digests(smollm2_fused[0])
    changed = {name.rpartition(".")[0] for name in before if before[name] != after[name]}
    recipe = json.loads((smollm2_fused[0] / "fusekit.json").read_text())
    assert changed == set(recipe["modules"])
    assert len(changed) == 112


def test_the_bfloat16_base_keeps_the_task(
    tmp_path: Path, smollm2: ModelFolders, smollm2_sql_adapter: AdapterFolders, items: Any
) -> None:
    """The adapter was trained on the 4-bit model, and works on its 16-bit origin all the same."""
    fuse(smollm2.bf16, smollm2_sql_adapter.adapter, tmp_path / "fused")
    teacher, tokenizer = as_float32(smollm2.bf16)
    teacher = load_adapters(teacher, str(smollm2_sql_adapter.adapter))
    teacher.eval()
    fused, _ = as_float32(tmp_path / "fused")
    wanted = exact_match(teacher, tokenizer, items)
    assert exact_match(fused, tokenizer, items) >= wanted - 0.05
