"""``mlx-fusekit fuse``."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit import figures, launched
from mlx_fusekit.cli import export_gguf, fuse_each, options, output, publish
from mlx_fusekit.cli.failures import BELOW_THRESHOLD
from mlx_fusekit.cli.options import PATH
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.requantize.options import CALIBRATION_TOKENS
from mlx_fusekit.requantize.strategy import STRATEGIES, in_words

if TYPE_CHECKING:
    from mlx_fusekit.fusing.report import FuseReport


@click.command("fuse")
@options.model(default="mlx_model", show_default=True)
@options.adapter_path(
    "Adapter: folder or Hub id. Repeat to combine several LoRA adapters, each with a weight.  "
    "[default: adapters]",
    multiple=True,
    default=("adapters",),
    metavar="PATH[:WEIGHT]",
)
@click.option(
    "--save-path", type=PATH, default="fused_model", show_default=True, help="Folder to make."
)
@click.option(
    "--requantize",
    type=click.Choice(list(STRATEGIES)),
    default="auto",
    show_default=True,
    help="How merged weights return to the base's format: calibrated on text, so that outputs "
    "change least; nearest by rounding, fast and lossy; auto calibrated, and wider where "
    "--max-kl asks for it.",
)
@click.option("--bits", type=int, help="Give merged modules this many bits instead of the base's.")
@click.option("--dequantize", is_flag=True, help="Write the whole model unquantized.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Type for --dequantize.  [default: that of the base's scales]",
)
@click.option(
    "--calibration",
    type=PATH,
    metavar="FILE",
    help="Text to calibrate on: items that mlx-lm trains on, as JSON lines or an array, a folder "
    "with train.jsonl, or plain text.  [default: the adapter's training data where it lies, else "
    "text written by base and adapter]",
)
@options.number(
    "--calibration-tokens",
    words="About how many tokens to calibrate on.",
    default=CALIBRATION_TOKENS,
)
@options.max_kl(
    "Bound on the mean KL from base+adapter, in nats a token: auto gives the modules that "
    "hurt most wider bits until the upper end of its 95 % interval keeps it; exits with code 3 "
    "when that does not, there is too little text, or nothing is re-quantized and so measured.  "
    "[auto's default: 0.1]"
)
@click.option(
    "--max-growth",
    type=float,
    metavar="SHARE",
    help="How much larger auto may make the model.  [default: 0.1, without a cap with --max-kl]",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="What calibrating may take, as 8GB: a model that does not fit is read layer by layer.  "
    "[default: 0.6 of the machine's]",
)
@options.seed("Seed of the calibration text.")
@click.option("--export-gguf", is_flag=True, help="Write the fused model as a GGUF file too.")
@click.option(
    "--gguf-path",
    type=PATH,
    default="model.gguf",
    show_default=True,
    metavar="FILE",
    help="That file, seen from --save-path.",
)
@options.outtype("Types of its tensors, as export-gguf takes them.")
@click.option(
    "--upload-repo",
    metavar="OWNER/NAME",
    help="Upload the result to this repository on the Hub, which is made private; "
    "`mlx-fusekit publish` does the same, and more.",
)
@click.option(
    "--each",
    is_flag=True,
    help="Fuse every adapter by itself, into a folder of its name in --save-path, with one pass "
    "over the base.",
)
@options.combine()
@options.scale()
@options.ignore()
@click.option(
    "--text-only",
    is_flag=True,
    help="Leave out vision, sound and further heads, which mlx-lm does not run.",
)
@click.option(
    "--no-resume",
    "resume",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Calibrate from the start; do not go on with what an interrupted run has done.",
)
@click.option("--again", is_flag=True, help="Fuse an adapter that the model holds already.")
@options.revision()
@options.overwrite("Replace an existing model folder.")
@options.dry_run("Show the plan; read no weights, write nothing.")
@options.as_json()
@options.trust_remote_code("Run and copy the model's own *.py files.")
def command(as_json: bool, dry_run: bool, each: bool, **asked: Any) -> int:
    """Fuse adapters into a base model; one model folder comes out.

    The result loads with mlx_lm.load and needs no adapter. It has the base's format and size
    unless --bits, --dequantize or --max-kl says otherwise. Exits with code 3 when --max-kl is
    not shown to hold; the model is there all the same. With --each, one adapter that fails leaves
    the others, and the exit code is 1.
    """
    named = [asked.pop(name) for name in ("model", "adapter_path", "save_path")]
    if each:
        if launched.ranks()[1] > 1:
            raise ConfigurationError("--each: not under mlx.launch; run it without, on one machine")
        return fuse_each.run(named, asked, dry_run=dry_run, as_json=as_json)
    from mlx_fusekit.fusing.fuse import prepare_fuse

    with launched.together():
        prepared = prepare_fuse(*named, **asked)
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
    title = "Plan (nothing was written)" if report.dry_run else f"Fused into {report.save_path}"
    revision = f" @ {report.revision[:12]}" if report.revision else ""
    formats = ", ".join(f"{count} as {name}" for name, count in report.modules.items()) or "none"
    adapters = ", ".join(map(figures.weighted, report.adapters, report.weights))
    how = f"; {figures.combination(report.combine)}" if report.combine else ""
    facts = [
        ("base", report.base + revision),
        ("adapter", f"{adapters} ({report.kind}{how})"),
        ("merged modules", formats),
    ]
    if report.unchanged:
        facts.append(("without effect", f"{report.unchanged} modules (their update is zero)"))
    if report.parameters:
        facts.append(("replaced", f"{report.parameters} parameters"))
    growth = figures.growth(report.output_bytes / report.base_bytes - 1)
    facts += [
        ("re-quantized", in_words(report.requantize) or "not needed"),
        *_calibration(report),
        ("size", f"{figures.size(report.output_bytes)} ({growth} against the base)"),
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
    if facts.general_tokens:
        general = f", {figures.count(facts.general_tokens)} of them {facts.general_source}"
    rows = [
        ("calibrated on", f"{facts.source}: {figures.count(facts.tokens)} tokens{general}"),
        (
            "output error",
            f"{figures.ratio(facts.output_error, 2)} of rounding to nearest (median of modules)",
        ),
        (
            "KL",
            f"{figures.nats(facts.kl_mean)} nats a token from base+adapter"
            f"{_interval(facts.kl_mean_ci95)}, the base {figures.nats(facts.kl_base_mean)}; on "
            f"{figures.count(facts.kl_tokens)} tokens not calibrated on",
        ),
    ]
    if facts.widened:
        widths = Counter(facts.widened.values())
        names = ", ".join(f"{count} modules to {bits} bits" for bits, count in widths.items())
        rows.append(("widened", f"{names}, for {figures.size(facts.added_bytes)}"))
    return rows


def _interval(bounds: tuple[float, float] | None) -> str:
    return f" (95 % interval {' to '.join(map(figures.nats, bounds))})" if bounds else ""
