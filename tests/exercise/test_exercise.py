"""The exercise itself, run for real on a tiny model that has the sample's tokenizer."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from click.testing import CliRunner
from support.command import exit_code, run
from support.exercise_reports import make_bench, make_findings
from support.tiny import LLAMA, make_adapter, make_model

from mlx_fusekit import samples
from mlx_fusekit.bench import bandwidth
from mlx_fusekit.bench.report import BenchReport
from mlx_fusekit.cli import group
from mlx_fusekit.errors import ConfigurationError, FusekitError, OutputError
from mlx_fusekit.exercise import report
from mlx_fusekit.exercise.findings import (
    CALIBRATED,
    JSON_NAME,
    ROUNDED,
    digest,
    read_findings,
)
from mlx_fusekit.exercise.lesson import exercise_target, run_lesson
from mlx_fusekit.exercise.options import Settings
from mlx_fusekit.exercise.peer import fuse_by_rounding
from mlx_fusekit.exercise.texts import LANGUAGES, TEXTS
from mlx_fusekit.exercise.trade_off import TradeOff, model_answer, speed_sentence

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SMALL = ("-p", "8", "-g", "4", "-n", "6", "--adapters", "2", "--seed", "3")


@dataclass(frozen=True)
class Done:
    """One run of the command."""

    folder: Path
    process: subprocess.CompletedProcess[str]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def value(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.out / JSON_NAME).read_text("utf-8"))
        return value


def make_sources(folder: Path, **quantization: Any) -> None:
    """A tiny base with the sample's tokenizer, an adapter for it, and what that was trained on."""
    config = {**LLAMA, "vocab_size": 1024, "max_position_embeddings": 256}
    base = make_model(folder / "base", config, **quantization)
    for name in TOKENIZER:
        shutil.copy(samples.model_path() / name, base)
    adapter = make_adapter(folder / "adapter", base)
    (folder / "text").mkdir()
    items = samples.train_data_path().read_text("utf-8").splitlines(keepends=True)
    (folder / "text" / "train.jsonl").write_text("".join(items[:30]), "utf-8")
    config_file = adapter / "adapter_config.json"
    settings = json.loads(config_file.read_text("utf-8")) | {"data": str(folder / "text")}
    config_file.write_text(json.dumps(settings), "utf-8")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("exercise")
    make_sources(folder)
    sources = ("--model", "base", "--adapter-path", "adapter", "--data", "text/train.jsonl")
    process = run("exercise", *sources, *SMALL, "--out", "out", "--lang", "ko", cwd=folder)
    assert process.returncode == 0, process.stderr
    return Done(folder, process)


def test_the_folder_is_complete(done: Done) -> None:
    files = {path.name for path in done.out.iterdir()}
    assert files == {"report.md", "report.json", "parity.png", "timing.png", "fused", "mlx-lm"}
    assert not [path for path in done.folder.iterdir() if path.name.startswith(".")]
    for name in ("fused", "mlx-lm"):
        mlx_lm.load(str(done.out / name))
    for name in ("parity.png", "timing.png"):
        assert (done.out / name).read_bytes().startswith(b"\x89PNG")


def test_the_json_has_everything(done: Done) -> None:
    found = read_findings(done.value, "report.json")
    assert (found.model, found.adapter, found.kind) == ("base", "adapter", "lora")
    assert (found.rank, found.scale, found.adapters, found.seed) == (4, 2.0, 2, 3)
    assert found.formats == {"4-bit group 64": 14}
    assert list(found.fusing) == [ROUNDED, CALIBRATED]
    assert min(made.seconds for made in found.fusing.values()) > 0
    assert list(found.parity) == ["base", ROUNDED, CALIBRATED, "base+adapter"]
    for closeness in found.parity.values():
        assert closeness.kl_mean is not None
        assert closeness.exact_match is not None
    assert list(found.bench.arms) == ["base", "base+adapter", "fused"]
    assert found.bench.fuse_seconds == found.fusing[CALIBRATED].seconds
    assert len(found.bench.runs[0].trials) == 18
    assert found.bench.settings["prompt_tokens"] == [8]


def test_reading_loses_nothing(done: Done) -> None:
    assert digest(read_findings(done.value, "report.json").as_json()) == digest(done.value)


def test_neither_file_has_a_path_of_this_machine(done: Done) -> None:
    for name in ("report.md", "report.json"):
        assert str(done.folder) not in (done.out / name).read_text("utf-8")
    assert "/home/kim/adapter" in json.dumps(make_bench().as_json())
    assert "/home/kim" not in json.dumps(make_findings().as_json())


def test_the_report_is_what_its_json_says(done: Done) -> None:
    assert (done.out / "report.md").read_text("utf-8") == report.render(done.value, "ko")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_report_in_both_languages(done: Done, language: str) -> None:
    words = report.render(done.value, language)
    for key in (key for key in TEXTS[language] if key.startswith("heading_")):
        assert f"## {TEXTS[language][key]}\n" in words
    for line in (report.START, report.END, "<details>", "</details>", "![", "timing.png", "W' ="):
        assert line in words
    found = read_findings(done.value, "report.json")
    assert " ".join(model_answer(found, language)) in words.partition("<details>")[2]
    assert not re.search(r"\{\w*\}", words)
    hangul = bool(re.search("[가-힣]", words))
    assert hangul == (language == "ko")


