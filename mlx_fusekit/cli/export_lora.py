"""``mlx-fusekit export-lora``."""

from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import output
from mlx_fusekit.cli.completion import PATH

if TYPE_CHECKING:
    from mlx_fusekit.gguf.lora import LoraReport


@click.command("export-lora")
@click.option("--model", type=PATH, required=True, help="The adapter's base: folder or Hub id.")
@click.option(
    "--adapter-path", type=PATH, required=True, help="The LoRA adapter: folder or Hub id."
)
@click.option(
    "--gguf-path", type=PATH, required=True, metavar="FILE", help="The GGUF file to write."
)
@click.option("--overwrite", is_flag=True, help="Replace the file where it exists.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own *.py files.")
def command(as_json: bool, model: str, adapter_path: str, gguf_path: str, **options: Any) -> None:
    """Write a LoRA adapter as a GGUF adapter for llama.cpp.

    llama.cpp applies it to the base while it runs, with --lora FILE, so that one base serves many
    adapters. What it cannot apply, as DoRA, is refused: fuse it instead.
    """
    from mlx_fusekit.gguf.lora import export_lora

    report = export_lora(model, adapter_path, gguf_path, **options)
    if as_json:
        output.print_json(report.as_json())
    else:
        show(report)


def show(report: "LoraReport") -> None:
    """What was written, for people."""
    facts = [
        ("architecture", report.architecture),
        ("modules", str(report.modules)),
        ("tensors", f"{report.tensors} F32"),
        ("rank", str(report.rank)),
        ("alpha", figures.setting(report.alpha)),
        ("size", figures.size(report.bytes)),
        ("in llama.cpp", f"--lora {report.gguf_path}"),
        ("time", figures.in_seconds(report.seconds)),
    ]
    output.print_facts(f"Wrote {report.gguf_path}", facts)
    for note in report.notes:
        output.warn(note)
