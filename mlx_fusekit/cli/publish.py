"""``mlx-fusekit publish``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import options, output
from mlx_fusekit.cli.failures import INTERRUPTED
from mlx_fusekit.cli.options import PATH
from mlx_fusekit.tables import Table

if TYPE_CHECKING:
    from mlx_fusekit.publishing.publish import PublishReport


@click.command("publish")
@click.option("--path", type=PATH, required=True, metavar="FOLDER", help="The fused model.")
@click.option(
    "--repo",
    required=True,
    metavar="OWNER/NAME",
    help="Repository on the Hub; made where it is not there. NAME alone is one of yours.",
)
@click.option("--public", is_flag=True, help="Let everybody see it.  [default: private]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--revision", metavar="BRANCH", help="Commit to this branch.  [default: main]")
@click.option("--commit-message", metavar="TEXT", help="Message of the commit.")
@click.option(
    "--verify-report",
    type=PATH,
    metavar="FILE",
    help="Output of `mlx-fusekit verify --json`: the card shows how close the model is.",
)
@click.option(
    "--bench-report",
    type=PATH,
    metavar="FILE",
    help="What `mlx-fusekit bench --json FILE` wrote: the card shows how fast the model is.",
)
@click.option(
    "--license",
    "--licence",
    "license",
    metavar="ID",
    help="The model's license, as apache-2.0.  [default: that of the base]",
)
@options.dry_run("Print the card and the files; upload nothing.")
@options.as_json()
@options.trust_remote_code("Upload the model's own *.py files too.")
def command(as_json: bool, path: str, repo: str, **options: Any) -> int:
    """Upload a fused model to the Hugging Face Hub, with a model card.

    Uploads what belongs to a model (weights, tokenizer, settings, license, GGUF files) and lists
    what stays. The card says what was fused into what, how close and how fast it is, and how to
    run it; text that you wrote into it is kept. A file that names a path of this machine, or holds
    a token of the Hub, is refused. Log in with `hf auth login`, or set HF_TOKEN.
    An upload that was interrupted goes on when the same command is run again.
    """
    try:
        report = run(path, repo, **options)
    except KeyboardInterrupt:
        output.warn("interrupted; run the same again: what has arrived is not sent twice")
        return INTERRUPTED
    for warning in report.warnings:
        output.warn(warning)
    if as_json:
        output.print_json(report.as_json())
    else:
        show(report)
    return 0


def run(path: str | Path, repo: str, **options: Any) -> "PublishReport":
    """Publish; huggingface_hub shows on a terminal how far it is."""
    from mlx_fusekit.publishing.publish import publish

    return publish(path, repo, **options)


def show(report: "PublishReport") -> None:
    """What was uploaded, for people; of a dry run, the card too."""
    if report.dry_run:
        output.say(report.card)
    rows = [(file.name, figures.size(file.bytes)) for file in report.files]
    title = "Would upload" if report.dry_run else f"Uploaded to {report.repo}"
    output.print_table(Table(title, ("file", "size"), rows))
    if report.left_out:
        output.say()
        stayed = [(item.name, item.reason) for item in report.left_out]
        output.print_table(Table("Left out", ("file", "why"), stayed, text_columns=2))
    facts = [
        ("size", figures.size(report.bytes)),
        ("visible to", "people with access (private)" if report.private else "everybody"),
        ("license", report.license or "not known"),
        ("verified", "yes" if report.verified else "no"),
    ]
    if report.removed:
        facts.append(("removed", ", ".join(report.removed)))
    if report.pull_request_url is not None:
        facts.append(("pull request", report.pull_request_url))
    if report.commit_url is not None:
        facts += [("commit", report.commit_url), ("time", figures.in_seconds(report.seconds))]
    output.say()
    output.print_facts("", facts)
