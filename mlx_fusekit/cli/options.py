"""Options that several commands have, each with its own words, and what a shell offers for paths.

``more`` is what else :func:`click.option` takes: a default, whether it is required or repeats.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from mlx_fusekit.adapters.combination import DEFAULT_DENSITY, METHODS
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.gguf.outtypes import OUTTYPES

_Command = TypeVar("_Command", bound=Callable[..., Any] | click.Command)


class _PathName(click.types.StringParamType):
    """A path as the user wrote it, for which a shell offers file names.

    Unlike ``click.Path`` it checks no more than what every name has to hold: a Hub id,
    ``NAME=PATH`` or ``PATH:WEIGHT`` may stand in its place, and the functions tell better what is
    wrong with one. ``~`` is the user's home folder.
    """

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(super().convert(value, param, ctx))
        flag = f"{param.opts[-1]} " if isinstance(param, click.Option) else ""
        if not text:
            raise ConfigurationError(f"{flag}'': the name is empty; name a file or folder")
        if not text.startswith("~"):
            path = Path(text)
        else:
            try:
                path = Path(text).expanduser()
            except RuntimeError as error:
                user = text.split("/", 1)[0]
                raise ConfigurationError(
                    f"{flag}{text}: there is no user {user[1:]}; write ./{text} for what has that "
                    "name here"
                ) from error
            text = str(path)
        # What is there or not, the functions find; a circle of links, or a name too long, nobody.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
        return text

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


PATH = _PathName()


class _Finite(click.FloatRange):
    """Takes no nan, which is in no range and out of none, and no infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


NOT_NEGATIVE = _Finite(min=0)


def together(*flags: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    """Several options as one, in the order in which help shows them."""

    def add(command: _Command) -> _Command:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return add


def model(
    words: str = "Base model: folder or Hub id.", **more: Any
) -> Callable[[_Command], _Command]:
    """``--model``."""
    return click.option("--model", type=PATH, help=words, **more)


def adapter_path(words: str, **more: Any) -> Callable[[_Command], _Command]:
    """``--adapter-path``."""
    return click.option("--adapter-path", type=PATH, help=words, **more)


def save_path(words: str, **more: Any) -> Callable[[_Command], _Command]:
    """``--save-path``."""
    return click.option("--save-path", type=PATH, required=True, help=words, **more)


def rank(words: str) -> Callable[[_Command], _Command]:
    """``--rank``."""
    return click.option("--rank", type=int, metavar="N", help=words)


def energy(words: str) -> Callable[[_Command], _Command]:
    """``--energy``."""
    return click.option("--energy", type=float, metavar="SHARE", help=words)


def scale() -> Callable[[_Command], _Command]:
    """``--scale``, of an adapter's update."""
    return click.option(
        "--scale",
        type=float,
        metavar="X",
        help="Factor of the adapter's update, instead of the one in its adapter_config.json.",
    )


def combine(
    default: str | None = "sum", otherwise: str | None = None
) -> Callable[[_Command], _Command]:
    """``--combine``, ``--density`` and ``--combine-seed``, of several adapters."""
    flags = (
        click.option(
            "--combine",
            type=click.Choice(list(METHODS)),
            default=default,
            show_default=otherwise or True,
            help="How several adapters become one: sum, or element by element: ties keeps the "
            "largest of each, and where signs differ one side; dare a random share of each; "
            "dare-ties both.",
        ),
        click.option(
            "--density",
            type=float,
            metavar="SHARE",
            help="Share of each adapter's elements that ties and dare keep.  "
            f"[default: {DEFAULT_DENSITY}]",
        ),
        click.option(
            "--combine-seed",
            type=int,
            default=0,
            show_default=True,
            help="Seed of the elements that dare keeps.",
        ),
    )

    return together(*flags)


def ignore() -> Callable[[_Command], _Command]:
    """``--ignore``, of modules of an adapter."""
    return click.option(
        "--ignore",
        multiple=True,
        metavar="PATTERN",
        help="Leave modules out of the adapter: a shell's pattern of their paths as its file names "
        "them, such as '*vision_tower*'. Repeat for more.",
    )


def gguf_path() -> Callable[[_Command], _Command]:
    """``--gguf-path``, of the commands that write nothing else."""
    return click.option(
        "--gguf-path", type=PATH, required=True, metavar="FILE", help="The GGUF file to write."
    )


def data(words: str, **more: Any) -> Callable[[_Command], _Command]:
    """``--data``."""
    return click.option("--data", type=PATH, metavar="FILE", help=words, **more)


def max_kl(words: str) -> Callable[[_Command], _Command]:
    """``--max-kl``, in nats a token."""
    return click.option("--max-kl", type=NOT_NEGATIVE, metavar="X", help=words)


def outtype(words: str) -> Callable[[_Command], _Command]:
    """``--outtype``, of a GGUF file."""
    kind = click.Choice(OUTTYPES)
    return click.option("--outtype", type=kind, default="auto", show_default=True, help=words)


def prompt_tokens(words: str, **more: Any) -> Callable[[_Command], _Command]:
    """``-p``."""
    kind = click.IntRange(min=1)
    return click.option("-p", "--prompt-tokens", type=kind, metavar="N", help=words, **more)


def generation_tokens(words: str, *, least: int = 1, **more: Any) -> Callable[[_Command], _Command]:
    """``-g``."""
    kind = click.IntRange(min=least)
    return click.option("-g", "--generation-tokens", type=kind, metavar="N", help=words, **more)


def trials(words: str, default: int) -> Callable[[_Command], _Command]:
    """``-n``."""
    return number("-n", "--num-trials", "trials", words=words, default=default)


def number(
    *names: str, words: str, default: float, least: int = 1
) -> Callable[[_Command], _Command]:
    """A number of something."""
    kind = click.IntRange(min=least)
    return click.option(
        *names, type=kind, default=default, show_default=True, metavar="N", help=words
    )


def seed(words: str) -> Callable[[_Command], _Command]:
    """``--seed``."""
    return click.option("--seed", type=int, default=0, show_default=True, help=words)


def revision(of: str = "base") -> Callable[[_Command], _Command]:
    """``--revision``, of what is read from the Hub."""
    return click.option("--revision", help=f"Branch, tag or commit of a Hub {of}.")


def overwrite(words: str) -> Callable[[_Command], _Command]:
    """``--overwrite``."""
    return click.option("--overwrite", is_flag=True, help=words)


def dry_run(words: str) -> Callable[[_Command], _Command]:
    """``--dry-run``."""
    return click.option("--dry-run", is_flag=True, help=words)


def as_json() -> Callable[[_Command], _Command]:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def trust_remote_code(
    words: str = "Run the model's own *.py files.",
) -> Callable[[_Command], _Command]:
    """``--trust-remote-code``."""
    return click.option("--trust-remote-code", is_flag=True, help=words)
