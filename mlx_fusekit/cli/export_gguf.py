"""``mlx-fusekit export-gguf``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import options, output

if TYPE_CHECKING:
    from mlx_fusekit.gguf.exporting import ExportReport
    from mlx_fusekit.gguf.file.encoding import TensorEncoding

_LISTED = 5


@click.command("export-gguf")
@options.model("The model: folder or Hub id.", required=True)
@options.gguf_path()
@options.outtype(
    "auto: each quantized tensor in the type that holds the same values, or the closest. "
    "lossless: the same values, in a wider type where need be. Others convert."
)
@click.option("--modelfile", is_flag=True, help="Write Ollama's Modelfile beside it.")
@click.option("--system", metavar="TEXT", help="System prompt for the Modelfile.")
@click.option("--ollama", metavar="NAME", help="Make an Ollama model of it: ollama create NAME.")
@options.dry_run("Show what would be written, and write nothing.")
@options.overwrite("Replace the files where they exist.")
@options.revision("model")
@options.as_json()
@options.trust_remote_code()
def command(as_json: bool, model: str, gguf_path: str, **options: Any) -> None:
    """Write a model as one GGUF file for llama.cpp and Ollama.

    Quantized weights are repacked, not quantized again: in most formats the file holds the same
    values, bit by bit. With tokenizer, chat template and metadata.
    """
    report = run(model, gguf_path, **options)
    if as_json:
        output.print_json(report.as_json())
    else:
        show(report)


def run(model: str | Path, gguf_path: str | Path, **options: Any) -> "ExportReport":
    """Export with a progress bar."""
    from mlx_fusekit.gguf.exporting import export_gguf

    with output.steps_bar() as progress:
        return export_gguf(model, gguf_path, progress=progress, **options)


def show(report: "ExportReport") -> None:
    """What was written, for people."""
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    facts = [
        ("architecture", report.architecture),
        ("tensors", types),
        ("size", figures.size(report.bytes)),
        ("values", _exactness(report)),
    ]
    worst = sorted(report.inexact, key=lambda tensor: -(tensor.rel_rmse or 0))
    facts += [("", f"{t.name}: {t.ggml_type.name}{_error(t)}") for t in worst[:_LISTED]]
    if len(worst) > _LISTED:
        facts.append(("", f"and {len(worst) - _LISTED} more (--json lists all)"))
    if report.modelfile is not None:
        facts.append(("Modelfile", report.modelfile))
    facts.append(("time", figures.in_seconds(report.seconds)))
    verb = "Would write" if report.dry_run else "Wrote"
    output.print_facts(f"{verb} {report.gguf_path}", facts)
    if report.ollama_command is not None:
        # Not in the table, which would break a long line that is to be pasted.
        output.say(f"\nTo run it in Ollama:\n{report.ollama_command}")
    for note in report.notes:
        output.warn(note)


def _exactness(report: "ExportReport") -> str:
    if report.exact:
        return "exactly those of the MLX model"
    count = f"{len(report.inexact)} of {sum(report.types.values())} tensors"
    if report.dry_run:
        return f"{count} may not be exact; the export measures their error"
    return f"{count} are not exact:"


def _error(tensor: "TensorEncoding") -> str:
    if tensor.rel_rmse is None:
        return ""
    rmse, most = figures.error(tensor.rel_rmse), figures.error(tensor.max_abs_error)
    return f", relative RMS error {rmse}, at most {most}"
