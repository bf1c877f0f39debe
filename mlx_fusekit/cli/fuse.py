"""``mlx-fusekit fuse``."""

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import options, output
from mlx_fusekit.cli import publish as publishing
from mlx_fusekit.cli.failures import BELOW_THRESHOLD, INTERRUPTED
from mlx_fusekit.cli.options import PATH
from mlx_fusekit.errors import FusekitError
from mlx_fusekit.requantize.options import CALIBRATION_TOKENS

if TYPE_CHECKING:
    from mlx_fusekit.fusing.fuse import FuseReport
    from mlx_fusekit.publishing.publish import PublishReport


@click.command("fuse")
@options.model(default="mlx_model", show_default=True)
@options.adapter_path(
    "Adapter: folder or Hub id. Repeat to add up several LoRA adapters, each with a weight.  "
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
    type=click.Choice(["auto", "calibrated", "nearest"]),
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
    help="Text to calibrate on: JSONL as mlx-lm trains on, a folder with train.jsonl, or plain "
    "text.  [default: the adapter's training data where it lies, else text written by base and "
    "adapter]",
)
@options.number(
    "--calibration-tokens",
    words="About how many tokens to calibrate on.",
    default=CALIBRATION_TOKENS,
)
@click.option(
    "--max-kl",
    type=float,
    metavar="X",
    help="Bound on the mean KL from base+adapter, in nats a token: auto gives the modules that "
    "hurt most wider bits until it holds; exits with code 3 when it does not.  "
    "[auto's default: 0.1]",
)
@click.option(
    "--max-growth",
    type=float,
    metavar="SHARE",
    help="How much larger auto may make the model.  [default: 0.1, without a cap with --max-kl]",
)
@options.seed("Seed of the calibration text.")
@click.option("--export-gguf", is_flag=True, help="Write the fused model as a GGUF file too.")
@click.option(
    "--gguf-path",
    default="model.gguf",
    show_default=True,
    metavar="FILE",
    help="That file, seen from --save-path.",
)
@click.option(
    "--upload-repo",
    metavar="OWNER/NAME",
    help="Upload the result to this repository on the Hub, which is made private; "
    "`mlx-fusekit publish` does the same, and more.",
)
@options.revision()
@options.overwrite("Replace an existing model folder.")
@options.dry_run("Show the plan; read headers only, write nothing.")
@options.as_json()
@options.trust_remote_code("Run and copy the model's own *.py files.")
def command(
    as_json: bool,
    dry_run: bool,
    export_gguf: bool,
    gguf_path: str,
    upload_repo: str | None,
    **options: Any,
) -> int:
    """Fuse adapters into a base model; one model folder comes out.

    The result loads with mlx_lm.load and needs no adapter. It has the base's format and size
    unless --bits, --dequantize or --max-kl says otherwise. Exits with code 3 when --max-kl does
    not hold; the model is there all the same.
    """
    from mlx_fusekit.fusing.fuse import prepare_fuse

    options["adapter_path"] = list(options["adapter_path"])
    save_path, trust_remote_code = Path(options["save_path"]), options["trust_remote_code"]
    prepared = prepare_fuse(
        options.pop("model"), options.pop("adapter_path"), options.pop("save_path"), **options
    )
    if export_gguf:
        target = save_path.expanduser() / Path(gguf_path).expanduser()
        check_gguf(prepared.plan.base.folder, target, options["overwrite"], trust_remote_code)
        if upload_repo is not None and target.resolve().parent != save_path.expanduser().resolve():
            output.warn(f"--gguf-path {target}: is not in {save_path}, and is not uploaded")
    if upload_repo is not None:
        check_upload(upload_repo, dry_run=dry_run)
    before = prepared.report()
    for warning in before.warnings:
        output.warn(warning)
    report = before
    if not dry_run:
        with output.steps_bar() as progress:
            report = prepared.run(progress=progress)
        for warning in report.warnings:
            if warning not in before.warnings:
                output.warn(warning)
    exported = None
    if export_gguf and not dry_run:
        from mlx_fusekit.cli import export_gguf as exporting

        exported = exporting.run(
            save_path, target, overwrite=options["overwrite"], trust_remote_code=trust_remote_code
        )
    published = None
    if upload_repo is not None and not dry_run:
        if report.passed:
            published = upload(save_path, upload_repo, trust_remote_code)
        else:
            line = _publish_line(save_path, upload_repo)
            output.warn(f"not uploaded, since --max-kl does not hold; {line}")
    if as_json:
        more = {} if exported is None else {"gguf": exported.as_json()}
        more |= {} if published is None else {"published": published.as_json()}
        output.print_json(report.as_json() | more)
    else:
        _print(report)
        if exported is not None:
            exporting.show(exported)
        if published is not None:
            publishing.show(published)
    return 0 if report.passed else BELOW_THRESHOLD


