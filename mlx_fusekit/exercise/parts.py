"""What the lesson and its report have in common: explanations and tables."""

from collections.abc import Mapping

from mlx_fusekit.bench.report import DRIFT_TO_WARN, BenchReport
from mlx_fusekit.bench.tables import median_load, medians
from mlx_fusekit.exercise.findings import (
    ADAPTED,
    BASE,
    CALIBRATED,
    FUSED,
    ROUNDED,
    Closeness,
    Findings,
    Fusing,
)
from mlx_fusekit.exercise.texts import text
from mlx_fusekit.exercise.trade_off import TradeOff
from mlx_fusekit.figures import UNKNOWN, count, in_seconds, nats, number, setting, share, size
from mlx_fusekit.tables import Table

_ROWS = {BASE: "row_base", ADAPTED: "row_adapted", FUSED: "row_fused"}


def explain_merging(
    kind: str, rank: int | None, scale: float | None, modules: int, language: str
) -> str:
    """What ``W + s*B*A`` is, for this adapter."""
    if kind == "full":
        return text(language, "merge_full", modules=modules)
    return text(language, f"merge_{kind}", rank=rank, scale=setting(scale), modules=modules)


def explain_rounding(quantized: bool, formats: Mapping[str, int], language: str) -> str:
    """Why a quantized base needs care."""
    if not quantized:
        return text(language, "no_rounding")
    return text(language, "rounding", formats=", ".join(formats))


def explain_parity(data: str, tokens: int, language: str) -> str:
    """What was compared, and what the figures mean."""
    shown = f"`{data}`" if data else text(language, "data_generated")
    return text(language, "parity_explained", tokens=count(tokens), data=shown)


def explain_timing(prompt: int, generated: int, trials: int, language: str) -> str:
    """What is timed, and how."""
    return text(language, "timing_explained", prompt=prompt, generated=generated, trials=trials)


def fusing_sentence(name: str, found: Fusing, language: str) -> str:
    """How long one way to fuse took, and how large the result is."""
    return text(
        language,
        "fused_by",
        name=name,
        seconds=in_seconds(found.seconds),
        size=size(found.disk_bytes),
    )


def parity_table(parity: Mapping[str, Closeness], language: str) -> Table:
    """Both fused models side by side, between the base and base+adapter."""
    names = {
        BASE: text(language, "row_dropped"),
        ADAPTED: text(language, "row_adapted").removeprefix("(a) "),
    }
    rows = tuple(
        (
            names.get(name, name),
            nats(found.kl_mean),
            share(found.top1_agreement),
            share(found.exact_match),
        )
        for name, found in parity.items()
    )
    header = ("", *(text(language, f"column_{name}") for name in ("kl", "top1", "exact")))
    return Table(text(language, "parity_table"), header, rows)


def timing_row(bench: BenchReport, arm: str, language: str) -> tuple[str, ...]:
    """The figures of one arm."""
    return (text(language, _ROWS[arm]), *medians(bench.runs[0], arm))


def timing_table(bench: BenchReport, language: str) -> Table:
    """The figures (a) and (b), below the base's."""
    header = ("", *(text(language, f"column_{name}") for name in ("first", "per_token", "rate")))
    rows = tuple(timing_row(bench, arm, language) for arm in bench.runs[0].arms)
    return Table(text(language, "timing_table"), header, rows)


def cost_table(findings: Findings, language: str) -> Table:
    """What swappable adapters and fused models take."""
    found, arms = TradeOff.of(findings), findings.bench.arms
    unfused, fused = arms[ADAPTED], arms[FUSED]
    counts = [1] if found.adapters == 1 else [1, found.adapters]
    rows = [
        (
            text(language, "cost_disk_one" if count == 1 else "cost_disk_many", adapters=count),
            size(found.swappable_bytes(count)),
            size(found.separate_bytes(count)),
        )
        for count in counts
    ]
    rows += [
        (text(language, "cost_each"), size(found.adapter_bytes), size(found.fused_bytes)),
        (
            text(language, "cost_load"),
            median_load(unfused.adapter_load_seconds),
            median_load(fused.load_seconds),
        ),
        (text(language, "cost_make"), UNKNOWN, in_seconds(found.fuse_seconds)),
        (
            text(language, "cost_memory"),
            size(unfused.peak_memory_bytes),
            size(fused.peak_memory_bytes),
        ),
    ]
    header = ("", text(language, "column_swappable"), text(language, "column_fused"))
    return Table(text(language, "cost_table"), header, rows)


def cautions(bench: BenchReport, language: str) -> list[str]:
    """What makes the times less sure."""
    run, lines = bench.runs[0], []
    if bench.environment.busy:
        load = number(bench.environment.load_average)
        lines.append(text(language, "caution_busy", load=load))
    if run.drift is not None and abs(run.drift) > DRIFT_TO_WARN:
        lines.append(text(language, "caution_drift", share=share(abs(run.drift), 0)))
    if unsteady := [arm for arm, same in run.deterministic.items() if not same]:
        names = ", ".join(text(language, _ROWS[arm]) for arm in unsteady)
        lines.append(text(language, "caution_unsteady", arms=names))
    return lines


def fusing_table(fusing: Mapping[str, Fusing], language: str) -> Table:
    """How long both ways took, and how large their results are."""
    columns = ("column_command", "column_time", "column_size")
    header = tuple(text(language, name) for name in columns)
    rows = tuple(
        (name, in_seconds(fusing[name].seconds), size(fusing[name].disk_bytes))
        for name in (ROUNDED, CALIBRATED)
        if name in fusing
    )
    return Table("", header, rows)
