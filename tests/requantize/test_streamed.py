"""Calibrating layer by layer from the disk, against calibrating with the whole model in memory."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.exportable import make_exportable
from support.teachers import ARCHITECTURES, case_of, make_case, random_text
from support.tiny import LINEARS, LLAMA, QWEN3_MOE, make_adapter, make_model, save_adapter

from mlx_fusekit import fuse, prepare_fuse, samples, verify
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.fusing.options import FuseOptions
from mlx_fusekit.requantize import auto
from mlx_fusekit.requantize.calibrated import Calibration
from mlx_fusekit.requantize.journal import Journal
from mlx_fusekit.requantize.needs import memory_needs, spills
from mlx_fusekit.requantize.options import CalibrationOptions
from mlx_fusekit.requantize.requantizer import Request
from mlx_fusekit.requantize.solved import SolvedWeights
from mlx_fusekit.requantize.walk import LayerChain
from mlx_fusekit.running.streamed import StreamedModel
from mlx_fusekit.running.swapped import FusedModules
from mlx_fusekit.texts.calibration import CalibrationText
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.parity import Variant, compare
from mlx_fusekit.writing.work import Work

TEXT = random_text(10)


def streamed_of(base: Path, adapter: Path) -> StreamedModel:
    sources = NamedSources.find(base, adapter).open()
    return StreamedModel(sources.model, sources.adapter)


def same(one: SolvedWeights, other: SolvedWeights) -> bool:
    assert one.experts.keys() == other.experts.keys()
    for path, experts in one.experts.items():
        for a, b in zip(experts, other.experts[path], strict=True):
            if not (np.array_equal(a.codes, b.codes) and np.array_equal(a.scales, b.scales)):
                return False
    return True


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    config, keys = ARCHITECTURES[name]
    case = make_case(tmp_path, config, keys)
    resident = Calibration(case.plan, case.teacher, TEXT).run()
    streamed = streamed_of(case.base, case.adapter)
    found = Calibration(case.plan, streamed.running, TEXT, streamed=streamed).run()
    assert same(resident, found)
    assert {p: r.error for p, r in resident.results.items()} == {
        p: r.error for p, r in found.results.items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads(tied: bool, tmp_path: Path) -> None:
    keys = ["self_attn.q_proj", "model.embed_tokens"] + ([] if tied else ["lm_head"])
    case = make_case(tmp_path, LLAMA | {"tie_word_embeddings": tied}, keys)
    resident = Calibration(case.plan, case.teacher, TEXT).run()
    streamed = streamed_of(case.base, case.adapter)
    found = Calibration(case.plan, streamed.running, TEXT, streamed=streamed).run()
    assert same(resident, found)


@pytest.mark.parametrize("config", [LLAMA, LLAMA | {"tie_word_embeddings": False}, QWEN3_MOE])
def test_whole_models_that_are_quantized(config: dict[str, Any], tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", config, bits=None)
    adapter = make_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"], num_layers=1)
    case = case_of(base, adapter, quantize=True, q_bits=3)
    resident = Calibration(case.plan, case.teacher, TEXT).run()
    assert len(resident.experts) == len(case.plan.requantized) > 10
    streamed = streamed_of(base, adapter)
    assert same(resident, Calibration(case.plan, streamed.running, TEXT, streamed=streamed).run())


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_other_kinds_of_adapters(kind: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    if kind == "dora":
        adapter = make_adapter(tmp_path / "adapter", base, kind="dora", keys=LINEARS[:2])
    else:
        dense = mx.load(str(make_model(tmp_path / "dense", bits=None) / "model.safetensors"))
        chosen = ("q_proj.weight", "q_proj.bias", "norm.weight")
        tensors = {n: 1.1 * v + 0.01 for n, v in dense.items() if n.endswith(chosen)}
        adapter = save_adapter(tmp_path / "adapter", tensors, kind="full")
    case = case_of(base, adapter)
    resident = Calibration(case.plan, case.teacher, TEXT).run()
    streamed = streamed_of(base, adapter)
    assert same(resident, Calibration(case.plan, streamed.running, TEXT, streamed=streamed).run())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3n"])
def test_it_measures_what_the_whole_models_would(name: str, tmp_path: Path) -> None:
    """Of the fused model and of the base, in one walk."""
    config, keys = ARCHITECTURES[name]
    case = make_case(tmp_path, config, keys)
    held_out = random_text(12, seed=3)
    text = CalibrationText(tuple(TEXT), tuple(held_out), "somewhere", 1, 0)
    streamed = streamed_of(case.base, case.adapter)
    sources = NamedSources.find(case.base, case.adapter).open()
    request = Request(case.plan, sources, CalibrationOptions())
    whole = auto._Session(request, case.teacher, text).run()
    parts = auto._Session(request, streamed.running, text, streamed).run().report
    assert whole.report is not None
    assert parts is not None
    assert parts.streamed > whole.report.streamed
    for figure in ("kl_mean", "kl_p99", "kl_base_mean", "output_error"):
        assert getattr(parts, figure) == pytest.approx(getattr(whole.report, figure), rel=1e-4)
    assert isinstance(whole.requantizer, SolvedWeights)
    model, fused = case.teacher.model, FusedModules(case.teacher)
    for step in case.plan.merged:
        if step.target_spec is not None:
            fused.put(step.module, whole.requantizer.experts[step.module], step.target_spec)
    base = Variant(model, case.teacher.without_adapter)
    measured = compare(model, {"fused": Variant(model, fused.active), "base": base}, held_out)
    assert measured["fused"].kl_mean == pytest.approx(parts.kl_mean, rel=1e-4)
    assert measured["base"].kl_mean == pytest.approx(parts.kl_base_mean, rel=1e-4)


def test_one_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", LLAMA | {"num_hidden_layers": 16})
    adapter = make_adapter(tmp_path / "adapter", base, keys=LINEARS[:2], num_layers=16)
    streamed = streamed_of(base, adapter)
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    plan = prepare_fuse(base, adapter, tmp_path / "never", requantize="nearest").plan
    Calibration(plan, streamed.running, TEXT[:4], streamed=streamed).run()
    layer = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    assert mx.get_peak_memory() - before < 5 * layer


def test_what_flows_through_layers_waits_on_the_disk(tmp_path: Path) -> None:
    """Memory then does not grow with the text, and the result is the same."""
    base = make_model(tmp_path / "base", LLAMA)
    adapter = make_adapter(tmp_path / "adapter", base, keys=LINEARS)
    plan = prepare_fuse(base, adapter, tmp_path / "never", requantize="nearest").plan
    peaks, rows = {}, []
    for tokens in (2000, 8000):
        text = [TokenSequence(tuple(i % 60 for i in range(500)), 1, False)] * (tokens // 500)
        for spill in (False, True):
            work = tmp_path / f"work-{tokens}-{spill}"
            work.mkdir()
            streamed = streamed_of(base, adapter)
            journal = Journal(Work(work), "walk")
            calibration = Calibration(
                plan, streamed.running, text, streamed=streamed, journal=journal, spill=spill
            )
            gc.collect()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            solved = calibration.run()
            peaks[tokens, spill] = mx.get_peak_memory() - before
            rows.append(
                [r.codes.tobytes() for path in solved.experts for r in solved.experts[path]]
            )
            del calibration
            gc.collect()
            assert not list(work.rglob("held-*"))
    assert rows[0] == rows[1]
    assert rows[2] == rows[3]
    assert peaks[8000, False] > 1.6 * peaks[2000, False]
    assert peaks[8000, True] < 1.2 * peaks[2000, True]


def test_the_whole_model_writes_the_text_where_it_can_run(tmp_path: Path) -> None:
    """All of the fused model is then the same, to the last byte."""
    base = make_exportable(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    needs = memory_needs(prepare_fuse(base, adapter, tmp_path / "never").plan, 300)
    for name, memory in (("whole", needs.resident), ("in turn", needs.resident - 1)):
        report = fuse(base, adapter, tmp_path / name, calibration_tokens=300, memory=memory)
        assert report.calibration is not None
        assert report.calibration.streamed == (name == "in turn")
        assert report.calibration.source == "generated by base+adapter"
    one, other = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        for name in ("whole", "in turn")
    )
    assert one == other


def test_a_fuse_that_does_not_fit_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_exportable(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    plan = prepare_fuse(base, adapter, tmp_path / "fused").plan
    needs = memory_needs(plan, 600)
    assert needs.streamed < needs.resident
    monkeypatch.setattr(auto, "memory_needs", lambda *_: replace(needs, running=1 << 60))
    report = fuse(
        base, adapter, tmp_path / "fused", calibration_tokens=600, memory=needs.resident - 1
    )
    facts = report.calibration
    assert facts is not None
    assert (facts.streamed, facts.source) == (True, "packaged general text")
    assert any("--calibration FILE" in warning for warning in report.warnings)
    found = verify(base, adapter, tmp_path / "fused", max_tokens=512)
    assert found.recovered is not None
    assert found.recovered > 0.8
    text = samples.train_data_path()
    again = fuse(
        base, adapter, tmp_path / "given", calibration=text, calibration_tokens=600,
        memory=str(needs.resident - 1),
    )  # fmt: skip
    assert again.calibration is not None
    assert again.calibration.general_source == "packaged general text"
    assert not any("--calibration FILE" in warning for warning in again.warnings)


def test_the_disk_is_used_where_one_layer_is_too_much(tmp_path: Path) -> None:
    base = make_exportable(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    plan = prepare_fuse(base, adapter, tmp_path / "fused").plan
    needs = memory_needs(plan, 600)
    assert needs.spilled < needs.streamed < needs.resident
    decided = [
        spills(plan, CalibrationOptions(tokens=600, memory=allowed))
        for allowed in (needs.spilled, needs.streamed - 1, needs.streamed, needs.resident)
    ]
    assert decided == [True, True, False, False]
    with pytest.raises(ConfigurationError, match="calibrating takes about"):
        spills(plan, CalibrationOptions(tokens=600, memory=needs.spilled - 1))
    reports = [
        fuse(
            base, adapter, tmp_path / str(allowed), calibration=samples.train_data_path(),
            calibration_tokens=600, memory=allowed,
        )
        for allowed in (needs.spilled, needs.resident)
    ]  # fmt: skip
    assert [report.calibration.streamed for report in reports] == [True, False]
    one, other = (
        (tmp_path / str(allowed) / "model.safetensors").read_bytes()
        for allowed in (needs.spilled, needs.resident)
    )
    assert one == other


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("1MB", "--memory 1.0 MB: calibrating takes about"),
        ("much", "--memory much: must be a size, such as 8GB"),
        ("0", "--memory 0: must be a size"),
        (-3, "--memory -3: must be a size"),
    ],
)
def test_what_no_memory_is(memory: str | int, message: str, tmp_path: Path) -> None:
    base = make_exportable(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(ConfigurationError, match=message):
        fuse(base, adapter, tmp_path / "fused", memory=memory)
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("700m", 7 * 10**8), (12345, 12345)],
)
def test_sizes(written: str | int, nbytes: int) -> None:
    assert FuseOptions(memory=written).calibrating.memory == nbytes


def test_layers_that_are_no_chain_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_exportable(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(LayerChain, "recorded", lambda *_: None)
    needs = memory_needs(prepare_fuse(base, adapter, tmp_path / "fused").plan, 100)
    how = {"memory": needs.resident - 1, "calibration_tokens": 100}
    report = fuse(base, adapter, tmp_path / "fused", **how)
    assert report.requantize == "nearest"
    assert any("runs as a whole only" in warning for warning in report.warnings)
