"""``mlx-fusekit verify``."""

from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit.cli import output
from mlx_fusekit.cli.completion import PATH
from mlx_fusekit.cli.failures import BELOW_THRESHOLD

if TYPE_CHECKING:
    from mlx_fusekit.verifying.report import ParityReport

#: So that --help imports nothing heavy; the package's own is checked against it by a test.
MAX_TOKENS = 4096


@click.command("verify")
@click.option("--model", type=PATH, help="Base model: folder or Hub id.")
@click.option(
    "--adapter-path",
    type=PATH,
    multiple=True,
    metavar="PATH[:WEIGHT]",
    help="Adapter that was fused: folder or Hub id. Repeat as for fuse.",
)
@click.option(
    "--fused", type=PATH, required=True, help="The fused model: folder, Hub id, or GGUF file."
)
@click.option("--reference", type=PATH, help="Compare with this model instead of base and adapter.")
@click.option(
    "--data",
    type=PATH,
    metavar="FILE",
    help="Text to compare on: chat, completions or text JSONL, or plain text. Of conversations "
    "and completions the answers count.  [default: text written by base and adapter]",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Exit with code 3 when the mean KL is above X nats a token.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the text.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=MAX_TOKENS,
    show_default=True,
    metavar="N",
    help="About how many tokens to run.",
)
@click.option("--revision", help="Branch, tag or commit of a Hub base or reference.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--trust-remote-code", is_flag=True, help="Run the models' own *.py files.")
def command(as_json: bool, **options: Any) -> int:
    """Measure how close a fused model is to base and adapter.

    Reads the fused model back from disk, runs it beside base and adapter (unmerged, as mlx-lm runs
    them) on the same tokens, and checks its files against the base's. Exits with code 3 when a
    check of the files fails or the KL divergence is above --max-kl. A GGUF file runs in llama.cpp.
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
    return 0 if report.passed else BELOW_THRESHOLD


def _print(report: "ParityReport") -> None:
    header = ("", "KL mean", "median", "p99", "top-1", "perplexity", "exact match")
    rows: list[tuple[str, ...]] = []
    if report.adapters:
        rows.append(
            (
                "base",
                _number(report.kl_base_mean),
                _number(report.kl_base_median),
                _number(report.kl_base_p99),
                _share(report.top1_agreement_base),
                _perplexity(report.perplexity_base),
                _share(report.exact_match_base),
            )
        )
    rows.append(
        (
            "fused",
            _number(report.kl_mean),
            _number(report.kl_median),
            _number(report.kl_p99),
            _share(report.top1_agreement),
            _perplexity(report.perplexity_fused),
            _share(report.exact_match_fused),
        )
    )
    rows.append(
        (
            "base+adapter" if report.adapters else "reference",
            *("" for _ in range(4)),
            _perplexity(report.perplexity_reference),
            _share(report.exact_match_reference),
        )
    )
    added = "".join(f" + {name}" for name in report.adapters)
    output.print_rows(f"{report.fused} against {report.reference}{added}", header, rows)
    facts = [("KL", "divergence of each model from the last, in nats a token")]
    if report.recovered is not None:
        facts.append(("recovered", f"{report.recovered:.2%} of the way from base to base+adapter"))
    count = f"{report.tokens:,} scored in {report.sequences:,} sequences"
    facts.append(("tokens", f"{count}, {report.data}"))
    for place, check in enumerate(report.structure):
        verdict = "ok" if check.ok else "NOT OK"
        facts.append(("" if place else "structure", f"{verdict}: {check.name} ({check.detail})"))
    facts += [("verdict", _verdict(report)), ("time", f"{report.seconds:.1f} s")]
    output.print_facts("", facts)


def _verdict(report: "ParityReport") -> str:
    faults = []
    if not report.structure_ok:
        faults.append("the structure is not in order")
    if report.max_kl is not None and not report.kl_mean <= report.max_kl:
        faults.append(f"the mean KL is above --max-kl {report.max_kl:g}")
    if faults:
        return f"FAILED: {', and '.join(faults)}"
    bound = f", mean KL at most {report.max_kl:g}" if report.max_kl is not None else ""
    return f"passed: structure in order{bound}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _perplexity(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
