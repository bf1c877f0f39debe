"""``mlx-fusekit convert-adapter``."""

from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import options, output
from mlx_fusekit.converting.options import FORMS

if TYPE_CHECKING:
    from mlx_fusekit.converting.convert import ConvertReport


@click.command("convert-adapter")
@options.model("The adapter's base: folder or Hub id.", required=True)
@options.adapter_path(
    "The adapter: folder or Hub id. Repeat to write several LoRA adapters as one.",
    multiple=True,
    required=True,
    metavar="PATH[:WEIGHT]",
)
@options.save_path("The adapter's folder to make.")
@click.option(
    "--to",
    type=click.Choice(FORMS),
    required=True,
    help="The form to write: mlx-lm's, or PEFT's with the names of transformers 5.",
)
@options.rank("Cut each module's update to rank N at most, by its singular values.")
@options.energy("Or to the smallest rank that keeps this share of its squares.")
@options.combine()
@options.scale()
@options.ignore()
@options.revision()
@options.overwrite("Replace an existing adapter's folder.")
@options.as_json()
@options.trust_remote_code()
def command(as_json: bool, **asked: Any) -> None:
    """Write an adapter in mlx-lm's or PEFT's form, or several as one.

    The update stays the same: what was written is read back and compared. What a form cannot hold
    is refused, and --rank tells how much of the update it keeps.
    """
    from mlx_fusekit.converting.convert import convert_adapter

    named = [asked.pop(name) for name in ("model", "adapter_path", "save_path", "to")]
    with output.steps_bar() as progress:
        report = convert_adapter(*named, progress=progress, **asked)
    for warning in report.warnings:
        output.warn(warning)
    if as_json:
        output.print_json(report.as_json())
    else:
        _print(report)


def _print(report: "ConvertReport") -> None:
    adapters = ", ".join(map(figures.weighted, report.adapters, report.weights))
    how = f" ({figures.combination(report.combine)})" if report.combine else ""
    facts = [
        ("adapter", adapters + how),
        ("modules", f"{report.modules} ({report.kind}), of rank {report.rank} at most"),
    ]
    if report.parameters:
        facts.append(("saved whole", f"{report.parameters} parameters"))
    facts.append(("scale", figures.setting(report.scale)))
    if report.energy is not None:
        facts.append(("energy kept", figures.share(report.energy, 2)))
    facts += [
        ("size", figures.size(report.bytes)),
        ("read back", f"differs by {figures.error(report.difference)} at most, relative"),
        ("time", figures.in_seconds(report.seconds)),
    ]
    output.print_facts(f"Written to {report.save_path}, in {_FORM[report.to]} form", facts)


_FORM = {"mlx": "mlx-lm's", "peft": "PEFT's"}
