"""From a tiny model to layers of 70B: what fusing keeps, takes and survives as models grow.

    make bench-scale ARGS="models --out FOLDER --size 135m --size 0.5b"
    LD_PRELOAD=$(sh scripts/fast_blas.sh) python benchmarks/scale.py kills --out FOLDER

``models`` fuses adapters into bases of several sizes with ``mlx_lm.fuse`` and ``mlx-fusekit fuse``,
and measures what came out. ``steps`` does so with adapters of several ranks and learning rates, and
draws the distance against the size of the update in steps of the base's grid. ``layers`` fuses few
random layers of large shapes (Llama 8B and 70B, Qwen3-30B-A3B), one in memory at a time. ``kills``
kills fuses and runs the same command again. ``ranks`` shares one fuse among processes of
``mlx.launch``. ``model`` fits what calibrating costs, and predicts what was not fitted.

Each measurement is a JSON file under ``--out``: a run that was cut off goes on with those that are
missing, and the tables are made of what is there, of one commit only. ``--table`` measures nothing.

Models are downloaded, and adapters trained, at first use; ``sample`` is the embedded model, which
needs neither. Each fuse is a process of its own.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import scale_cost as cost
import scale_kills as kills
import scale_layers as layers
import scale_models as models
import scale_ranks as ranks
import scale_steps as steps
from contenders import progress
from preserve_results import BASE, PEER, TEACHER
from scale_cases import RANK, SIZES, TASKS, Subject
from scale_rows import Rows, commit

from mlx_fusekit.cli.output import print_blocks
from mlx_fusekit.pictures import SUFFIXES
from mlx_fusekit.requantize.effort import Rates, measured_rates
from mlx_fusekit.tables import Table

Blocks = Iterable[Table | str]

#: A Mac's rates. Models run on the GPU; 2.9 TFLOPS and 100 GB/s were measured (Huebner et al. 2025,
#: arXiv 2502.05317). Half of that for NumPy on the CPU, and 3 GB/s of files, are assumed.
APPLE_M4 = "Apple M4 (rates of solving and files assumed),2.9,1.45,100,3"


#: Options that decide what a row says.
DECIDING = ("items", "calibration_tokens", "memory", "seed")


def run_models(options: argparse.Namespace, rows: Rows) -> Blocks:
    """Fuse and measure each base and adapter."""
    for size in options.size or ("135m",):
        tasks = ("sql",) if size == "sample" else options.task or TASKS
        for task in tasks if not options.table else ():
            subject = Subject(size, task)
            names = models.names_for(subject)
            if options.contender:
                names = (TEACHER, *(name for name in names if name in options.contender))
            models.measure(rows, subject, names, options)
    yield models.table(rows.read(models.PART))


def run_steps(options: argparse.Namespace, rows: Rows) -> Blocks:
    """The same for several ranks and learning rates, and a picture."""
    sizes = options.size or ("135m",)
    for subject in () if options.table else _by_steps(sizes, options):
        if subject.size not in ("sample", "135m") and not subject.adapter.exists():
            progress(f"{subject.name}: left out, since {subject.adapter} is not trained")
            continue
        models.measure(rows, subject, (PEER, models.OURS), options)
    found = rows.read(models.PART)
    if options.plot:
        steps.draw(found, options.plot)
    yield steps.table(found)


def _by_steps(sizes: Sequence[str], options: argparse.Namespace) -> Iterable[Subject]:
    for size in sizes:
        if size == "sample":
            yield Subject(size)
            continue
        for task in options.task or ("sql",):
            for rank in options.rank or (2, RANK, 32):
                for rate in options.rate or (1e-5, 3e-5, 1e-4, 3e-4):
                    yield Subject(size, task, rank, rate)


def run_layers(options: argparse.Namespace, rows: Rows) -> Blocks:
    """Fuse few layers of large shapes."""
    for shape in () if options.table else options.shape or ("8b",):
        for count in options.layers or (1, 2):
            layers.measure(rows, shape, count, options)
    yield layers.table(rows.read(layers.PART))


def run_kills(options: argparse.Namespace, rows: Rows) -> Blocks:
    """Kill fuses, and run them again."""
    if not options.table:
        kills.measure(rows, Subject(options.size), options)
    yield kills.table(rows.read(kills.PART))


def run_ranks(options: argparse.Namespace, rows: Rows) -> Blocks:
    """Share fuses among processes."""
    for count in () if options.table else options.ranks or (1, 2, 4):
        for starter in options.start or ranks.STARTERS if count > 1 else ranks.STARTERS[:1]:
            ranks.measure(rows, Subject(options.size), count, starter, options)
    yield ranks.table(rows.read(ranks.PART))


def run_model(options: argparse.Namespace, rows: Rows) -> Blocks:
    """Fit the cost of calibrating; this measures the machine's rates, unless they are there."""
    found = rows.read(models.PART, layers.PART)
    if not options.table and not rows.has("rates", "here"):
        rows.keep("rates", "here", {"rates": asdict(measured_rates())})
    (told,) = rows.read("rates")
    rates = Rates(**told["rates"])
    fitting = cost.points(found, options.fit or ("135m", "0.5b"))
    fitted = cost.fit(fitting, rates, options.constants)
    yield from cost.fit_tables(fitting, fitted, rates)
    machines = [_stated(text) for text in options.machine or (APPLE_M4,)]
    yield from cost.prediction_tables(found, fitted, machines)


