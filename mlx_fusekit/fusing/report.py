"""What a fuse did, and what the user should know of it."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mlx_fusekit.adapters.updates import NO_ADAPTER
from mlx_fusekit.checkpoint.beside_text import in_words
from mlx_fusekit.figures import nats, setting
from mlx_fusekit.formats.floats import DTYPE_NAMES
from mlx_fusekit.merging.plan import FusePlan
from mlx_fusekit.requantize.options import CalibrationNeeds, CalibrationReport
from mlx_fusekit.texts.calibration import PACKAGED
from mlx_fusekit.verifying.verdict import interval_in_words, too_little

if TYPE_CHECKING:
    from mlx_fusekit.gguf.exporting import ExportReport
    from mlx_fusekit.publishing.publish import PublishReport

#: Round to nearest at this width or below can lose most of a LoRA (docs/requantization.md).
LOSSY_BITS = 6


@dataclass(frozen=True)
class FuseReport:
    """What a fuse did, or with ``dry_run`` would do.

    Attributes:
        weights: what each adapter's update was multiplied by.
        combine: method, density and seed by which several adapters were combined; None of one, or
            of a sum.
        requantize: the strategy, None where nothing was re-quantized.
        modules: merged and re-quantized modules by the format they were written in.
        unchanged: how many of the adapter's modules have a zero update.
        bits_per_weight: of the text model, whatever is quantized and what is not.
        computed_bytes: how much of ``output_bytes`` was computed and not copied.
        memory_bytes: working memory beyond the interpreter's own, estimated from the plan.
        cloned: whether the file system shared the untouched bytes with the base.
        left_out: files of the base that did not come along.
        ignored: modules that the user left out of the adapters, as their files name them.
        max_kl: the bound the user set, None for none.
        calibration: what calibrating did, None where there was none.
        needs: what calibrating will take, where it was asked for.
        gguf: of the GGUF file, where one was asked for; in JSON only then.
        published: of the upload, where one was asked for; in JSON only then.
    """

    save_path: str
    base: str
    revision: str | None
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    combine: dict[str, Any] | None
    kind: str
    requantize: str | None
    modules: dict[str, int]
    unchanged: int
    parameters: int
    base_bytes: int
    output_bytes: int
    bits_per_weight: float
    computed_bytes: int
    memory_bytes: int
    disk_free_bytes: int
    files: tuple[str, ...]
    cloned: bool
    seconds: float
    dry_run: bool
    warnings: tuple[str, ...]
    left_out: tuple[str, ...]
    ignored: tuple[str, ...]
    max_kl: float | None = None
    calibration: CalibrationReport | None = None
    needs: CalibrationNeeds | None = None
    gguf: "ExportReport | None" = None
    published: "PublishReport | None" = None

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        further = {"gguf": self.gguf, "published": self.published}
        own = asdict(replace(self, gguf=None, published=None))
        own["calibration"] = self.calibration.as_json() if self.calibration else None
        kept = {name: value for name, value in own.items() if name not in further}
        return kept | {name: of.as_json() for name, of in further.items() if of is not None}

    @property
    def teacher(self) -> str:
        """What the result is compared with, in words."""
        return "base+adapter" if self.adapters else "the model as it was"

    @property
    def passed(self) -> bool:
        """Whether the bound the user set is shown to hold, if there is one."""
        if self.dry_run or self.max_kl is None:
            return True
        return self.calibration is not None and self.calibration.reached is True


def formats_of(plan: FusePlan) -> dict[str, int]:
    """How many merged and re-quantized modules are written in which format."""
    written = {step.module: step for step in (*plan.merged, *plan.requantized)}
    formats = (step.target_spec or dtype_name(step.dtype) for step in written.values())
    return dict(Counter(map(str, formats)))


def dtype_name(dtype: str) -> str:
    """How people call a stored type."""
    return {stored: name for name, stored in DTYPE_NAMES.items()}.get(dtype, dtype)


def rounding_warnings(plan: FusePlan) -> Iterator[str]:
    """What to tell when modules are rounded to nearest at few bits."""
    specs = [step.target_spec for step in plan.requantized if step.target_spec is not None]
    bits = [spec.bits for spec in specs if spec.bits <= LOSSY_BITS]
    flag = "--bits" if plan.options.quantize is None else "--q-bits"
    if bits and plan.adapter is not NO_ADAPTER:
        yield (
            f"{len(bits)} modules are rounded to nearest at {min(bits)} bits, which can lose most "
            "of a fine-tune (`mlx-fusekit inspect ADAPTER --model BASE` shows its size in steps); "
            f"{flag} 8 keeps more, in a larger file"
        )


def format_warnings(plan: FusePlan) -> Iterator[str]:
    """What to tell when quantized modules take another format than the base's."""
    if plan.options.quantize is not None:
        quantized = [step for step in plan.requantized if step.source_spec is not None]
        for old, count in Counter(str(step.source_spec) for step in quantized).items():
            yield (
                f"{count} modules were {old} already, and are quantized a second time: what the "
                "first one lost stays lost; the unquantized original is the better base"
            )
        return
    changed = Counter(
        (step.source_spec.mode, str(step.target_spec))
        for step in plan.merged
        if step.source_spec and step.target_spec and step.source_spec.mode != step.target_spec.mode
    )
    for (mode, target), count in changed.items():
        yield f"{count} modules leave {mode}: wider bits are affine ({target})"


