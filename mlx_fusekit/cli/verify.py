"""``mlx-fusekit verify``."""

from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import options, output
from mlx_fusekit.cli.failures import BELOW_THRESHOLD
from mlx_fusekit.cli.options import PATH
from mlx_fusekit.verifying.options import MAX_TOKENS
from mlx_fusekit.verifying.parity_table import parity_table

if TYPE_CHECKING:
    from mlx_fusekit.verifying.report import ParityReport


@click.command("verify")
@options.model()
@options.adapter_path(
    "Adapter that was fused: folder or Hub id. Repeat as for fuse.",
    multiple=True,
    metavar="PATH[:WEIGHT]",
)
@click.option(
    "--fused", type=PATH, required=True, help="The fused model: folder, Hub id, or GGUF file."
)
@click.option("--reference", type=PATH, help="Compare with this model instead of base and adapter.")
@options.data(
    "Text to compare on: chat, completions or text items as JSON lines or an array, or plain "
    "text. Of conversations and completions the answers count.  [default: text written by base "
    "and adapter]  Repeat, one for each adapter, to see what each task lost.",
    multiple=True,
)
@options.max_kl(
    "Bound on the mean KL in nats a token, in place of the default ones: exits with code 3 unless "
    "the upper end of the 95 % interval is at most X."
)
@options.seed("Seed of the text.")
@options.number("--max-tokens", words="About how many tokens to run.", default=MAX_TOKENS, least=2)
@options.combine(None, "as fusekit.json of the fused model tells, else sum")
@options.scale()
@options.ignore()
@options.revision("base or reference")
@options.as_json()
@options.trust_remote_code("Run the models' own *.py files.")
def command(as_json: bool, **options: Any) -> int:
    """Measure how close a fused model is to base and adapter.

    Reads the fused model back from disk, runs it beside base and adapter (unmerged, as mlx-lm runs
    them) on the same tokens, and checks its files against the base's. A GGUF file runs in
    llama.cpp.

    The verdict is KEPT, LOST or NOT JUDGED, by the 95 % interval of the mean KL. Without --max-kl:
    kept at most 0.1 nats a token and a tenth of the base's own KL; lost above 0.1 or half of the
    base's. Lost too with significantly fewer exact answers, or files that are not in order. Fewer
    than 200 tokens in 8 sequences are not judged. Exits with code 3 when it is lost, or --max-kl
    was not shown to hold.
    """
    from mlx_fusekit.verifying.verify import verify

    sources = [options.pop(name) for name in ("model", "adapter_path", "fused")]
    with output.steps_bar() as progress:
        report = verify(*sources, progress=progress, **options)
    for warning in report.warnings:
        output.warn(warning)
    if as_json:
        output.print_json(report.as_json())
    else:
        _print(report)
    return 0 if report.holds else BELOW_THRESHOLD


def _print(report: "ParityReport") -> None:
    adapters = map(figures.weighted, report.adapters, report.weights)
    added = "".join(f" + {name}" for name in adapters)
    if report.combine:
        added += f" ({figures.combination(report.combine)})"
    title = f"{report.fused} against {report.reference}{added}"
    output.print_table(parity_table(report.as_json(), title))
    if report.tasks:
        from mlx_fusekit.verifying.tasks import tasks_table

        output.print_table(tasks_table(report.tasks))
    facts = [("KL", "divergence of each model from the last, in nats a token")]
    if report.recovered is not None:
        kept = figures.share(report.recovered, 2)
        facts.append(("recovered", f"{kept} of the way from base to base+adapter"))
    scored, sequences = figures.count(report.tokens), figures.count(report.sequences)
    facts.append(("tokens", f"{scored} scored in {sequences} sequences, {report.data}"))
    for place, check in enumerate(report.structure):
        state = "ok" if check.ok else "NOT OK"
        facts.append(("" if place else "structure", f"{state}: {check.name} ({check.detail})"))
    verdict = f"{report.verdict.upper()}: {report.verdict_reason}"
    facts += [("verdict", verdict), ("time", figures.in_seconds(report.seconds))]
    output.print_facts("", facts)