def check_gguf(base: Path, target: Path, overwrite: bool, trust_remote_code: bool) -> None:
    """Refuse what cannot be exported before anything is fused."""
    from mlx_fusekit.gguf.exporting import check_exportable
    from mlx_fusekit.gguf.file.staging import check_gguf_target

    check_exportable(base, trust_remote_code=trust_remote_code)
    check_gguf_target(target, overwrite=overwrite)


def check_upload(repo: str, *, dry_run: bool) -> None:
    """Refuse a repository that cannot be written to before anything is fused."""
    from mlx_fusekit.publishing.upload import check_access, check_name

    if dry_run:
        check_name(repo, "--upload-repo")
    else:
        check_access(repo, what="--upload-repo")


def upload(save_path: Path, repo: str, trust_remote_code: bool) -> "PublishReport":
    """Publish what was fused; when that fails, say where it is and how to go on."""
    try:
        report = publishing.run(save_path, repo, trust_remote_code=trust_remote_code)
    except FusekitError as error:
        raise type(error)(f"{error}; {_publish_line(save_path, repo)}") from error
    except KeyboardInterrupt:
        output.warn(f"interrupted; {_publish_line(save_path, repo)}")
        raise SystemExit(INTERRUPTED) from None
    for warning in report.warnings:
        output.warn(warning)
    return report


def _publish_line(save_path: Path, repo: str) -> str:
    command = shlex.join(["mlx-fusekit", "publish", "--path", str(save_path), "--repo", repo])
    return f"the fused model is in {save_path}, and `{command}` uploads it"


def _print(report: "FuseReport") -> None:
    title = "Plan (nothing was written)" if report.dry_run else f"Fused into {report.save_path}"
    revision = f" @ {report.revision[:12]}" if report.revision else ""
    formats = ", ".join(f"{count} as {name}" for name, count in report.modules.items()) or "none"
    facts = [
        ("base", report.base + revision),
        ("adapter", f"{', '.join(report.adapters)} ({report.kind})"),
        ("merged modules", formats),
    ]
    if report.unchanged:
        facts.append(("without effect", f"{report.unchanged} modules (their update is zero)"))
    if report.parameters:
        facts.append(("replaced", f"{report.parameters} parameters"))
    growth = figures.growth(report.output_bytes / report.base_bytes - 1)
    facts += [
        ("re-quantized", _strategy(report)),
        *_calibration(report),
        ("size", f"{figures.size(report.output_bytes)} ({growth} against the base)"),
        ("computed", figures.size(report.computed_bytes)),
    ]
    if report.dry_run:
        facts += [
            ("disk free", figures.size(report.disk_free_bytes)),
            ("working memory", _memory(report)),
            ("files", ", ".join(report.files)),
        ]
    else:
        shared = ", unchanged bytes shared with the base" if report.cloned else ""
        facts.append(("time", figures.in_seconds(report.seconds) + shared))
    if report.left_out:
        facts.append(("left out", ", ".join(report.left_out)))
    output.print_facts(title, facts)


def _memory(report: "FuseReport") -> str:
    running = ", and what running the base takes" * (report.requantize == "calibrated")
    return f"about {figures.size(report.memory_bytes)}{running}"


def _strategy(report: "FuseReport") -> str:
    if report.requantize is None:
        return "not needed"
    if report.requantize == "nearest":
        return "rounded to nearest"
    return "calibrated, so that the layers' outputs change least"


def _calibration(report: "FuseReport") -> list[tuple[str, str]]:
    facts = report.calibration
    if facts is None:
        return []
    general = ""
    if facts.general_tokens:
        general = f", {figures.count(facts.general_tokens)} of them written by the base"
    rows = [
        ("calibrated on", f"{facts.source}: {figures.count(facts.tokens)} tokens{general}"),
        (
            "output error",
            f"{figures.ratio(facts.output_error, 2)} of rounding to nearest (median of modules)",
        ),
        (
            "KL",
            f"{figures.nats(facts.kl_mean)} nats a token from base+adapter (the base: "
            f"{figures.nats(facts.kl_base_mean)}), on {figures.count(facts.kl_tokens)} tokens "
            "not calibrated on",
        ),
    ]
    if facts.widened:
        widths = Counter(facts.widened.values())
        names = ", ".join(f"{count} modules to {bits} bits" for bits, count in widths.items())
        rows.append(("widened", f"{names}, for {figures.size(facts.added_bytes)}"))
    return rows
