"""Is a learner's report complete?

It helps learners, and stops no cheat: who copies the model answer, or changes the JSON, the report
and the digest, gets through. What a report was measured on is told apart by the make of the machine
only.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit.bench.environment import Environment
from mlx_fusekit.checkpoint.folder import read_json
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.exercise.findings import (
    ADAPTED,
    FUSED,
    JSON_NAME,
    Findings,
    digest,
    fingerprint,
    read_findings,
)
from mlx_fusekit.exercise.parts import timing_row
from mlx_fusekit.exercise.report import END, HEAD, START
from mlx_fusekit.exercise.texts import LANGUAGES, TEXTS, text
from mlx_fusekit.reading import is_file, read_bytes

#: A report of the exercise has some ten thousand characters, and a sentence or two on top.
_MOST_BYTES = 5_000_000
#: Sentences that a learner has to write.
SENTENCES = 2
#: Fewer letters than this make no sentence; a Hangul syllable counts for two.
_FEWEST_LETTERS = 8

_FIGURES = {ADAPTED: "(a)", FUSED: "(b)"}
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# Syllables that end in ㅂ, as a verb does before a formal ending: 빠릅니다, 느립니까.
_BEFORE_FORMAL = "".join(chr(code) for code in range(ord("갑"), ord("힣"), 28))
# Ends of sentences: punctuation, which after a digit may be a decimal point; a Korean ending that
# only ends sentences, where no punctuation follows; an empty line or a new list item.
_SENTENCE_END = re.compile(
    r"(?<=[.!?…。！？])[\"'”’)\]]*\s+"  # noqa: RUF001 - full-width punctuation is meant
    rf"|(?<=[{_BEFORE_FORMAL}]니[다까])\s+|(?<=[아어여해예에네지세]요)\s+"
    r"|\n\s*(?:\n|[-*+]\s|\d+[.)]\s)"
)
#: What fusing is weighed by, in both languages.
_TRADE_OFF = re.compile(
    r"swap|switch|exchang|interchang|flexib|several|many|each adapter|adapters|separate|"
    r"disk|storage|space|memory|size|cost|\b[kmg]b\b|"
    r"speed|fast|slow|quick|time|latenc|second|\bms\b|token|break.?even|difference|"
    r"갈아|교체|바꿔|바꾸|전환|유연|여러|각각|어댑터들|디스크|저장|용량|공간|메모리|크기|비용|"
    r"속도|빠르|빨라|빨랐|빠른|느리|느려|느린|시간|지연|초당|밀리초|토큰|손익|차이",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Checked:
    """What became of a check.

    Attributes:
        language: of the report.
        complaints: what is missing, one line each, in that language; none of a complete report.
    """

    language: str
    complaints: tuple[str, ...]


def check_report(path: Path, *, any_machine: bool = False) -> Checked:
    """Check a report against ``report.json`` beside it and against this machine.

    Args:
        path: of ``report.md``.
        any_machine: accept figures of another machine, as a teacher has to.

    Raises:
        ConfigurationError: when the file is no report of the exercise.
    """
    content = _read(path)
    head = HEAD.search(content)
    if head is None or head[1] not in LANGUAGES:
        raise ConfigurationError(
            f"--check {path}: not a report of `mlx-fusekit exercise` (its first line is gone?)"
        )
    language, written_from, machine = head.groups()
    value, findings, complaints = _read_beside(path, language)
    if value is not None and (digest(value) != written_from or value.get("machine") != machine):
        complaints.append(text(language, "other_json"))
    if findings is not None:
        complaints += _machine(findings, language, any_machine)
    complaints += _figures(content, findings, language)
    complaints += _answer(content, language)
    return Checked(language, tuple(complaints))


def _read(path: Path) -> str:
    try:
        return read_bytes(path, _MOST_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigurationError(f"--check {path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--check {path}: cannot be read as text") from error


def _read_beside(
    path: Path, language: str
) -> tuple[dict[str, Any] | None, Findings | None, list[str]]:
    """``report.json``, what it holds, and what is wrong with it."""
    beside = path.parent / JSON_NAME
    if not is_file(beside):
        return None, None, [text(language, "missing_json")]
    try:
        value = read_json(beside)
        return value, read_findings(value, JSON_NAME), []
    except (CheckpointError, ConfigurationError):
        return None, None, [text(language, "damaged_json")]


def _machine(findings: Findings, language: str, any_machine: bool) -> list[str]:
    theirs, ours = fingerprint(findings.bench.environment), fingerprint(Environment.read())
    if any_machine or theirs == ours:
        return []
    return [text(language, "other_machine", theirs=theirs, ours=ours)]


def _figures(content: str, findings: Findings | None, language: str) -> list[str]:
    """Whether both figures stand in the table, as they were measured."""
    complaints = []
    for arm, letter in _FIGURES.items():
        label = text(language, "row_adapted" if arm == ADAPTED else "row_fused")
        found = re.search(rf"^\s*\|[\s*]*{re.escape(letter)}[^|]*\|(.*)$", content, re.MULTILINE)
        numbers = _NUMBER.findall(found[1]) if found else []
        if not numbers:
            complaints.append(text(language, "figure_missing", arm=label))
        elif findings is not None:
            expected = " ".join(timing_row(findings.bench, arm, language)[1:])
            if numbers != _NUMBER.findall(expected):
                measured = ", ".join(_NUMBER.findall(expected))
                complaints.append(
                    text(
                        language,
                        "figure_differs",
                        arm=label,
                        found=", ".join(numbers),
                        expected=measured,
                    )
                )
    return complaints


def _answer(content: str, language: str) -> list[str]:
    """What the learner's two sentences lack, if anything."""
    place = {"start": START, "end": END}
    _, start, rest = content.partition(START)
    answer, end, _ = rest.partition(END)
    if not start or not end:
        return [text(language, "answer_place_missing", **place)]
    answer = _COMMENT.sub(" ", answer)
    for texts in TEXTS.values():
        answer = answer.replace(texts["answer_here"], " ")
    written = sentences(answer)
    if not written:
        return [text(language, "answer_missing", **place)]
    if len(written) < SENTENCES:
        return [text(language, "answer_short", count=len(written))]
    if not any(_TRADE_OFF.search(sentence) for sentence in written):
        return [text(language, "answer_off_topic")]
    return []


def sentences(words: str) -> list[str]:
    """The sentences of a text, English or Korean; without repetitions.

    What is too short to be a sentence is left out.
    """
    pieces = (piece.strip() for piece in _SENTENCE_END.split(words.strip()))
    long_enough = (piece for piece in pieces if _weight(piece) >= _FEWEST_LETTERS)
    return list(dict.fromkeys(long_enough))


def _weight(words: str) -> int:
    """How many letters a text has; a Hangul syllable is made of two or three."""
    return sum(1 + ("가" <= letter <= "힣") for letter in words if letter.isalpha())
