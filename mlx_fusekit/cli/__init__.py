"""The command line: one thin file a command, loaded when it is called."""

import difflib
import importlib
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlx_fusekit import __version__
from mlx_fusekit.cli.failures import run

# name -> one line of help, so that the overview imports no command
_COMMANDS = {
    "fuse": "Fuse adapters into a base model; one model folder comes out.",
    "quantize": "Quantize a whole model, calibrated so that it stays close to what it is.",
    "verify": "Measure how close a fused model is to base and adapter.",
    "bench": "Time base and adapter against fused models.",
    "export-gguf": "Write a model as one GGUF file for llama.cpp and Ollama.",
    "convert-adapter": "Write an adapter in mlx-lm's or PEFT's form, or several as one.",
    "extract": "Make an adapter of what a fine-tune changed in its base.",
    "diff": "Show which modules of two models differ, and how much.",
    "export-lora": "Write a LoRA adapter as a GGUF adapter for llama.cpp.",
    "publish": "Upload a fused model to the Hugging Face Hub, with a model card.",
    "exercise": "The course exercise: is fusing worth losing swappability?",
    "inspect": "Show the facts of a model or adapter folder.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            close = difflib.get_close_matches(cmd_name, _COMMANDS, n=1)
            advice = f" Did you mean '{close[0]}'?" if close else ""
            ctx.fail(f"No such command '{cmd_name}'.{advice}")
        module = importlib.import_module(f"mlx_fusekit.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # Of an interrupt itself, click prints an empty line.
            raise click.Abort from error

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # A group of click's would import every command, to ask whether it is hidden.
        names = [
            CompletionItem(name, help=text)
            for name, text in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-fusekit")
def group(**_: Any) -> None:
    """Turn a LoRA adapter and its MLX base model into one model.

    \b
    mlx-fusekit fuse --model mlx-community/Llama-3.2-1B-Instruct-4bit \\
                     --adapter-path adapters --save-path fused
    """  # noqa: D301 - click reads the backspace


def main() -> None:
    """Entry point of the ``mlx-fusekit`` command; exits with the codes the documentation names."""
    run(group)
