"""What the benchmarks of time and memory have in common: options, and sizes one after the other."""

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import llama_checkpoints as checkpoints
from processes import Cost, apart, environment, work_folder

from mlx_fusekit.tables import Table

Sample = TypeVar("Sample", bound=Cost)


def options(description: str, skip: str, skipped: str) -> argparse.Namespace:
    """What the user asked for.

    Args:
        description: the benchmark's docstring.
        skip: a flag that leaves something out.
        skipped: what it leaves out, for the help.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=[*checkpoints.SHAPES, "all"], default="all")
    parser.add_argument("--work", type=Path, help="folder to work in; checkpoints there are reused")
    parser.add_argument("--keep", action="store_true", help="keep the temporary work folder")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each contender")
    parser.add_argument(skip, action="store_true", dest="skip", help=skipped)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to a file")
    return parser.parse_args()


def run(
    chosen: argparse.Namespace,
    packages: Sequence[str],
    measure: Callable[[str, Path], Iterable[Sample]],
    table: Callable[[str, Sequence[Sample]], Table],
) -> list[Sample]:
    """Make the checkpoints of each size, measure, and print a table in Markdown.

    Args:
        chosen: as :func:`options` gives them.
        packages: whose versions are written into the JSON file.
        measure: from a size and the folder to work in to samples.
        table: from a size and its samples.
    """
    sizes = list(checkpoints.SHAPES) if chosen.size == "all" else [chosen.size]
    samples: list[Sample] = []
    with work_folder(chosen.work, keep=chosen.keep) as work:
        for size in sizes:
            apart(checkpoints.make_all, size, work)
            of_size = list(measure(size, work))
            drawn = table(size, of_size)
            print(f"{drawn.title}\n\n{drawn.markdown()}\n", flush=True)
            samples += of_size
            if not chosen.keep and chosen.work is None:
                shutil.rmtree(checkpoints.model_folder(work, size))
    if chosen.json:
        report = {"environment": environment(*packages), "samples": [asdict(s) for s in samples]}
        chosen.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return samples


def title(size: str, repeats: int) -> str:
    """What a table is about."""
    return f"Llama {size}, 4 bits, group 64; warm page cache; median of {repeats}"
