"""``mlx-fusekit diff``."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import options, output
from mlx_fusekit.cli.options import PATH
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.pictures import check_picture
from mlx_fusekit.tables import Table
from mlx_fusekit.writing.staging import write_file
from mlx_fusekit.writing.targets import FileTarget

if TYPE_CHECKING:
    from mlx_fusekit.differing.diff import DiffReport

_SHOWN = 10


@click.command("diff")
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@click.option(
    "--plot",
    type=PATH,
    metavar="FILE",
    help="Draw the changes, layers by modules: .png, .svg or .pdf.",
)
@options.overwrite("Replace the picture where it exists.")
@options.as_json()
@options.trust_remote_code("Run the models' own *.py files.")
def command(
    first: str,
    second: str,
    plot: str | None,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Show which modules of two models differ, and how much.

    A and B are folders or Hub ids of models of one shape, in any formats. The change is the
    Frobenius norm of the difference by that of A's weight; the effective rank tells how many
    directions take part in it: a LoRA has few, rounding has many.
    """
    from mlx_fusekit.differing.diff import diff

    target = None
    if plot is not None:
        check_picture(plot)
        target = FileTarget(Path(plot).expanduser(), "--plot", overwrite)
        target.check()
    with output.steps_bar() as progress:
        report = diff(first, second, trust_remote_code=trust_remote_code, progress=progress)
    for warning in report.warnings:
        output.warn(warning)
    if as_json:
        output.print_json(report.as_json())
    else:
        _print(report)
    if target is not None:
        _draw(report, target)


def _draw(report: "DiffReport", target: FileTarget) -> None:
    if not report.changed:
        raise ConfigurationError(f"--plot {target.path}: no matrix differs, so nothing is drawn")
    from mlx_fusekit.differing.plots import picture

    write_file(target, picture(report, target.path.suffix))


def _print(report: "DiffReport") -> None:
    from mlx_fusekit.differing.diff import by_kind, layer_of
    from mlx_fusekit.differing.recipes import in_words

    rows = []
    for kind, changes in by_kind(report.changed).items():
        relative = [c.relative for c in changes if c.relative is not None]
        largest = max(changes, key=lambda change: change.relative or 0)
        rows.append(
            (
                kind,
                figures.count(len(changes)),
                figures.error(median(relative)) if relative else figures.UNKNOWN,
                figures.error(largest.relative),
                figures.UNKNOWN if (layer := layer_of(largest.module)) is None else str(layer),
                figures.number(median(change.effective_rank for change in changes)),
            )
        )
    title = f"From {report.first} to {report.second}"
    if rows:
        header = ("module", "changed", "change, median", "largest", "in layer", "eff. rank")
        output.print_table(Table(title, header, rows))
    facts = [("matrices", f"{len(report.changed)} of {report.modules} differ")]
    names = ", ".join(report.parameters[:_SHOWN])
    more = f" and {len(report.parameters) - _SHOWN} more" if len(report.parameters) > _SHOWN else ""
    facts.append(("others", f"{names}{more}" if names else "norms, biases and others are the same"))
    if report.recipe is not None:
        facts.append(("fusekit.json", f"{report.second} was made of {in_words(report.recipe)}"))
    facts.append(("time", figures.in_seconds(report.seconds)))
    output.print_facts("" if rows else title, facts)