def test_the_figures_are_the_measured_medians(done: Done) -> None:
    words = report.render(done.value, "en")
    arms = done.value["bench"]["arms"]
    for label, arm in (("(a) base+adapter", "base+adapter"), ("(b) fused", "fused")):
        (row,) = (line for line in words.splitlines() if line.startswith(f"| {label} |"))
        _, _, first, token, rate, _ = (cell.strip() for cell in row.split("|"))
        for shown, metric, factor in (
            (first.removesuffix(" ms"), "ttft_seconds", 1000),
            (token.removesuffix(" ms"), "tpot_seconds", 1000),
            (rate, "generation_tokens_per_second", 1),
        ):
            measured = factor * arms[arm][metric]["median"]
            assert float(shown.replace(",", "")) == pytest.approx(measured, rel=0.006)


def test_the_lesson_fits_80_columns(done: Done) -> None:
    from rich.cells import cell_len

    lines = done.process.stdout.splitlines()
    # A command to be copied stays on one line, however long its path.
    assert max(cell_len(line) for line in lines if "--check" not in line) <= 80
    for key in ("step_fuse", "step_parity", "step_timing", "step_cost", "step_answer"):
        assert TEXTS["ko"][key] in lines


def test_its_own_check_asks_for_the_answer_alone(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done.folder)
    assert exit_code(monkeypatch, "exercise", "--check", "out/report.md") == 3
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_it_is_not_replaced_unasked(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done.out / "report.md").read_bytes()
    monkeypatch.chdir(done.folder)
    assert exit_code(monkeypatch, "exercise", "--out", "out") == 1
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "out: exists already; add --overwrite to replace it" in message
    assert (done.out / "report.md").read_bytes() == before


# --- refusals, before anything takes long -----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "base"], 2, "--model and --adapter-path: give both"),
        (["--model", "nowhere", "--adapter-path", "adapter"], 1, "--model nowhere"),
        (["--data", "nowhere"], 1, "--data nowhere: there is no such file"),
        (["-p", "5000"], 1, "5016 tokens are more than the 2048"),
        (["-g", "1"], 2, "-g"),
        (["--lang", "fr"], 2, "fr"),
        (["--any-machine"], 2, "--any-machine goes with --check"),
        (["--overwrite", "--out", "text"], 1, "holds no exercise"),
        (["--out", "text/train.jsonl"], 1, "is a file"),
        (
            ["--model", "out/fused", "--adapter-path", "adapter", "--out", "out", "--overwrite"],
            1,
            "is or holds what is read",
        ),
    ],
)
def test_a_mistake_is_told_at_once(
    done: Done, arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done.folder)
    result = CliRunner().invoke(group, ["exercise", *arguments])
    assert result.exit_code == code
    assert isinstance(result.exception, FusekitError if code == 1 else SystemExit)
    assert message in (str(result.exception) if code == 1 else result.output)
    assert (done.folder / "text" / "train.jsonl").exists()


def test_overwrite_replaces_an_earlier_exercise_only(done: Done, tmp_path: Path) -> None:
    exercise_target(done.out, overwrite=True, sources=()).check()
    exercise_target(tmp_path, overwrite=False, sources=()).check()
    (tmp_path / "link").symlink_to(done.out)
    with pytest.raises(OutputError, match="is a link"):
        exercise_target(tmp_path / "link", overwrite=True, sources=()).check()


class _Silent:
    """An audience that may leave."""

    def __init__(self, leave_at: str = "") -> None:
        self.leave_at = leave_at
        self.heard: list[str] = []

    def hear(self, words: str) -> None:
        self.heard.append(words)
        if self.leave_at and self.leave_at in words:
            raise KeyboardInterrupt

    heading = say = warn = hear

    def show(self, table: object) -> None: ...

    def watching(self, *, animated: bool = True) -> Any:
        import contextlib

        return contextlib.nullcontext()


def test_interrupted_it_leaves_nothing_behind(done: Done, tmp_path: Path) -> None:
    settings = Settings(str(done.folder / "base"), str(done.folder / "adapter"))
    with pytest.raises(KeyboardInterrupt):
        run_lesson(settings, tmp_path / "new" / "out", "en", _Silent("mlx_lm.fuse:"))
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_goes_on(done: Done) -> None:
    value = done.value | {"plots": []}
    words = report.render(value, "en")
    assert "](" not in words
    assert "## 3. Time" in words


def test_what_mlx_lm_cannot_fuse(done: Done, tmp_path: Path) -> None:
    found = fuse_by_rounding(done.folder / "text", done.folder / "adapter", tmp_path / "fused")
    assert isinstance(found, str)
    assert found
    lone = make_findings()
    rest = replace(
        lone,
        fusing={CALIBRATED: lone.fusing[CALIBRATED]},
        parity={name: value for name, value in lone.parity.items() if name != ROUNDED},
    )
    for language in LANGUAGES:
        words = report.render(rest.as_json(), language)
        assert TEXTS[language]["parity_ours"].partition("{")[0] in words


