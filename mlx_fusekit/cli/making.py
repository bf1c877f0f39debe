"""What the commands that make a model have in common: options, the run, and what they print."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_fusekit import figures, launched
from mlx_fusekit.cli import export_gguf, options, output, publish
from mlx_fusekit.cli.failures import BELOW_THRESHOLD
from mlx_fusekit.cli.options import PATH, together
from mlx_fusekit.formats.specs import Q_MODES
from mlx_fusekit.requantize.options import CALIBRATION_TOKENS
from mlx_fusekit.requantize.strategy import STRATEGIES, in_words

if TYPE_CHECKING:
    from mlx_fusekit.fusing.prepared import PreparedFuse
    from mlx_fusekit.fusing.report import FuseReport

_Command = TypeVar("_Command", bound=Callable[..., Any] | click.Command)


def save_path(default: str) -> Callable[[_Command], _Command]:
    """``--save-path``, of the folder to make."""
    return click.option(
        "--save-path", type=PATH, default=default, show_default=True, help="Folder to make."
    )


def requantize(words: str) -> Callable[[_Command], _Command]:
    """``--requantize``."""
    return click.option(
        "--requantize",
        type=click.Choice(list(STRATEGIES)),
        default="auto",
        show_default=True,
        help=words,
    )


def whole_format(of: str = "") -> Callable[[_Command], _Command]:
    """``--q-bits`` and the like, named as ``mlx_lm.convert`` does.

    Args:
        of: the flag that they belong to, as it ends a sentence.
    """
    return together(
        click.option("--q-bits", type=int, help=f"Width{of}.  [default: the mode's; affine 4]"),
        click.option(
            "--q-group-size",
            type=int,
            help=f"Weights that share a scale{of}.  [default: the mode's; affine 64]",
        ),
        click.option(
            "--q-mode", type=click.Choice(Q_MODES), help=f"Kind of format{of}.  [default: affine]"
        ),
        click.option(
            "--target-bpw",
            type=float,
            metavar="B",
            help="Bits a weight that the whole model may take: modules get the widths with which "
            "they gain most, also narrower ones.",
        ),
    )


def calibrating(teacher: str, otherwise: str, default: str = "") -> Callable[[_Command], _Command]:
    """Options of calibration.

    Args:
        teacher: what the result is to be like.
        otherwise: what it is calibrated on by default.
        default: of the bound on the KL, in words.
    """
    return together(
        click.option(
            "--calibration",
            type=PATH,
            metavar="FILE",
            help="Text to calibrate on: items that mlx-lm trains on, as JSON lines or an array, a "
            f"folder with train.jsonl, or plain text.  [default: {otherwise}]",
        ),
        options.number(
            "--calibration-tokens",
            words="About how many tokens to calibrate on.",
            default=CALIBRATION_TOKENS,
        ),
        options.max_kl(
            f"Bound on the mean KL from {teacher}, in nats a token: auto gives the modules that "
            "hurt most wider bits until the upper end of its 95 % interval keeps it; exits with "
            "code 3 when that does not, there is too little text, or nothing is re-quantized and "
            f"so measured.{default}"
        ),
        click.option(
            "--max-growth",
            type=float,
            metavar="SHARE",
            help="How much larger auto may make the model.  [default: 0.1, without a cap with "
            "--max-kl]",
        ),
        click.option(
            "--memory",
            metavar="SIZE",
            help="What calibrating may take, as 8GB: a model that does not fit is read layer by "
            "layer.  [default: 0.6 of the machine's]",
        ),
        options.seed("Seed of the calibration text."),
    )


def destinations() -> Callable[[_Command], _Command]:
    """Where else the result is brought."""
    return together(
        click.option("--export-gguf", is_flag=True, help="Write the model as a GGUF file too."),
        click.option(
            "--gguf-path",
            type=PATH,
            default="model.gguf",
            show_default=True,
            metavar="FILE",
            help="That file, seen from --save-path.",
        ),
        options.outtype("Types of its tensors, as export-gguf takes them."),
        click.option(
            "--upload-repo",
            metavar="OWNER/NAME",
            help="Upload the result to this repository on the Hub, which is made private; "
            "`mlx-fusekit publish` does the same, and more.",
        ),
    )


def text_only() -> Callable[[_Command], _Command]:
    """``--text-only``."""
    return click.option(
        "--text-only",
        is_flag=True,
        help="Leave out vision, sound and further heads, which mlx-lm does not run.",
    )


def resume() -> Callable[[_Command], _Command]:
    """``--no-resume``."""
    return click.option(
        "--no-resume",
        "resume",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Calibrate from the start; do not go on with what an interrupted run has done.",
    )


def folder() -> Callable[[_Command], _Command]:
    """How base and target are treated, and what is printed."""
    return together(
        options.revision(),
        options.overwrite("Replace an existing model folder."),
        options.dry_run("Show the plan; read no weights, write nothing."),
        options.as_json(),
        options.trust_remote_code("Run and copy the model's own *.py files."),
    )


def run(prepare: "Callable[[], PreparedFuse]", *, dry_run: bool, as_json: bool) -> int:
    """Plan, make the model and print what came of it; the exit code."""
    with launched.together():
        prepared = prepare()
    if not launched.first():
        if not dry_run:
            with launched.bounded_end():
                prepared.run()
        return 0
    report = before = prepared.with_needs() if dry_run else prepared.report()
    for warning in before.warnings:
        output.warn(warning)
    if not dry_run:
        with launched.bounded_end(), output.steps_bar() as progress:
            report = prepared.run(progress=progress)
        for warning in report.warnings:
            if warning not in before.warnings:
                output.warn(warning)
    if as_json:
        output.print_json(report.as_json())
    else:
        _print(report)
    return 0 if report.passed else BELOW_THRESHOLD


def _print(report: "FuseReport") -> None:
    what = "Fused" if report.adapters else "Quantized"
    title = "Plan (nothing was written)" if report.dry_run else f"{what} into {report.save_path}"
    revision = f" @ {report.revision[:12]}" if report.revision else ""
    formats = ", ".join(f"{count} as {name}" for name, count in report.modules.items()) or "none"
    adapters = ", ".join(map(figures.weighted, report.adapters, report.weights))
    how = f"; {figures.combination(report.combine)}" if report.combine else ""
    facts = [("base" if report.adapters else "model", report.base + revision)]
    if report.adapters:
        facts.append(("adapter", f"{adapters} ({report.kind}{how})"))
    facts.append(("modules", formats))
    if report.unchanged:
        facts.append(("without effect", f"{report.unchanged} modules (their update is zero)"))
    if report.parameters:
        facts.append(("replaced", f"{report.parameters} parameters"))
    growth = figures.growth(report.output_bytes / report.base_bytes - 1)
    facts += [
        ("re-quantized", in_words(report.requantize) or "not needed"),
        *_calibration(report),
        (
            "size",
            f"{figures.size(report.output_bytes)} ({growth} against the base; "
            f"{figures.bits(report.bits_per_weight)} bits a weight)",
        ),
        ("computed", figures.size(report.computed_bytes)),
    ]
    if report.dry_run:
        facts += [
            ("disk free", figures.size(report.disk_free_bytes)),
            ("working memory", f"about {figures.size(report.memory_bytes)}"),
            *_needs(report),
            ("files", ", ".join(report.files)),
        ]
    else:
        shared = ", unchanged bytes shared with the base" if report.cloned else ""
        facts.append(("time", figures.in_seconds(report.seconds) + shared))
    if report.left_out:
        facts.append(("left out", ", ".join(report.left_out)))
    output.print_facts(title, facts)
    if report.gguf is not None:
        export_gguf.show(report.gguf)
    if report.published is not None:
        publish.show(report.published)


def _needs(report: "FuseReport") -> list[tuple[str, str]]:
    needs = report.needs
    if needs is None:
        return []
    layers = ", one layer at a time," if needs.streamed else ""
    memory = f"about {figures.size(needs.peak_bytes)} of memory{layers}"
    minutes = max(1, round(needs.seconds / 60))
    time = f"about {minutes} min on this machine"
    return [("calibrating", f"{memory} and {time}")]


def _calibration(report: "FuseReport") -> list[tuple[str, str]]:
    facts = report.calibration
    if facts is None:
        return []
    general = ""
    if facts.general_tokens and report.adapters:
        general = f", {figures.count(facts.general_tokens)} of them {facts.general_source}"
    base = f", the base {figures.nats(facts.kl_base_mean)}" if report.adapters else ""
    rows = [
        ("calibrated on", f"{facts.source}: {figures.count(facts.tokens)} tokens{general}"),
        (
            "output error",
            f"{figures.ratio(facts.output_error, 2)} of rounding to nearest (median of modules)",
        ),
        (
            "KL",
            f"{figures.nats(facts.kl_mean)} nats a token from {report.teacher}"
            f"{_interval(facts.kl_mean_ci95)}{base}; on "
            f"{figures.count(facts.kl_tokens)} tokens not calibrated on",
        ),
    ]
    if facts.widened:
        widths = Counter(facts.widened.values())
        names = ", ".join(f"{count} modules to {bits} bits" for bits, count in widths.items())
        rows.append(("widths", f"{names}, {_signed(facts.added_bytes)}"))
    return rows


def _signed(added: int) -> str:
    return f"{'-' if added < 0 else '+'}{figures.size(abs(added))}"


def _interval(bounds: tuple[float, float] | None) -> str:
    return f" (95 % interval {' to '.join(map(figures.nats, bounds))})" if bounds else ""
