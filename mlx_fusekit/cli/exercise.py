"""``mlx-fusekit exercise``."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_fusekit import figures
from mlx_fusekit.cli import options, output
from mlx_fusekit.cli.failures import BELOW_THRESHOLD
from mlx_fusekit.cli.options import PATH
from mlx_fusekit.cli.streams import one_line, visible
from mlx_fusekit.exercise.options import Settings
from mlx_fusekit.exercise.texts import LANGUAGES, step, text
from mlx_fusekit.progress import StepProgress

if TYPE_CHECKING:
    from mlx_fusekit.tables import Table


@click.command("exercise")
@options.model("Your base: folder or Hub id.  [default: the embedded sample]")
@options.adapter_path("Your adapter for it: folder or Hub id.")
@click.option(
    "--out",
    type=PATH,
    default="exercise",
    show_default=True,
    metavar="DIR",
    help="Folder to make: report.md, report.json, pictures, both fused models.",
)
@options.overwrite("Replace an earlier exercise, your answer too.")
@click.option(
    "--lang",
    "language",
    type=click.Choice(LANGUAGES),
    default=LANGUAGES[0],
    show_default=True,
    help="Language of lesson and report.",
)
@options.number(
    "--adapters", words="How many adapters you use with this base.", default=Settings.adapters
)
@options.prompt_tokens(
    "Length of the prompt that is timed.", default=Settings.prompt_tokens, show_default=True
)
@options.generation_tokens(
    "Tokens to generate.", least=2, default=Settings.generation_tokens, show_default=True
)
@options.trials(
    "Timed generations of each model; a verdict needs at least 6.", default=Settings.trials
)
@options.data(
    "Text to compare the models on, as for verify.  [default: of the sample its unseen "
    "questions, else what base and adapter write]",
)
@options.ignore()
@options.seed("Of text, prompt and order.")
@options.trust_remote_code()
@click.option(
    "--check",
    "checked",
    type=PATH,
    metavar="REPORT.md",
    help="Tell whether a report is complete; exits with 3 if it is not.",
)
@click.option("--any-machine", is_flag=True, help="With --check: measured elsewhere is fine.")
@click.pass_context
def command(
    context: click.Context,
    /,
    checked: str | None,
    any_machine: bool,
    out: str,
    overwrite: bool,
    language: str,
    **options: Any,
) -> int:
    """The course exercise: is fusing worth losing swappability?

    Fuses an adapter with mlx_lm.fuse and with mlx-fusekit, compares both with base+adapter, times
    (a) base+adapter and (b) the fused model, and writes a report with your figures in which two
    sentences are left for you to write.

    \b
    mlx-fusekit exercise
    mlx-fusekit exercise --check exercise/report.md
    """  # noqa: D301 - click knows this backslash
    if checked is not None:
        _alone(context)
        return _check(Path(checked), any_machine=any_machine)
    if any_machine:
        raise click.UsageError("--any-machine goes with --check", context)
    if (options["model"] is None) != (options["adapter_path"] is None):
        raise click.UsageError(
            "--model and --adapter-path: give both, or neither for the sample", context
        )
    from mlx_fusekit.exercise import report
    from mlx_fusekit.exercise.lesson import run_lesson

    start, terminal = time.perf_counter(), _Terminal(language)
    run_lesson(Settings(**options), Path(out), language, terminal, overwrite=overwrite)
    written = Path(out) / report.NAME
    terminal.heading(text(language, "step_answer"))
    terminal.say(text(language, "question"))
    output.say(text(language, "written", path=written))
    output.say(text(language, "took", seconds=figures.in_seconds(time.perf_counter() - start)))
    output.say()
    output.say(text(language, "next"))
    output.say(f"  mlx-fusekit exercise --check {written}")
    return 0


def _alone(context: click.Context) -> None:
    """Refuse what --check would silently leave aside."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        mine = parameter.name in ("checked", "any_machine")
        if not mine and given is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[-1]}: leave it out beside --check", context)


def _check(path: Path, *, any_machine: bool) -> int:
    from mlx_fusekit.exercise.check import check_report

    found = check_report(path, any_machine=any_machine)
    if not found.complaints:
        output.say(text(found.language, "check_complete", name=path))
        return 0
    output.say(text(found.language, "check_incomplete", name=path))
    for line in found.complaints:
        output.say(f"- {line}")
    return BELOW_THRESHOLD


class _Terminal:
    """The lesson's audience."""

    def __init__(self, language: str) -> None:
        self._language = language
        self._console = output.stdout()
        self._warnings = output.stderr(markup=False)

    def heading(self, words: str) -> None:
        from rich.cells import cell_len

        words = one_line(words)
        width = min(cell_len(words), self._console.width)
        self._console.print(f"{words}\n{'-' * width}\n", style="bold")

    def say(self, words: str) -> None:
        from rich.text import Text

        # In bold what has backticks in the report; where nothing is bold, they stay.
        words = visible(words, output.BREAKS)
        pieces = words.split("`") if self._console.is_terminal else [words]
        bold = Text.assemble(*((piece, "bold" * (n % 2)) for n, piece in enumerate(pieces)))
        self._console.print(bold, end="\n\n")

    def show(self, table: "Table") -> None:
        output.print_table(table)
        self._console.print()

    def warn(self, words: str) -> None:
        label = text(self._language, "warning")
        self._warnings.print(f"{label}: {one_line(words)}\n", style="yellow", soft_wrap=True)

    @contextlib.contextmanager
    def watching(self, *, animated: bool = True) -> Iterator[StepProgress | None]:
        with output.steps_bar(animated=animated) as progress:
            if progress is None:
                yield None
                return

            def report(name: str, done: int, total: int) -> None:
                progress(step(self._language, name), done, total)

            yield report
