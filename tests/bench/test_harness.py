"""The benchmark from end to end, on tiny real models."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from support.models import run_model
from support.tiny import LLAMA, QWEN3_MOE, VOCABULARY, make_adapter, make_model

from mlx_fusekit import BenchReport, Workload, benchmark, fuse, samples
from mlx_fusekit.bench import bandwidth, harness, plots
from mlx_fusekit.bench.harness import measure
from mlx_fusekit.bench.report import Run, read_report
from mlx_fusekit.bench.workload import Shape, random_prompts
from mlx_fusekit.errors import AdapterError, CheckpointError, ConfigurationError

SMALL = Workload((8,), (4,), trials=6, load_trials=0)


@pytest.fixture(scope="module", autouse=True)
def _little_memory_is_read() -> Iterator[None]:
    """Every benchmark measures the bandwidth; the command's tests do it on all 256 MB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandwidth, "_BYTES", 8 << 20)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter that says something else, and two fused models."""
    folder = tmp_path_factory.mktemp("bench")
    base = make_model(folder / "base")
    adapter = make_adapter(folder / "adapter", base, strength=4.0)
    fuse(base, adapter, folder / "fused", requantize="nearest")
    fuse(base, adapter, folder / "wide", dequantize=True, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> BenchReport:
    return benchmark(
        folder / "base",
        folder / "adapter",
        {"fused": folder / "fused", "wide": folder / "wide"},
        workload=replace(SMALL, load_trials=2),
        fuse_seconds=3.0,
    )


def test_every_arm_runs_every_round(report: BenchReport) -> None:
    assert list(report.arms) == ["base", "base+adapter", "fused", "wide"]
    [run] = report.runs
    assert [(t.round, t.position) for t in run.trials] == [
        (number, position) for number in range(6) for position in range(4)
    ]
    for arm in report.arms:
        assert sorted(t.round for t in run.of(arm)) == list(range(6))
        assert all(len(t.itl_seconds) == 3 for t in run.of(arm))
    starts = [t.started_seconds for t in run.trials]
    assert starts == sorted(starts)
    assert report.complete
    assert run.reference == report.reference == "base+adapter"
    assert all(run.deterministic.values())


def test_the_json_has_what_the_contract_names(report: BenchReport) -> None:
    value = json.loads(json.dumps(report.as_json()))
    for arm in value["arms"].values():
        for key in (
            "ttft_seconds",
            "tpot_seconds",
            "itl_seconds",
            "prompt_tokens_per_second",
            "generation_tokens_per_second",
            "load_seconds",
        ):
            assert arm[key]["samples"], key
            assert arm[key]["minimum"] <= arm[key]["median"] <= arm[key]["p90"] <= arm[key]["p99"]
        assert arm["peak_memory_bytes"] > arm["weight_bytes"]
    assert len(value["arms"]["fused"]["load_seconds"]["samples"]) == 2
    low, high = value["speedup"]["ci95"]
    assert low <= value["speedup"]["ratio"] <= high
    assert value["speedup"]["over"] == "base+adapter"
    assert value["environment"]["versions"]["mlx"]
    assert value["bandwidth_bytes_per_second"] > 1e8


def test_rates_follow_from_times(report: BenchReport) -> None:
    [run] = report.runs
    trial = run.of("fused")[0]
    assert trial.total_seconds == pytest.approx(trial.ttft_seconds + sum(trial.itl_seconds))
    assert trial.tpot_seconds == pytest.approx(sum(trial.itl_seconds) / 3)
    rates = run.samples("fused", "generation_tokens_per_second")
    assert rates[0] == pytest.approx(1 / trial.tpot_seconds)
    rates = run.samples("fused", "prompt_tokens_per_second")
    assert rates[0] == pytest.approx(8 / trial.ttft_seconds)


def test_saved_and_read_back_it_is_the_same(report: BenchReport) -> None:
    value = json.loads(json.dumps(report.as_json()))
    again = read_report(value, "r.json")
    assert again == report
    assert again.as_json() == report.as_json()


def test_equivalence_tells_base_from_fused(report: BenchReport) -> None:
    found = report.runs[0].equivalence
    assert found["base+adapter"].kl_mean == 0
    assert found["wide"].same_tokens == found["wide"].top1_agreement == 1
    assert found["wide"].kl_mean < found["fused"].kl_mean < found["base"].kl_mean


def test_bits_and_bytes(report: BenchReport) -> None:
    arms = report.arms
    assert arms["base"].bits_per_weight == pytest.approx(arms["fused"].bits_per_weight)
    assert arms["wide"].bits_per_weight == 32
    adapted = arms["base+adapter"]
    assert adapted.adapter_kind == "lora"
    assert adapted.disk_bytes == arms["base"].disk_bytes + adapted.adapter_disk_bytes
    assert adapted.adapter_disk_bytes > 0


def test_break_even_is_the_time_of_fusing_by_what_a_token_saves(report: BenchReport) -> None:
    run = report.runs[0]
    quick = [
        replace(t, itl_seconds=tuple(0.5 if t.arm == "base+adapter" else 0.4 for _ in range(3)))
        for t in run.trials
    ]
    found = replace(report, runs=[replace(run, trials=quick)]).break_even("fused")
    assert found is not None
    assert found.saved_seconds_per_token == pytest.approx(0.1)
    assert found.tokens == 30
    slow = replace(report, runs=[replace(run, trials=quick)], fuse_seconds=None)
    unknown = slow.break_even("fused")
    assert unknown is not None
    assert unknown.tokens is None


def test_the_csv_has_one_line_a_trial(report: BenchReport) -> None:
    lines = report.as_csv().splitlines()
    assert len(lines) == 1 + 24
    assert lines[0].split(",")[:6] == [
        "prompt_tokens",
        "generation_tokens",
        "batch_size",
        "round",
        "position",
        "arm",
    ]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_plot_is_drawn_and_the_same_again(
    report: BenchReport, tmp_path: Path, suffix: str
) -> None:
    paths = [tmp_path / f"{number}{suffix}" for number in range(2)]
    for path in paths:
        path.write_bytes(plots.picture([report, report], path.suffix))
    contents = [path.read_bytes() for path in paths]
    assert contents[0] == contents[1]
    assert contents[0].startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])


