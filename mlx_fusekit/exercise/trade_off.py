"""From the figures to an answer: is it worth losing the adapter's swappability, here?

The speed's verdict is that of the 95 % interval of the benchmark, never that of two medians.
"""

from dataclasses import dataclass

from mlx_fusekit.bench.statistics import FEWEST_PAIRS, Ratio
from mlx_fusekit.exercise.findings import ADAPTED, BASE, CALIBRATED, FUSED, ROUNDED, Findings
from mlx_fusekit.exercise.texts import text
from mlx_fusekit.figures import about, in_seconds, nats, ratio, size


@dataclass(frozen=True)
class TradeOff:
    """What fusing gains and what it costs.

    Attributes:
        speed: how many times as fast as base+adapter the fused model is, a token.
        saved_seconds_per_token: may be negative; only a verdict gives it a meaning.
        break_even_tokens: generated tokens after which fusing has paid; None unless the verdict is
            "faster".
        base_bytes: on disk.
        adapter_bytes: on disk.
        fused_bytes: on disk.
        adapters: how many the learner uses.
    """

    speed: Ratio
    saved_seconds_per_token: float
    fuse_seconds: float
    break_even_tokens: int | None
    base_bytes: int
    adapter_bytes: int
    fused_bytes: int
    adapters: int

    @classmethod
    def of(cls, findings: Findings) -> "TradeOff":
        """What the figures say."""
        bench = findings.bench
        speed, found = bench.speedup, bench.break_even(FUSED)
        assert speed is not None
        unfused = bench.arms[ADAPTED]
        return cls(
            speed=speed,
            saved_seconds_per_token=found.saved_seconds_per_token if found else 0.0,
            fuse_seconds=findings.fusing[CALIBRATED].seconds,
            break_even_tokens=found.tokens if found and speed.verdict == "faster" else None,
            base_bytes=unfused.disk_bytes - unfused.adapter_disk_bytes,
            adapter_bytes=unfused.adapter_disk_bytes,
            fused_bytes=bench.arms[FUSED].disk_bytes,
            adapters=findings.adapters,
        )

    def swappable_bytes(self, adapters: int) -> int:
        """On disk: one base, and that many adapters."""
        return self.base_bytes + adapters * self.adapter_bytes

    def separate_bytes(self, adapters: int) -> int:
        """On disk: that many fused models."""
        return adapters * self.fused_bytes


def speed_sentence(found: Ratio, language: str) -> str:
    """What can be said of the speed, with its interval."""
    low, high = found.ci95 or (found.ratio, found.ratio)
    key = {
        "faster": "speed_faster",
        "slower": "speed_slower",
        "no difference": "speed_no_difference",
        "too few trials": "speed_too_few",
    }[found.verdict]
    return text(
        language,
        key,
        ratio=ratio(found.ratio),
        low=ratio(low),
        high=ratio(high),
        trials=found.pairs,
        fewest=FEWEST_PAIRS,
    )


def parity_sentence(findings: Findings, language: str) -> str:
    """How far both fused models are from base+adapter."""
    values = {
        "base": nats(findings.parity[BASE].kl_mean),
        "calibrated": nats(findings.parity[CALIBRATED].kl_mean),
    }
    if ROUNDED not in findings.parity:
        return text(language, "parity_ours", **values)
    values["rounded"] = nats(findings.parity[ROUNDED].kl_mean)
    return text(language, "parity_both", **values)


def model_answer(findings: Findings, language: str) -> list[str]:
    """An answer to the exercise's question, derived from the learner's own figures: sentences."""
    found = TradeOff.of(findings)
    return [
        speed_sentence(found.speed, language),
        *_pays(found, language),
        text(
            language,
            "answer_disk_one" if found.adapters == 1 else "answer_disk_many",
            adapters=found.adapters,
            swappable=size(found.swappable_bytes(found.adapters)),
            separate=size(found.separate_bytes(found.adapters)),
            adapter=size(found.adapter_bytes),
            fused=size(found.fused_bytes),
        ),
        _decision(found, language),
        parity_sentence(findings, language),
    ]


def _pays(found: TradeOff, language: str) -> list[str]:
    """After how many tokens fusing has paid, where it is faster."""
    if found.speed.verdict != "faster":
        return []
    if found.break_even_tokens is None:
        return [text(language, "answer_unclear_break_even")]
    return [
        text(
            language,
            "answer_break_even",
            saved=in_seconds(1000 * found.saved_seconds_per_token),
            fuse=in_seconds(found.fuse_seconds),
            tokens=about(found.break_even_tokens),
        )
    ]


def _decision(found: TradeOff, language: str) -> str:
    many = found.adapters > 1
    if found.speed.verdict == "too few trials":
        return text(language, "decide_later")
    if found.speed.verdict != "faster":
        return text(language, "decide_keep_many" if many else "decide_keep_one")
    return text(language, "decide_fuse_many" if many else "decide_fuse_one")
