"""``mlx-fusekit export-lora``."""

from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import options, output

if TYPE_CHECKING:
    from mlx_fusekit.gguf.lora import LoraReport


@click.command("export-lora")
@options.model("The adapter's base: folder or Hub id.", required=True)
@options.adapter_path("The LoRA adapter: folder or Hub id.", required=True)
@options.gguf_path()
@options.overwrite("Replace the file where it exists.")
@options.scale()
@options.ignore()
@options.revision("model")
@options.as_json()
@options.trust_remote_code()
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