def test_several_lengths_are_several_runs(folder: Path) -> None:
    work = Workload((4, 8), (1, 3), trials=2, load_trials=0)
    found = benchmark(folder / "base", fused=folder / "fused", workload=work, skip_base=True)
    assert [str(run.shape) for run in found.runs] == ["p4 g1", "p4 g3", "p8 g1", "p8 g3"]
    assert found.reference == "base"
    assert found.speedup_metric == "ttft_seconds"
    assert found.runs[0].speedups("tpot_seconds", 0) == {}
    assert found.speedup is not None
    assert found.speedup.pairs == 2
    assert read_report(found.as_json(), "r").as_json() == found.as_json()


def test_a_batch_counts_all_its_tokens(folder: Path) -> None:
    work = Workload((8,), (3,), batch_size=4, trials=2, load_trials=0)
    [run] = benchmark(folder / "base", folder / "adapter", folder / "fused", workload=work).runs
    trial = run.of("base")[0]
    assert run.samples("base", "prompt_tokens_per_second")[0] == pytest.approx(
        32 / trial.ttft_seconds
    )
    assert run.samples("base", "generation_tokens_per_second")[0] == pytest.approx(
        4 / (trial.tpot_seconds or 0)
    )


def test_the_same_seed_gives_the_same_prompts_and_order(folder: Path) -> None:
    runs = [
        benchmark(
            folder / "base",
            folder / "adapter",
            workload=replace(SMALL, trials=4, seed=seed),
        ).runs[0]
        for seed in (1, 1, 2)
    ]
    orders = [[t.arm for t in run.trials] for run in runs]
    assert orders[0] == orders[1]
    first = random_prompts(Shape(16, 4, 2), VOCABULARY, {3, 5}, 1)
    assert first == random_prompts(Shape(16, 4, 2), VOCABULARY, {3, 5}, 1)
    assert first != random_prompts(Shape(16, 4, 2), VOCABULARY, {3, 5}, 2)
    everything = {token for row in random_prompts(Shape(5000, 1), 8, {3, 5}, 1) for token in row}
    assert everything == {0, 1, 2, 4, 6, 7}


def test_a_prompt_goes_through_the_chat_template() -> None:
    work = Workload(
        prompt="How many users are there?", generation_tokens=(2,), trials=1, load_trials=0
    )
    base, adapter = samples.model_path(), samples.adapter_path()
    [run] = benchmark(base, adapter, workload=work).runs
    tokenizer = run_model(base).tokenizer
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": work.prompt}], add_generation_prompt=True, return_dict=False
    )
    assert run.shape.prompt_tokens == len(expected)


