"""``mlx-fusekit fuse``."""

from typing import Any

import click

from mlx_fusekit.cli import output
from mlx_fusekit.fusing import FuseReport, prepare_fuse


@click.command("fuse")
@click.option(
    "--model", default="mlx_model", show_default=True, help="Base model: folder or Hub id."
)
@click.option(
    "--adapter-path",
    multiple=True,
    default=("adapters",),
    show_default="adapters",
    metavar="PATH[:WEIGHT]",
    help="Adapter: folder or Hub id. Repeat to add up several LoRA adapters, each with a weight.",
)
@click.option("--save-path", default="fused_model", show_default=True, help="Folder to make.")
@click.option(
    "--requantize",
    type=click.Choice(["auto", "nearest"]),
    default="auto",
    show_default=True,
    help="How merged weights return to the base's format; auto takes the best there is.",
)
@click.option("--bits", type=int, help="Give merged modules this many bits instead of the base's.")
@click.option("--dequantize", is_flag=True, help="Write the whole model unquantized.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Type for --dequantize.  [default: that of the base's scales]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Recorded in fusekit.json.")
@click.option("--revision", help="Branch, tag or commit of a Hub base.")
@click.option("--overwrite", is_flag=True, help="Replace an existing model folder.")
@click.option("--dry-run", is_flag=True, help="Show the plan; read headers only, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--trust-remote-code", is_flag=True, help="Run and copy the model's own *.py files.")
def command(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Fuse adapters into a base model; one model folder comes out.

    The result loads with mlx_lm.load and needs no adapter. It has the base's format and size
    unless --bits or --dequantize says otherwise.
    """
    options["adapter_path"] = list(options["adapter_path"])
    prepared = prepare_fuse(
        options.pop("model"), options.pop("adapter_path"), options.pop("save_path"), **options
    )
    for warning in prepared.report().warnings:
        output.warn(warning)
    if dry_run:
        report = prepared.report()
    else:
        with output.progress_bar("fusing") as progress:
            report = prepared.run(progress=progress)
    if as_json:
        output.print_json(report.as_json())
    else:
        _print(report)


def _print(report: FuseReport) -> None:
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
    growth = report.output_bytes / report.base_bytes - 1
    facts += [
        ("re-quantized by", report.requantize or "not needed"),
        ("size", f"{output.size(report.output_bytes)} ({growth:+.1%} against the base)"),
        ("computed", output.size(report.computed_bytes)),
    ]
    if report.dry_run:
        facts += [
            ("disk free", output.size(report.disk_free_bytes)),
            ("working memory", f"about {output.size(report.memory_bytes)}"),
            ("files", ", ".join(report.files)),
        ]
    else:
        shared = ", unchanged bytes shared with the base" if report.cloned else ""
        facts.append(("time", f"{report.seconds:.1f} s{shared}"))
    if report.left_out:
        facts.append(("left out", ", ".join(report.left_out)))
    output.print_facts(title, facts)
