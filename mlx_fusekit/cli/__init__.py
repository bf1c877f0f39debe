"""The command line: one thin file a command, loaded when it is called."""

import importlib
from typing import Any

import click

from mlx_fusekit import __version__
from mlx_fusekit.cli.failures import run

# name -> one line of help, so that the overview imports no command
_COMMANDS = {
    "fuse": "Fuse adapters into a base model; one model folder comes out.",
    "verify": "Measure how close a fused model is to base and adapter.",
    "bench": "Time base and adapter against fused models.",
    "export-gguf": "Write a model as one GGUF file for llama.cpp and Ollama.",
    "export-lora": "Write a LoRA adapter as a GGUF adapter for llama.cpp.",
    "inspect": "Show the facts of a model or adapter folder.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"mlx_fusekit.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-fusekit")
def group(**_: Any) -> None:
    r"""Turn a LoRA adapter and its MLX base model into one model.

    \b
    mlx-fusekit fuse --model mlx-community/Llama-3.2-1B-Instruct-4bit \\
                     --adapter-path adapters --save-path fused
    """


def main() -> None:
    """Entry point of the ``mlx-fusekit`` command; exits with the codes the documentation names."""
    run(group)