def test_an_unquantized_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_BYTES", 8 << 20)
    make_sources(tmp_path, bits=None)
    settings = Settings(
        str(tmp_path / "base"),
        str(tmp_path / "adapter"),
        str(tmp_path / "text" / "train.jsonl"),
        adapters=1,
        prompt_tokens=4,
        generation_tokens=2,
        trials=1,
        load_trials=0,
    )
    audience = _Silent()
    findings = run_lesson(settings, tmp_path / "out", "en", audience)
    assert not findings.quantized
    assert TEXTS["en"]["no_rounding"] in audience.heard
    words = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "too few to tell" in words
    assert "quantization step" not in words


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_every_kind_of_adapter_has_its_explanation(language: str, kind: str) -> None:
    words = report.render(make_findings(kind=kind).as_json(), language)
    assert TEXTS[language][f"merge_{kind}"].partition("{")[0] in words


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "not written by"),
        ({"format": "mlx-fusekit exercise 1"}, "damaged"),
        (make_findings(fusing={}).as_json(), "damaged"),
    ],
)
def test_json_that_is_none(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_findings(value, "report.json")


def test_names_cannot_break_the_report() -> None:
    evil = make_findings(model="a|b`<script>", adapter="x\n# y]")
    words = report.render(evil.as_json(), "en")
    assert "<script>" not in words
    assert "\n# y" not in words
    assert "a_b__script_" in words


# --- the model answer follows the figures -----------------------------------------------------


def answer(bench: BenchReport, language: str = "en", **changes: Any) -> str:
    return " ".join(model_answer(make_findings(bench, **changes), language))


FASTER: dict[str, Any] = {"adapted": 0.012, "fused": 0.010}
VERDICTS: list[tuple[dict[str, Any], str, str]] = [
    (FASTER, "speed_faster", "decide_fuse"),
    ({"adapted": 0.010, "fused": 0.012}, "speed_slower", "decide_keep"),
    (
        {"adapted": 0.010, "fused": 0.010, "noise": 0.2},
        "speed_no_difference",
        "decide_keep",
    ),
    ({**FASTER, "trials": 5}, "speed_too_few", "decide_later"),
]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("times", "speed", "decision"), VERDICTS)
@pytest.mark.parametrize("adapters", [1, 4])
def test_the_verdict_is_the_intervals(
    times: dict[str, Any], speed: str, decision: str, adapters: int, language: str
) -> None:
    words = answer(make_bench(**times), language, adapters=adapters)
    if decision != "decide_later":
        decision += "_one" if adapters == 1 else "_many"
    texts = TEXTS[language]
    given = [key for key in texts if key.startswith("decide_") and texts[key] in words]
    assert given == [decision]
    assert texts[speed].partition("{")[0] in words
    paid = texts["answer_break_even"].partition("{")[0] in words
    assert paid == (speed == "speed_faster")


def test_the_break_even_is_counted_from_the_two_figures() -> None:
    found = TradeOff.of(make_findings(make_bench(**FASTER, noise=0.0)))
    gap = 0.012 * (3.02 / 3) - 0.010 * (3.02 / 3)
    assert found.saved_seconds_per_token == pytest.approx(gap)
    assert found.break_even_tokens == round(20.0 / gap)
    shown = float(f"{found.break_even_tokens:.3g}")
    assert f"about {shown:,.0f} tokens" in answer(make_bench(**FASTER, noise=0.0))


def test_no_break_even_without_a_difference() -> None:
    assert TradeOff.of(make_findings(make_bench(fused=0.0119, noise=0.2))).break_even_tokens is None


def test_a_break_even_that_the_medians_do_not_give() -> None:
    """The ratio is a median over rounds: it may be clear where the two medians are not."""
    found = replace(TradeOff.of(make_findings()), break_even_tokens=None)
    assert found.speed.verdict == "faster"
    from mlx_fusekit.exercise.trade_off import _pays

    assert _pays(found, "en") == [TEXTS["en"]["answer_unclear_break_even"]]


def test_disk() -> None:
    found = TradeOff.of(make_findings())
    assert (found.base_bytes, found.adapter_bytes, found.fused_bytes) == (
        1_700_000,
        600_000,
        1_700_000,
    )
    assert found.swappable_bytes(3) == 3_500_000
    assert found.separate_bytes(3) == 5_100_000
    words = answer(make_bench())
    assert "3 adapters take 3.5 MB with their one base and 5.1 MB as fused models" in words


def test_the_interval_is_told() -> None:
    speed = make_findings().bench.speedup
    assert speed is not None
    assert speed.ci95 is not None
    low, high = speed.ci95
    for language in LANGUAGES:
        words = speed_sentence(speed, language)
        for value in (speed.ratio, low, high):
            assert f"{value:.3f}" in words