class _Slowed(nn.Module):
    """A model that waits before every call."""

    def __init__(self, model: nn.Module, seconds: float) -> None:
        super().__init__()
        self.inner = model
        self._seconds = seconds

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.inner.layers)

    def make_cache(self) -> list[object]:
        from mlx_lm.models.cache import make_prompt_cache

        return list(make_prompt_cache(self.inner))

    def __call__(self, *arguments: object, **options: object) -> mx.array:
        import time

        time.sleep(self._seconds)
        return self.inner(*arguments, **options)


def test_an_arm_that_is_slowed_a_lot_is_slower(folder: Path) -> None:
    model = run_model(folder / "base").model
    run = Run(Shape(8, 4), "plain")
    prompts = random_prompts(run.shape, VOCABULARY, (), 0)
    measure(run, {"plain": model, "slowed": _Slowed(model, 0.05)}, prompts, SMALL)
    for metric in ("ttft_seconds", "tpot_seconds", "total_seconds"):
        assert run.speedups(metric, 0)["slowed"].verdict == "slower"
    added = (run.median("slowed", "tpot_seconds") or 0) - (run.median("plain", "tpot_seconds") or 0)
    assert added > 0.045


def test_ctrl_c_keeps_what_was_measured(folder: Path) -> None:
    def stop(step: str, done: int, _total: int) -> None:
        if step == "timing" and done == 7:
            raise KeyboardInterrupt

    found = benchmark(
        folder / "base", folder / "adapter", folder / "fused", workload=SMALL, progress=stop
    )
    assert not found.complete
    assert len(found.runs[0].trials) == 7
    assert found.speedup is not None
    assert found.speedup.pairs == 2
    assert found.speedup.verdict == "too few trials"
    assert read_report(json.loads(json.dumps(found.as_json())), "r") == found


def test_ctrl_c_before_the_first_trial_keeps_nothing(folder: Path) -> None:
    def stop(step: str, _done: int, _total: int) -> None:
        if step == "warming up":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark(folder / "base", folder / "adapter", workload=SMALL, progress=stop)


def test_what_does_not_belong_together_is_refused_before_timing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(harness, "time_generation", never)
    base, adapter = folder / "base", folder / "adapter"
    other = make_model(tmp_path / "moe", QWEN3_MOE)
    with pytest.raises(CheckpointError, match="its architecture is qwen3_moe"):
        benchmark(base, adapter, other)
    larger = make_model(tmp_path / "larger", LLAMA | {"vocab_size": 128})
    with pytest.raises(CheckpointError, match="vocabulary has 128 tokens, and the base's 96"):
        benchmark(base, adapter, larger)
    wide = make_model(tmp_path / "wide", LLAMA | {"hidden_size": 256})
    misfit = make_adapter(tmp_path / "misfit", wide)
    with pytest.raises(AdapterError, match="misfit"):
        benchmark(base, misfit, folder / "fused")
    with pytest.raises(ConfigurationError, match="name of another arm"):
        benchmark(base, adapter, {"base": folder / "fused"})
    with pytest.raises(ConfigurationError, match="nothing to compare"):
        benchmark(base)
    short = make_model(tmp_path / "short", LLAMA | {"max_position_embeddings": 10})
    with pytest.raises(ConfigurationError, match="-p 8 -g 4: 12 tokens are more than the 10"):
        benchmark(short, fused=short, workload=SMALL)
    with pytest.raises(ConfigurationError, match="--prompt"):
        benchmark(base, adapter, workload=replace(SMALL, prompt=""))
    monkeypatch.setattr(harness, "memory_bytes", lambda: 100_000)
    with pytest.raises(ConfigurationError, match="leave some out"):
        benchmark(base, adapter, folder / "fused")


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.update(format="other"),
        lambda v: v.pop("runs"),
        lambda v: v["runs"][0].update(trials=[]),
        lambda v: v["runs"][0]["trials"][0].pop("arm"),
        lambda v: v["environment"].update(more=1),
        lambda v: v["arms"].update(base=3),
    ],
)
def test_a_damaged_report_is_refused(report: BenchReport, damage: object) -> None:
    value = json.loads(json.dumps(report.as_json()))
    damage(value)  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match=r"r\.json"):
        read_report(value, "r.json")
