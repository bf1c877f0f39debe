"""``mlx-fusekit bench`` and ``mlx-fusekit bench report``."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlx_fusekit import launched
from mlx_fusekit.bench.options import Workload
from mlx_fusekit.cli import options, output
from mlx_fusekit.cli.failures import INTERRUPTED
from mlx_fusekit.cli.options import PATH
from mlx_fusekit.errors import ConfigurationError, OutputError
from mlx_fusekit.pictures import check_picture
from mlx_fusekit.reading import exists, is_file, read_bytes
from mlx_fusekit.writing.staging import write_file
from mlx_fusekit.writing.targets import FileTarget

if TYPE_CHECKING:
    from mlx_fusekit.bench.report import BenchReport

#: Of a file with a prompt, in bytes.
_LARGEST_PROMPT = 100_000_000
_csv = click.option("--csv", "csv_path", type=PATH, metavar="FILE", help="Write one line a trial.")
_plot = click.option(
    "--plot", "plot_path", type=PATH, metavar="FILE", help="Draw the trials: .png, .svg or .pdf."
)


@click.group("bench", invoke_without_command=True)
@options.model()
@options.adapter_path("Adapter that base+adapter runs with: folder or Hub id.")
@click.option(
    "--fused",
    type=PATH,
    multiple=True,
    metavar="[NAME=]PATH",
    help="A fused model: folder or Hub id. Repeat to time more, each under its name.",
)
@options.prompt_tokens(
    "Length of the prompt, in random tokens. Repeat for more lengths.  [default: 512]",
    multiple=True,
)
@options.generation_tokens(
    "Tokens to generate. Repeat for more lengths.  [default: 128]", multiple=True
)
@click.option("--prompt", metavar="TEXT", help="Prompt to time, put into the chat template.")
@click.option("--prompt-file", type=PATH, metavar="FILE", help="Prompt to time, from a text file.")
@options.trials("Timed generations of each model.", default=Workload.trials)
@options.number(
    "-b",
    "--batch-size",
    words="Sequences that generate together.",
    default=Workload.batch_size,
)
@options.number(
    "--prefill-step-size",
    "prefill_step",
    words="Tokens of a prompt that are processed at once.",
    default=Workload.prefill_step,
)
@click.option(
    "--delay",
    "delay_seconds",
    type=options.NOT_NEGATIVE,
    default=Workload.delay_seconds,
    metavar="S",
    help="Seconds to wait before each trial, for the machine to cool.",
)
@options.number(
    "--load-trials",
    words="Processes that load each model, for load time and memory.",
    default=Workload.load_trials,
    least=0,
)
@click.option("--skip-base", is_flag=True, help="Leave out the base by itself.")
@click.option(
    "--fuse-seconds",
    type=options.NOT_NEGATIVE,
    metavar="S",
    help="What fusing took, to see after how many tokens that is won back.",
)
@options.seed("Seed of prompts and order.")
@click.option(
    "--json", "json_path", type=PATH, metavar="FILE", help="Write all samples; - prints them."
)
@_csv
@_plot
@options.overwrite("Replace these files where they exist.")
@options.scale()
@options.ignore()
@options.revision()
@options.trust_remote_code("Run the models' own *.py files.")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> int | None:
    """Time base and adapter against fused models.

    All get the same prompt and generate the same number of tokens, greedily. After a warm-up they
    take turns in a balanced order. The table has medians, and how many times as fast each is as
    base+adapter, with a 95 % confidence interval. Ctrl-C keeps what was measured.

    \b
    mlx-fusekit bench --model M --adapter-path A --fused S -p 512 -g 128 -n 10
    mlx-fusekit bench report mac.json linux.json
    mlx.launch -n 2 -- mlx-fusekit bench --model M --fused S
    """  # noqa: D301 - click reads the backspace
    if context.invoked_subcommand is not None:
        _refuse_beside_a_command(context)
        return None
    if options["model"] is None:
        raise click.UsageError("Missing option '--model'.", context)
    if options["skip_base"] and options["adapter_path"] is None:
        raise click.UsageError("--skip-base goes with --adapter-path: nothing else is the base")
    files = _Files(*(options.pop(f"{kind}_path") for kind in ("json", "csv", "plot")))
    overwrite, read = options.pop("overwrite"), (options["prompt_file"],)
    with launched.together():
        if launched.first():
            files.check(overwrite=overwrite, read=read)
        workload, fused = _workload(options), _named(options.pop("fused"))
    return _run({"fused": fused, "workload": workload, **options}, files)


def _refuse_beside_a_command(context: click.Context) -> None:
    """Refuse what would silently be left aside."""
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[-1]}: give it behind {context.invoked_subcommand}, if that "
                "takes it",
                context,
            )


class _Files:
    """Where a report is written to."""

    def __init__(self, json_path: str | None, csv_path: str | None, plot_path: str | None) -> None:
        self.json, self.csv, self.plot = json_path, csv_path, plot_path

    def check(self, *, overwrite: bool, read: Sequence[str | None]) -> None:
        """Refuse what cannot be written, before anything is timed.

        Args:
            overwrite: whether files that exist may be replaced.
            read: files that are read, which may not.
        """
        taken = {Path(name).resolve(): name for name in read if name is not None}
        flags = {"--json": self.json, "--csv": self.csv, "--plot": self.plot}
        self._targets = {
            flag: FileTarget(Path(name).expanduser(), flag, overwrite)
            for flag, name in flags.items()
            if name is not None and (name != "-" or flag != "--json")
        }
        for flag, target in self._targets.items():
            target.check()
            if (real := target.path.resolve()) in taken:
                raise OutputError(
                    f"{flag} {target.path}: is the same file as {taken[real]}; choose another"
                )
            taken[real] = f"{flag} {target.path}"
        if self.plot is not None:
            check_picture(self.plot)

    def write(self, reports: Sequence["BenchReport"]) -> None:
        """Write them; of several, only the plot."""
        if self.json == "-":
            output.print_json(reports[0].as_json())
        elif self.json is not None:
            text = json.dumps(reports[0].as_json(), indent=1, ensure_ascii=False) + "\n"
            write_file(self._targets["--json"], text.encode())
        if self.csv is not None:
            write_file(self._targets["--csv"], reports[0].as_csv().encode())
        if self.plot is not None:
            from mlx_fusekit.bench import plots

            target = self._targets["--plot"]
            write_file(target, plots.picture(reports, target.path.suffix))


def _run(options: dict[str, Any], files: _Files) -> int:
    from mlx_fusekit.bench import tables
    from mlx_fusekit.bench.harness import benchmark

    first = launched.first()
    steps = output.steps_bar(animated=False) if first else contextlib.nullcontext()
    with launched.bounded_end(), steps as progress:
        report = benchmark(progress=progress, **options)
    if not first:
        return 0 if report.complete else INTERRUPTED
    for warning in report.warnings:
        output.warn(warning)
    with _tables_on_stderr() if files.json == "-" else contextlib.nullcontext():
        output.print_blocks(tables.all_tables(report))
    files.write([report])
    if report.complete:
        return 0
    output.warn("interrupted; what was measured until then is above, and marked as incomplete")
    return INTERRUPTED


def _workload(options: dict[str, Any]) -> Workload:
    """What the options ask for; they are taken out."""
    options["prompt"] = _prompt(options)
    asked = {field.name: options.pop(field.name) for field in fields(Workload)}
    for name in ("prompt_tokens", "generation_tokens"):
        asked[name] = asked[name] or getattr(Workload, name)
    return Workload(**asked)


@contextlib.contextmanager
def _tables_on_stderr() -> Iterator[None]:
    """For people who ask for JSON on stdout and watch the terminal."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _prompt(options: dict[str, Any]) -> str | None:
    text, file = options.pop("prompt"), options.pop("prompt_file")
    if text is not None and file is not None:
        raise click.UsageError("--prompt and --prompt-file: give one of them")
    if (text is not None or file is not None) and options["prompt_tokens"]:
        raise click.UsageError("-p makes a random prompt: leave it out beside --prompt")
    if file is None:
        return None if text is None else str(text)
    try:
        return read_bytes(Path(file), _LARGEST_PROMPT).decode("utf-8")
    except OSError as error:
        raise ConfigurationError(f"--prompt-file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"--prompt-file {file}: not UTF-8 text at byte {error.start}; convert it to UTF-8"
        ) from error


