"""``mlx-fusekit exercise --check``: what it accepts, and what it sends back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.command import exit_code, run
from support.exercise_reports import GOOD, make_bench, make_findings, write_report

from mlx_fusekit.bench.environment import Environment
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.exercise.check import Checked, check_report, sentences
from mlx_fusekit.exercise.findings import JSON_NAME
from mlx_fusekit.exercise.report import END, START
from mlx_fusekit.exercise.texts import LANGUAGES, TEXTS


def complaints(path: Path, **options: bool) -> tuple[str, ...]:
    return check_report(path, **options).complaints


def edited(path: Path, old: str, new: str) -> Path:
    words = path.read_text("utf-8")
    assert old in words
    path.write_text(words.replace(old, new, 1), "utf-8")
    return path


def starts(key: str, language: str = "en") -> str:
    """How a complaint begins, up to its first placeholder."""
    return TEXTS[language][key].partition("{")[0]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_report(tmp_path, answer=GOOD["en"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_good_report_is_accepted(tmp_path: Path, language: str) -> None:
    path = write_report(tmp_path, language=language, answer=GOOD[language])
    assert check_report(path) == Checked(language, ())


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_answer_may_be_in_either_language(tmp_path: Path, language: str) -> None:
    other = {"en": "ko", "ko": "en"}[language]
    assert not complaints(write_report(tmp_path, language=language, answer=GOOD[other]))


@pytest.mark.parametrize(
    "answer",
    [
        "- It is 1.2 times as fast a token\n- Swapping is what I would lose",
        "Fusing gains speed here! Is that worth it? No, as I swap adapters often.",
        "The fused model is faster. I lose swapping.",
        "병합 모델이 더 빠릅니다. 어댑터를 갈아 끼울 수 없게 됩니다.",
        "병합하면 토큰당 1.2배 빨라집니다 그래서 하나만 쓴다면 병합하겠습니다",
        "속도는 거의 같아요 그런데 디스크를 세 배나 쓰니까 그냥 둘래요",
        "차이가 없다.\n그래서 어댑터를 그대로 두고 바꿔 가며 쓰겠다.",
        "병합하면 속도가 빨라짐\n\n대신 어댑터 교체가 불가능함",
    ],
)
def test_lenient_with_form(tmp_path: Path, answer: str) -> None:
    assert not complaints(write_report(tmp_path, answer=answer))


def test_the_rest_of_the_report_is_the_learners_too(good: Path) -> None:
    edited(good, "## This run", "My notes: it was a warm day.\n\n## This run")
    edited(good, "| (a) base+adapter |", "|  **(a)** base+adapter|")
    good.write_bytes(good.read_bytes().replace(b"\n", b"\r\n"))
    beside = good.parent / JSON_NAME
    beside.write_text(json.dumps(json.loads(beside.read_text("utf-8")), indent=4), "utf-8")
    assert not complaints(good)


# --- figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["(a)", "(b)"])
def test_a_missing_figure(good: Path, letter: str) -> None:
    lines = good.read_text("utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(f"| {letter}")]
    assert len(kept) == len(lines) - 1
    good.write_text("\n".join(kept), "utf-8")
    (found,) = complaints(good)
    assert found.startswith(f"figure {letter}")
    assert "missing" in found


@pytest.mark.parametrize("letter", ["(a)", "(b)"])
def test_an_emptied_figure(good: Path, letter: str) -> None:
    lines = good.read_text("utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {letter}"))
    edited(good, row, f"| {letter} | - | - | - |")
    assert "missing" in complaints(good)[0]


def test_an_edited_figure_in_the_report(good: Path) -> None:
    (row,) = (line for line in good.read_text("utf-8").splitlines() if line.startswith("| (b)"))
    faster = row.replace("10.", "8.")
    assert faster != row
    (found,) = complaints(edited(good, row, faster))
    assert found.startswith("figure (b) fused is not the one of report.json")


def test_an_edited_figure_in_the_json(good: Path) -> None:
    beside = good.parent / JSON_NAME
    value = json.loads(beside.read_text("utf-8"))
    for trial in value["bench"]["runs"][0]["trials"]:
        if trial["arm"] == "fused":
            trial["itl_seconds"] = [gap / 2 for gap in trial["itl_seconds"]]
    beside.write_text(json.dumps(value), "utf-8")
    found = complaints(good)
    assert found[0] == TEXTS["en"]["other_json"]
    assert found[1].startswith("figure (b) fused is not the one of report.json")


# --- the JSON and the machine -----------------------------------------------------------------


def test_the_json_of_another_run(good: Path) -> None:
    write_report(good.parent / "other", make_findings(make_bench(adapted=0.0125)))
    (good.parent / "other" / JSON_NAME).replace(good.parent / JSON_NAME)
    assert TEXTS["en"]["other_json"] in complaints(good)


def test_no_json(good: Path) -> None:
    (good.parent / JSON_NAME).unlink()
    assert complaints(good) == (TEXTS["en"]["missing_json"],)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "mlx-fusekit exercise 1"}'])
def test_a_damaged_json(good: Path, content: str) -> None:
    (good.parent / JSON_NAME).write_text(content, "utf-8")
    assert complaints(good) == (TEXTS["en"]["damaged_json"],)


def test_another_machine(tmp_path: Path) -> None:
    elsewhere = replace(Environment.read(), chip="Apple M9", cores=99, load_average=0.0)
    findings = make_findings(make_bench(environment=elsewhere))
    path = write_report(tmp_path, findings, answer=GOOD["en"])
    (found,) = complaints(path)
    assert found.startswith(starts("other_machine"))
    assert not complaints(path, any_machine=True)


def test_new_software_is_no_other_machine(tmp_path: Path) -> None:
    here = Environment.read()
    system = here.os.split()
    updated = replace(
        here,
        os=f"{system[0]} 99.1 {system[-1]}",
        memory_bytes=here.memory_bytes + 4096,
        versions={"mlx": "99.0"},
        python="3.99",
        load_average=0.0,
    )
    path = write_report(tmp_path, make_findings(make_bench(environment=updated)), answer=GOOD["en"])
    assert not complaints(path)


# --- the answer -------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_placeholder_is_no_answer(tmp_path: Path, language: str) -> None:
    (found,) = complaints(write_report(tmp_path, language=language))
    assert found.startswith(starts("answer_missing", language))


@pytest.mark.parametrize("answer", ["", "...", "Yes.", "<!-- I will write this later. Really. -->"])
def test_an_empty_answer(tmp_path: Path, answer: str) -> None:
    (found,) = complaints(write_report(tmp_path, answer=answer))
    assert found.startswith(starts("answer_missing"))


@pytest.mark.parametrize(
    "answer",
    [
        "Fusing makes each token 1.25 times as fast on my machine",
        "Fusing is faster, but I swap adapters. Fusing is faster, but I swap adapters.",
        "병합하면 빠르니까 하나만 쓴다면 병합하는 편이 어댑터를 두는 것보다 다 좋습니다.",
    ],
)
def test_one_sentence_is_too_few(tmp_path: Path, answer: str) -> None:
    (found,) = complaints(write_report(tmp_path, answer=answer))
    assert found.startswith(starts("answer_short"))
    assert found.endswith("1")


def test_another_subject(tmp_path: Path) -> None:
    path = write_report(tmp_path, answer="I had a nice walk today. My dog liked it very much.")
    (found,) = complaints(path)
    assert found.startswith(starts("answer_off_topic"))


@pytest.mark.parametrize("line", [START, END])
def test_the_place_of_the_answer_is_gone(good: Path, line: str) -> None:
    (found,) = complaints(edited(good, line, ""))
    assert found.startswith(starts("answer_place_missing"))


def test_everything_is_told_at_once(tmp_path: Path) -> None:
    path = write_report(tmp_path)
    (tmp_path / JSON_NAME).unlink()
    rows = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("| (")]
    path.write_text("\n".join(rows), "utf-8")
    assert len(complaints(path)) == 4


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("It is 1.061 times as fast. So I fuse it.", 2),
        ("제 컴퓨터에서는 1.06배 빠릅니다. 그래서 병합합니다.", 2),
        ("빠르니까 병합하는 편이 좋습니다", 1),
        ("더 빠릅니까 아니면 더 느립니까", 2),
        ("Really?! I would not have thought so… But it is true.", 2),
    ],
)
def test_sentences(words: str, count: int) -> None:
    assert len(sentences(words)) == count


# --- files and the command --------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"# My report\n", b"\xff\xfe\x00", b"{}"])
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.md").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"report\.md: (not a report|cannot be read)"):
        check_report(tmp_path / "report.md")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no such file"):
        check_report(tmp_path / "report.md")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted = run("exercise", "--check", str(write_report(tmp_path, answer=GOOD["en"])))
    assert accepted.returncode == 0, accepted.stderr
    assert accepted.stdout.splitlines() == [f"{tmp_path / 'report.md'} is complete."]
    korean = write_report(tmp_path, language="ko")
    assert exit_code(monkeypatch, "exercise", "--check", str(korean)) == 3
    heading, *lines = capsys.readouterr().out.splitlines()
    assert "아직 빠진 것이 있습니다" in heading
    assert len(lines) == 1
    assert lines[0].startswith("- 아직 답이 없습니다")
    assert exit_code(monkeypatch, "exercise", "--check", str(tmp_path / JSON_NAME)) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert exit_code(monkeypatch, "exercise", "--check", str(korean), "--lang", "ko") == 2