def _stated(text: str) -> Rates:
    try:
        return Rates.stated(text)
    except ValueError:
        wanted = "NAME,RUN_TFLOPS,SOLVE_TFLOPS,MEMORY_GBS,READ_GBS"
        raise SystemExit(f"--machine {text}: must be {wanted}") from None


PARTS: dict[str, Callable[[argparse.Namespace, Rows], Blocks]] = {
    "models": run_models,
    "steps": run_steps,
    "layers": run_layers,
    "kills": run_kills,
    "ranks": run_ranks,
    "model": run_model,
}


def main() -> None:
    """Measure one part, and print its tables."""
    options = _parser().parse_args()
    # Tables alone may be of any commit, so long as it is one.
    asked = {name: getattr(options, name) for name in DECIDING if hasattr(options, name)}
    rows = Rows(options.out.resolve(), None if options.table else commit(), asked)
    blocks = list(PARTS[options.part](options, rows))
    if options.markdown:
        blocks = [b if isinstance(b, str) else f"\n{b.markdown()}\n" for b in blocks]
    print_blocks(blocks)


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    made = {}
    for name, run in PARTS.items():
        made[name] = part = parts.add_parser(name, help=run.__doc__)
        part.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the rows")
        part.add_argument("--table", action="store_true", help="of the rows that are there")
        part.add_argument("--markdown", action="store_true", help="print Markdown tables")
        if name != "model":
            tokens = "--calibration-tokens"
            part.add_argument(tokens, type=int, metavar="N", help="default: the tool's")
    for name in ("models", "steps", "ranks"):
        made[name].add_argument("--items", type=int, metavar="N", help="test items; default: all")
    for name in ("models", "steps"):
        made[name].add_argument("--size", choices=SIZES, action="append", help="default: 135m")
        made[name].add_argument("--task", choices=TASKS, action="append")
        fits = "for calibrating; default: 2 GB at 0.5b, 3 GB at 1.5b, where all takes more"
        made[name].add_argument("--memory", metavar="SIZE", help=fits)
    for name in ("kills", "ranks"):
        made[name].add_argument("--size", choices=SIZES, default="sample")
    _add_own(made)
    return parser


def _add_own(made: dict[str, argparse.ArgumentParser]) -> None:
    """Options of one part only."""
    ways = (BASE, PEER, models.OURS, models.NO_DATA)
    made["models"].add_argument("--contender", choices=ways, action="append", help="default: all")
    made["steps"].add_argument("--rank", type=int, action="append", help="default: 2, 8, 32")
    rates = "default: 1e-5, 3e-5, 1e-4, 3e-4"
    made["steps"].add_argument("--rate", type=float, action="append", help=rates)
    made["steps"].add_argument("--plot", type=_picture, metavar="FILE", help="draw the picture")
    shapes = made["layers"].add_argument("--shape", choices=layers.SHAPES, action="append")
    shapes.help = "default: 8b"
    made["layers"].add_argument("--layers", type=int, action="append", help="default: 1, 2")
    memory = "default: enough for one layer at a time, and not for all"
    made["layers"].add_argument("--memory", metavar="SIZE", help=memory)
    made["kills"].add_argument("--runs", type=int, default=20, metavar="N")
    made["kills"].add_argument("--seed", type=int, default=0, help="of the moments")
    made["ranks"].add_argument("--ranks", type=int, action="append", help="default: 1, 2, 4")
    starters = made["ranks"].add_argument("--start", choices=ranks.STARTERS, action="append")
    starters.help = "who starts several ranks; default: both"
    fit, sizes = "sizes to fit to; default: 135m, 0.5b", (*SIZES, "tiny layers", "8b layers")
    made["model"].add_argument("--fit", choices=sizes, action="append", help=fit)
    counts = range(1, len(cost.GROUPINGS) + 1)
    made["model"].add_argument("--constants", type=int, choices=counts, help="default: what fits")
    machine = "rates of a machine to predict for: NAME,TFLOPS,TFLOPS,GB/s,GB/s"
    made["model"].add_argument("--machine", action="append", metavar="RATES", help=machine)


def _picture(name: str) -> Path:
    path = Path(name)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{name}: name a {', '.join(SUFFIXES)} file")
    return path


if __name__ == "__main__":
    main()
