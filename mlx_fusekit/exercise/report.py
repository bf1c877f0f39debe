"""``report.md``: the learner's report, written from the findings alone."""

import re
from collections.abc import Mapping
from typing import Any

from mlx_fusekit.exercise import parts, plots
from mlx_fusekit.exercise.findings import Findings, digest, fingerprint, read_findings
from mlx_fusekit.exercise.texts import text
from mlx_fusekit.exercise.trade_off import model_answer, parity_sentence, speed_sentence
from mlx_fusekit.figures import count, size
from mlx_fusekit.tables import Table

NAME = "report.md"
#: The lines around the place of the learner's answer.
START, END = "<!-- answer -->", "<!-- end of answer -->"
#: The first line: what the report is, and what it was written from.
HEAD = re.compile(
    r"<!-- mlx-fusekit exercise; language=(\w+); json=([0-9a-f]{64}); machine=([0-9a-f]{12}) -->"
)
#: What would change a table or a tag, in names that come from outside.
_MARKUP = re.compile(r"[`|<>\[\]\x00-\x1f\x7f]")


def render(value: Mapping[str, Any], language: str) -> str:
    """The report as Markdown.

    Args:
        value: the findings as a JSON object.
        language: one of :data:`mlx_fusekit.exercise.texts.LANGUAGES`.

    Raises:
        ConfigurationError: when it holds no findings.
    """
    findings = read_findings(value, "report.json")
    machine = fingerprint(findings.bench.environment)
    facts = f"language={language}; json={digest(value)}; machine={machine}"
    blocks = [
        f"<!-- mlx-fusekit exercise; {facts} -->",
        "# " + text(language, "title", **_names(findings)),
        text(language, "intro", **_names(findings)),
        text(language, "report_intro"),
        *_fusing(findings, language),
        *_parity(findings, language),
        *_timing(findings, language),
        *_cost(findings, language),
        *_answer(findings, language),
        *_run(findings, language),
    ]
    return "\n\n".join(blocks) + "\n"


def plain(name: str) -> str:
    """A name from outside, without what Markdown would take for its own."""
    return _MARKUP.sub("_", name)


def _names(findings: Findings) -> dict[str, str]:
    return {"model": plain(findings.model), "adapter": plain(findings.adapter)}


def _heading(language: str, name: str) -> str:
    return "## " + text(language, f"heading_{name}")


def _fusing(findings: Findings, language: str) -> list[str]:
    modules = sum(findings.formats.values())
    return [
        _heading(language, "fuse"),
        parts.explain_merging(findings.kind, findings.rank, findings.scale, modules, language),
        parts.explain_rounding(findings.quantized, findings.formats, language),
        parts.fusing_table(findings.fusing, language).markdown(),
    ]


def _parity(findings: Findings, language: str) -> list[str]:
    data = plain(findings.parity_data)
    found = [
        _heading(language, "parity"),
        parts.explain_parity(data, findings.parity_tokens, language),
        parts.parity_table(findings.parity, language).markdown(),
        parity_sentence(findings, language),
    ]
    if findings.quantized:
        found.append(text(language, "parity_depends"))
    return found + _picture(findings, plots.PARITY, "caption_parity", language)


def _timing(findings: Findings, language: str) -> list[str]:
    bench, speed = findings.bench, findings.bench.speedup
    shape = bench.runs[0].shape
    assert speed is not None
    return [
        _heading(language, "timing"),
        parts.explain_timing(
            shape.prompt_tokens, shape.generation_tokens, bench.settings["trials"], language
        ),
        parts.timing_table(bench, language).markdown(),
        text(language, "interval_explained"),
        speed_sentence(speed, language),
        *_picture(findings, plots.TIMING, "caption_timing", language),
    ]


def _cost(findings: Findings, language: str) -> list[str]:
    return [
        _heading(language, "cost"),
        text(language, "cost_explained", adapters=findings.adapters),
        parts.cost_table(findings, language).markdown(),
    ]


def _answer(findings: Findings, language: str) -> list[str]:
    """The question, the place for the learner's answer, and a model answer that is folded away."""
    return [
        _heading(language, "answer"),
        text(language, "question"),
        text(language, "answer_keep"),
        START,
        "> " + text(language, "answer_here"),
        END,
        f"<details>\n<summary>{text(language, 'model_answer')}</summary>",
        " ".join(model_answer(findings, language)),
        "</details>",
    ]


def _run(findings: Findings, language: str) -> list[str]:
    bench = findings.bench
    where, shape = bench.environment, bench.runs[0].shape
    rows = {
        "run_machine": text(
            language,
            "machine",
            chip=plain(where.chip),
            cores=where.cores,
            memory=size(where.memory_bytes),
        ),
        "run_system": f"{where.os}, Python {where.python}",
        "run_device": where.device,
        "run_versions": ", ".join(f"{name} {version}" for name, version in where.versions.items()),
        "run_settings": (
            f"`-p {shape.prompt_tokens} -g {shape.generation_tokens} "
            f"-n {bench.settings['trials']} --adapters {findings.adapters} --seed {findings.seed}`"
        ),
        "run_data": (
            f"{plain(findings.parity_data) or text(language, 'data_generated')} "
            f"({count(findings.parity_tokens)})"
        ),
        "run_fingerprint": f"`{fingerprint(where)}`",
    }
    listed = [(text(language, key), value) for key, value in rows.items()]
    listed += [(text(language, "run_caution"), line) for line in parts.cautions(bench, language)]
    header = (text(language, "run_what"), text(language, "run_value"))
    return [_heading(language, "run"), Table("", header, listed, text_columns=2).markdown()]


def _picture(findings: Findings, name: str, caption: str, language: str) -> list[str]:
    if name not in findings.plots:
        return []
    words = text(language, caption)
    return [f"![{words}]({name})", f"*{words}*"]
