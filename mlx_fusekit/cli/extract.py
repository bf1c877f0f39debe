"""``mlx-fusekit extract``."""

from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import options, output
from mlx_fusekit.cli.options import PATH
from mlx_fusekit.converting.options import FORMS

if TYPE_CHECKING:
    from mlx_fusekit.differing.extract import ExtractReport


@click.command("extract")
@options.model("The base: folder or Hub id.", required=True)
@click.option(
    "--fused",
    type=PATH,
    required=True,
    help="A fused or fine-tuned model of the same shape, in any format.",
)
@options.save_path("The adapter's folder to make.")
@options.rank("Rank of the adapter, at most.")
@options.energy("Or the share of the squares of each module's difference to keep.")
@click.option(
    "--to",
    type=click.Choice(FORMS),
    default="mlx",
    show_default=True,
    help="The form to write: mlx-lm's, or PEFT's with the names of transformers 5.",
)
@options.seed("Seed of the sketch by which large matrices are factored.")
@options.revision()
@options.overwrite("Replace an existing adapter's folder.")
@options.as_json()
@options.trust_remote_code()
def command(as_json: bool, **asked: Any) -> None:
    """Make an adapter of what a fine-tune changed in its base.

    The best one of its rank, by singular values; the energy is the share of the change that it
    keeps. Of a model that was fused without rounding that is all at the adapter's own rank; of
    one that was rounded to few bits, the rounding is most of the change, and no low rank has it.
    """
    from mlx_fusekit.differing.extract import extract

    named = [asked.pop(name) for name in ("model", "fused", "save_path")]
    with output.steps_bar() as progress:
        report = extract(*named, progress=progress, **asked)
    for warning in report.warnings:
        output.warn(warning)
    if as_json:
        output.print_json(report.as_json())
    else:
        _print(report)


def _print(report: "ExtractReport") -> None:
    from mlx_fusekit.differing.recipes import in_words

    least = min(report.modules, key=lambda module: module.energy)
    most = max(report.modules, key=lambda module: module.energy)
    facts = [
        ("base", report.base),
        ("model", report.fused),
        ("modules", f"{len(report.modules)}, of rank {report.rank} at most"),
        ("energy kept", f"{figures.share(report.energy, 2)} of all that differs"),
        ("least", f"{figures.share(least.energy, 2)} of {least.module}"),
        ("most", f"{figures.share(most.energy, 2)} of {most.module}"),
    ]
    if report.parameters:
        facts.append(("saved whole", ", ".join(report.parameters)))
    if report.recipe is not None:
        facts.append(("fusekit.json", f"{report.fused} was made of {in_words(report.recipe)}"))
    facts += [
        ("size", figures.size(report.bytes)),
        ("time", figures.in_seconds(report.seconds)),
    ]
    output.print_facts(f"Written to {report.save_path}", facts)
