"""Reports of the exercise with chosen figures, written without running a model."""

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_fusekit.bench.environment import Environment
from mlx_fusekit.bench.equivalence import Equivalence
from mlx_fusekit.bench.report import ArmReport, BenchReport, Run, Trial
from mlx_fusekit.bench.workload import Shape
from mlx_fusekit.exercise import report
from mlx_fusekit.exercise.findings import (
    ADAPTED,
    BASE,
    CALIBRATED,
    FUSED,
    JSON_NAME,
    ROUNDED,
    Closeness,
    Findings,
    Fusing,
)

ARMS = (BASE, ADAPTED, FUSED)
GOOD = {
    "en": "On my machine fusing makes each token faster, and it pays off after a day of use. "
    "But I would lose the freedom to swap my three adapters, so I leave them as they are.",
    "ko": "제 컴퓨터에서는 병합하면 토큰을 조금 더 빨리 만들 수 있습니다. 하지만 어댑터 세 개를 "
    "자주 바꿔 쓰기 때문에 그대로 두는 편이 낫다고 생각합니다.",
}


def trial(arm: str, number: int, gap: float) -> Trial:
    return Trial(arm, number, ARMS.index(arm), float(number), 4 * gap, (gap, 1.02 * gap, gap))


def make_bench(
    *,
    adapted: float = 0.012,
    fused: float = 0.010,
    trials: int = 10,
    noise: float = 0.01,
    environment: Environment | None = None,
) -> BenchReport:
    """A benchmark of these times a token, in seconds, with that much noise."""
    draw = random.Random(0)
    gaps = {BASE: fused, ADAPTED: adapted, FUSED: fused}
    run = Run(Shape(32, 4), ADAPTED, deterministic=dict.fromkeys(ARMS, True))
    for number in range(trials):
        run.trials += [
            trial(arm, number, gap * (1 + noise * draw.uniform(-1, 1))) for arm, gap in gaps.items()
        ]
    run.equivalence = {arm: Equivalence(1.0, 1.0, 0.0) for arm in ARMS}
    arm = ArmReport("sample", None, None, 1_700_000, 0, 4.5, 1_700_000, 1_700_000, (0.1, 0.2))
    adapter = {"adapter": "/home/kim/adapter", "adapter_kind": "lora", "disk_bytes": 2_300_000}
    return BenchReport(
        arms={
            BASE: arm,
            ADAPTED: replace(
                arm, **adapter, adapter_disk_bytes=600_000, adapter_load_seconds=(0.01, 0.02)
            ),
            FUSED: replace(arm, model="fused", peak_memory_bytes=3_000_000),
        },
        runs=[run],
        settings={"trials": trials, "load_trials": 2},
        environment=environment or replace(Environment.read(), load_average=0.0),
        bandwidth_bytes_per_second=1e10,
        fuse_seconds=20.0,
    )


def make_findings(bench: BenchReport | None = None, **changes: Any) -> Findings:
    findings = Findings(
        model="sample-4bit",
        revision=None,
        adapter="adapter",
        kind="lora",
        rank=8,
        scale=20.0,
        formats={"4-bit group 64": 28},
        quantized=True,
        adapters=3,
        fusing={
            ROUNDED: Fusing("mlx-lm", 1.5, 1_700_000),
            CALIBRATED: Fusing("fused", 20.0, 1_700_000),
        },
        parity={
            BASE: Closeness(1.27, 0.4, 0.0),
            ROUNDED: Closeness(0.38, 0.9, 0.2),
            CALIBRATED: Closeness(0.00077, 0.999, 1.0),
            ADAPTED: Closeness(0.0, 1.0, 1.0),
        },
        parity_data="test.jsonl",
        parity_tokens=1000,
        bench=bench or make_bench(),
        plots=("parity.png", "timing.png"),
        seed=0,
    )
    return replace(findings, **changes)


def write_report(
    folder: Path,
    findings: Findings | None = None,
    *,
    language: str = "en",
    answer: str | Sequence[str] | None = None,
) -> Path:
    """``report.md`` and ``report.json`` in a folder, with an answer written into the report."""
    folder.mkdir(parents=True, exist_ok=True)
    written, words = _rendered(findings, language) if findings else _default(language)
    (folder / JSON_NAME).write_text(written, "utf-8")
    if answer is not None:
        before, _, rest = words.partition(report.START)
        _, _, after = rest.partition(report.END)
        words = f"{before}{report.START}\n\n{answer}\n\n{report.END}{after}"
    path = folder / report.NAME
    path.write_text(words, "utf-8")
    return path


def _rendered(findings: Findings, language: str) -> tuple[str, str]:
    """The texts of ``report.json`` and ``report.md``."""
    written = json.dumps(findings.as_json(), ensure_ascii=False)
    return written, report.render(json.loads(written), language)


@functools.cache
def _default(language: str) -> tuple[str, str]:
    """The same findings for most tests, whose intervals take longest."""
    return _rendered(make_findings(), language)
