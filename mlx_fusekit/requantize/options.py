"""What a calibration is asked to do, and what it reports."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit import figures

#: Tokens to calibrate on, by default.
CALIBRATION_TOKENS = 8192
#: How much larger than its base ``auto`` may make a model when no bound is asked for.
DEFAULT_MAX_GROWTH = 0.1


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        file: text to calibrate on; None for the adapter's training data, or generated text.
        tokens: about how many to calibrate on.
        seed: of the text.
        max_kl: bound on the mean KL divergence from the teacher, in nats a token.
        max_kl_asked: whether the user set it.
        widen: whether modules may get wider bits to keep it.
        max_growth: how much larger than planned the model may become by that, as a share.
        target_bpw: bits a weight that the model may take, spent where they gain most; None for the
            planned widths.
        memory: bytes that calibrating may take; None for a share of the machine's.
    """

    file: Path | None = None
    tokens: int = CALIBRATION_TOKENS
    seed: int = 0
    max_kl: float | None = None
    max_kl_asked: bool = False
    widen: bool = False
    max_growth: float | None = None
    target_bpw: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class CalibrationNeeds:
    """What calibrating will take; estimates.

    Attributes:
        peak_bytes: of memory.
        streamed: whether one layer at a time will be in memory.
        seconds: on this machine, text that models write counted.
    """

    peak_bytes: int
    streamed: bool
    seconds: float


#: Of a report, what was measured and what follows from that.
_MEASURED = frozenset(
    (
        "kl_mean",
        "kl_mean_ci95",
        "kl_p99",
        "kl_base_mean",
        "recovered",
        "output_error",
        "reached",
        "streamed",
        "resumed_modules",
    )
)


@dataclass(frozen=True)
class CalibrationReport:
    """What calibrating did, and how close the fused model came.

    Numbers of a model that gives NaN are NaN, and None in :meth:`as_json`.

    Attributes:
        source: where the calibration text is from.
        tokens: of it; ``general_tokens`` of them are general text, from ``general_source``.
        kl_mean: KL(base+adapter || fused) in nats a token, on ``kl_tokens`` tokens of the same
            source that were not calibrated on, in ``kl_sequences`` sequences.
        kl_mean_ci95: bounds of its 95 % interval; None of too little text for one.
        kl_p99: what 99 % of these tokens stay below.
        kl_base_mean: of the base without its adapter.
        recovered: 1 - kl_mean / kl_base_mean.
        output_error: squared change of the layers' outputs over that of rounding to nearest, the
            median over modules.
        max_kl: the bound, ``max_kl_asked`` by the user or a default; ``reached`` tells whether the
            interval's upper end is at most that, and is None without an interval.
        widened: bits by module path, of those with others than planned.
        added_bytes: what they cost.
        not_seen: modules that no calibration token reached; they have the least weight error.
        streamed: whether one layer at a time was in memory.
        resumed_modules: how many modules an interrupted run had solved before this one.
        skipped_tokens: most tokens that were left out of a module's calibration, since its inputs
            were not finite.
    """

    source: str
    tokens: int
    general_tokens: int
    kl_mean: float
    kl_mean_ci95: tuple[float, float] | None
    kl_p99: float
    kl_base_mean: float
    kl_tokens: int
    kl_sequences: int
    recovered: float | None
    output_error: float
    max_kl: float | None
    max_kl_asked: bool
    reached: bool | None
    widened: Mapping[str, int]
    added_bytes: int
    not_seen: tuple[str, ...]
    skipped_tokens: int
    general_source: str = "written by the base"
    streamed: bool = False
    resumed_modules: int = 0

    @property
    def recorded(self) -> dict[str, Any]:
        """What a manifest tells of it: nothing that is measured.

        Threads add up in another order from machine to machine, and a measured figure's last digits
        with them.
        """
        return {name: value for name, value in self.as_json().items() if name not in _MEASURED}

    @property
    def kl_upper(self) -> float:
        """What the mean KL is at most, as far as the text shows; the mean without an interval."""
        return self.kl_mean if self.kl_mean_ci95 is None else self.kl_mean_ci95[1]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object; numbers that are not finite are None."""
        return figures.for_json(asdict(self))