def _named(values: Sequence[str]) -> dict[str, str]:
    """Fused models by name; without a name, ``fused`` or the folder's."""
    named: dict[str, str] = {}
    for value in values:
        found = re.fullmatch(r"([^=/\\]+)=(.+)", value)
        if found and not exists(Path(value)):
            name, path = found.groups()
        else:
            path = value
            name = "fused" if len(values) == 1 else (Path(value).name or value)
        if name in named:
            raise click.UsageError(f"--fused {value}: {name} is taken; give it another NAME=")
        named[name] = path
    return named


@command.command("report")
@click.argument("files", type=PATH, nargs=-1, required=True, metavar="FILE.json ...")
@_csv
@_plot
@options.overwrite("Replace these files where they exist.")
def report_command(
    files: tuple[str, ...], csv_path: str | None, plot_path: str | None, overwrite: bool
) -> int:
    """Show saved runs again, and compare those of several machines."""
    from mlx_fusekit.bench import tables
    from mlx_fusekit.bench.report import read_report
    from mlx_fusekit.checkpoint.folder import read_json

    if csv_path is not None and len(files) > 1:
        raise click.UsageError("--csv takes one FILE.json")
    written = _Files(None, csv_path, plot_path)
    written.check(overwrite=overwrite, read=files)
    reports = {}
    for name in files:
        if not is_file(Path(name)):
            raise ConfigurationError(f"{name}: there is no such file")
        reports[name] = read_report(read_json(Path(name)), name)
    for name, report in reports.items():
        if len(reports) > 1:
            output.say(f"{name}\n")
        output.print_blocks(tables.all_tables(report))
    if len(reports) > 1:
        output.print_blocks((tables.comparison(reports), tables.PAIRED))
    written.write(list(reports.values()))
    return 0