def unmeasured_warnings(max_kl: float | None) -> Iterator[str]:
    """What to tell when there is a bound, and nothing that would be measured."""
    if max_kl is not None:
        bound = f"--max-kl {max_kl:g}"
        yield (
            f"{bound}: nothing is re-quantized, so fusing measures no KL and the bound does not "
            f"count as kept; `mlx-fusekit verify {bound}` measures the fused model"
        )


def calibration_warnings(calibration: CalibrationReport) -> Iterator[str]:
    """What to tell when the bound does not hold, or calibration did not see everything."""
    if not math.isfinite(calibration.kl_mean):
        yield (
            "the original or the model that was made gives NaN or infinity on the text, so their "
            "KL is not measured; see with mlx_lm.generate whether the base itself does"
        )
    elif calibration.reached is False:
        assert calibration.kl_mean_ci95 is not None, "judged only with an interval"
        asked = "the bound" if calibration.max_kl_asked else "auto's own bound"
        yield (
            f"the mean KL is {nats(calibration.kl_mean)} nats a token "
            f"({interval_in_words(calibration.kl_mean_ci95)}), and not shown to be at most {asked} "
            f"of {setting(calibration.max_kl)}; more calibration text, --bits or a larger "
            "--max-growth bring it down"
        )
    elif calibration.max_kl_asked and calibration.reached is None:
        yield (
            f"--max-kl {setting(calibration.max_kl)} is not shown to hold: "
            f"{too_little(calibration.kl_tokens, calibration.kl_sequences)}; give more text "
            "(--calibration FILE, --calibration-tokens)"
        )
    if calibration.resumed_modules:
        yield (
            f"resumed an interrupted run, which had re-quantized {calibration.resumed_modules} "
            "modules"
        )
    if calibration.streamed:
        yield from _streamed_warnings(calibration)
    if calibration.not_seen:
        yield (
            f"{len(calibration.not_seen)} modules saw no calibration text and were fitted by "
            f"weight error alone ({calibration.not_seen[0]}, for one)"
        )
    if calibration.skipped_tokens:
        yield (
            f"{calibration.skipped_tokens} calibration tokens gave infinite or NaN activations "
            "and were left out"
        )


def beside_text_warnings(plan: FusePlan, *, text_only: bool) -> Iterator[str]:
    """What to tell of tensors that mlx-lm does not run."""
    base, left_out = plan.base, plan.options.left_out
    if text_only:
        yield f"--text-only leaves out {in_words(left_out) if left_out else 'nothing: all is text'}"
        return
    if base.beside:
        yield (
            f"what mlx-lm does not run comes along as it is: {in_words(base.beside)}; "
            "--text-only leaves it out"
        )
    if any("mtp." in name for name in base.beside):
        # Source: models/qwen3_5.py of mlx-lm 0.30.7 to 0.31.3, which tell by it what is raw.
        yield (
            "mlx-lm before 0.32 takes Qwen3.5 with mtp tensors for unconverted, and misreads its "
            "norms; for a program that has it, use --text-only"
        )
    if base.lost:
        yield (
            f"what mlx-lm does not run is left out: {in_words(base.lost)}; mlx-lm would not load "
            "the fused model with it"
        )


def _streamed_warnings(calibration: CalibrationReport) -> Iterator[str]:
    """What it costs that the model was never in memory as a whole."""
    if calibration.source == PACKAGED:
        yield (
            f"calibrated on {PACKAGED}, since the model does not fit in memory (--memory) and so "
            "wrote none of its task; text of the task keeps more of it: --calibration FILE"
        )
    if calibration.reached is False and not calibration.max_kl_asked:
        yield (
            "no module was given wider bits, which takes the whole model in memory (--memory); "
            "--bits gives them to all"
        )
