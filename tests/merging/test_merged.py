"""Merged weights read by blocks and by matrices, against the arithmetic of a whole weight."""

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.tiny import EXPERTS, LINEARS, LLAMA, QWEN3_MOE, make_adapter, make_model, save_adapter

from mlx_fusekit import prepare_fuse, samples
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.quantization import dequantize, to_matrix
from mlx_fusekit.merging import blocks, merged
from mlx_fusekit.merging.arithmetic import RowRange
from mlx_fusekit.merging.blocks import WeightReader, row_blocks
from mlx_fusekit.merging.merged import Weight
from mlx_fusekit.merging.plan import WeightStep

MODULE = "model.layers.1.mlp.up_proj"


def steps(folder: Path, config: dict[str, Any] = LLAMA, keys: Any = LINEARS, **how: Any) -> Any:
    base = make_model(folder / "base", config, **how)
    adapter = make_adapter(folder / "adapter", base, keys=keys)
    plan = prepare_fuse(base, adapter, folder / "fused", requantize="nearest").plan
    return {step.module: step for step in plan.merged}


def test_row_blocks_cover_every_row_of_every_expert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 10)
    found = list(row_blocks((2, 5, 4)))
    assert found == [RowRange(e, *r) for e in (0, 1) for r in ((0, 2), (2, 4), (4, 5))]
    assert list(row_blocks((1, 3, 99))) == [RowRange(0, i, i + 1) for i in range(3)]


def test_blocks_of_a_weight_are_the_rows_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = Weight.open(steps(tmp_path)[MODULE])
    whole = to_matrix(weight.values(RowRange(0, 0, weight.step.shape[1])))
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 5_000)
    parts = [to_matrix(weight.values(rows)) for rows in row_blocks(weight.step.shape)]
    assert len(parts) > 1
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("expert", [0, 3])
def test_a_merged_matrix_is_base_plus_update(tmp_path: Path, expert: int) -> None:
    step = steps(tmp_path, QWEN3_MOE, EXPERTS)["model.layers.0.mlp.switch_mlp.up_proj"]
    matrix = Weight.open(step).matrix(expert)
    assert step.source_spec is not None
    base = to_matrix(dequantize(matrix.base, step.source_spec))
    wanted = base + step.update.up[expert] @ step.update.down[expert]
    np.testing.assert_allclose(matrix.values.T, wanted, atol=1e-6)
    assert matrix.target.spec == step.target_spec
    assert matrix.same_format
    assert not matrix.unchanged


def with_rows_still(folder: Path) -> WeightStep:
    """A step whose update changes the second half of the rows only."""
    base = make_model(folder / "base")
    rng = np.random.default_rng(0)
    up = rng.normal(0, 0.1, (4, 256)).astype(np.float32)
    up[:, :128] = 0
    tensors = {
        f"{MODULE}.lora_a": mx.array(rng.normal(0, 0.1, (128, 4)).astype(np.float32)),
        f"{MODULE}.lora_b": mx.array(up),
    }
    adapter = save_adapter(folder / "adapter", tensors, keys=["mlp.up_proj"])
    return prepare_fuse(base, adapter, folder / "fused", requantize="nearest").plan.merged[0]


def test_rows_that_do_not_change_keep_the_bases(tmp_path: Path) -> None:
    weight = Weight.open(with_rows_still(tmp_path))
    still, moved = (weight.read(RowRange(0, *rows)) for rows in ((0, 128), (128, 256)))
    assert still.unchanged
    assert not moved.keep.any()
    whole = weight.read(RowRange(0, 0, 256))
    other = whole.base.part(128, 256)
    doubled = whole.base.part(0, 128)
    found = whole.finished(
        type(doubled)(
            np.concatenate([other.codes, other.codes]),
            np.concatenate([other.scales, other.scales]),
            np.concatenate([other.biases, other.biases]),  # type: ignore[list-item]
            other.scale_dtype,
        )
    )
    assert np.array_equal(found.codes[:128], doubled.codes)
    assert np.array_equal(found.codes[128:], other.codes)


def test_a_merged_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    huge = {
        f"{MODULE}.lora_a": mx.full((128, 4), 1e18),
        f"{MODULE}.lora_b": mx.full((4, 256), 1e18),
    }
    adapter = save_adapter(tmp_path / "adapter", huge, keys=["mlp.up_proj"], scale=1.0)
    step = prepare_fuse(base, adapter, tmp_path / "fused", requantize="nearest").plan.merged[0]
    object.__setattr__(step.update, "up", step.update.up * np.float32(1e10))  # type: ignore[union-attr]
    with pytest.raises(AdapterError, match=r"up_proj\.weight: merging gives NaN or infinity"):
        Weight.open(step).values(RowRange(0, 0, 4))


def test_a_global_scale_grows_with_its_weights_only(tmp_path: Path) -> None:
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    how = {"bits": 4, "group_size": 16, "mode": "nvfp4", "global_scale": True}
    step = steps(tmp_path, QWEN3_MOE, EXPERTS, **how)[path]
    weight = Weight.open(step)
    before, after = weight.reader.global_scales, weight.global_scales
    assert before is not None
    assert after is not None
    largest = [np.abs(weight.matrix(e).values).max() for e in range(step.shape[0])]
    np.testing.assert_allclose(after, np.maximum(before, largest), rtol=2e-5)
    assert (after > before).any()


def test_a_dense_weight_is_read_as_it_is_stored(tmp_path: Path) -> None:
    step = steps(tmp_path, bits=None)[MODULE]
    reader = WeightReader.open(step.sources, step.source_spec)
    stored, block = reader.read(RowRange(0, 2, 5))
    assert stored is None
    assert block.as_run is None
    wanted = mx.load(str(tmp_path / "base" / "model.safetensors"))[f"{MODULE}.weight"][2:5]
    assert np.array_equal(to_matrix(block.values), np.array(wanted.astype(mx.float32)))


def test_calibrating_merges_no_row_a_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = samples.model_path(), samples.adapter_path()
    rows: Counter[int] = Counter()
    merge = merged.merge

    def counted(block: Any, update: Any, part: RowRange) -> Any:
        rows[id(update)] += part.last - part.first
        return merge(block, update, part)

    monkeypatch.setattr(merged, "merge", counted)
    prepared = prepare_fuse(
        base, adapter, tmp_path / "fused", requantize="calibrated", calibration_tokens=32
    )
    prepared.run()
    assert rows == {id(step.update): step.shape[1] for step in prepared.plan.merged}
