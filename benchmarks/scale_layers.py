"""Single layers of large models: random 4-bit weights, an adapter on all seven linears.

The shapes are those of Llama 8B and 70B, and of Qwen3-30B-A3B with its 128 experts a layer.
A model has one layer more than are solved, which the adapter does not touch: only where layers are
more than one can one at a time be in memory. The difference between two rows is a layer's cost.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import llama_checkpoints as checkpoints
import numpy as np
from contenders import Contender, fuse_apart, progress, remove
from llama_checkpoints import Shape
from processes import apart
from scale_cases import planned, streaming_memory
from scale_models import ours_command
from scale_rows import Facts, Rows

from mlx_fusekit import samples
from mlx_fusekit.requantize.effort import shapes_of
from mlx_fusekit.requantize.needs import memory_needs
from mlx_fusekit.requantize.options import CALIBRATION_TOKENS
from mlx_fusekit.tables import Table

PART = "layers"
#: The sample's, whose tokenizer these models have.
_VOCABULARY = 1024
SHAPES = {
    "tiny": Shape(256, 1, 896, 4, 2, _VOCABULARY, tied=True),
    "tiny experts": Shape(256, 1, 128, 4, 2, _VOCABULARY, tied=True, experts=8, used=2),
    "8b": Shape(4096, 1, 14336, 32, 8, _VOCABULARY, tied=True),
    "70b": Shape(8192, 1, 28672, 64, 8, _VOCABULARY, tied=True),
    "30b-a3b": Shape(2048, 1, 768, 32, 4, _VOCABULARY, True, head_width=128, experts=128, used=8),
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def measure(rows: Rows, name: str, layers: int, options: argparse.Namespace) -> None:
    """Fuse a model of some layers of a shape, unless there is a row of it."""
    row = f"{name}-{layers}"
    if rows.has(PART, row):
        return
    tokens = options.calibration_tokens or CALIBRATION_TOKENS
    rows.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=rows.folder) as scratch:
        work = Path(scratch).resolve()
        base, adapter, text = work / "base", work / "adapter", work / "text.txt"
        # Apart, so that what the fuse starts from is a small process.
        apart(write, SHAPES[name], layers, tokens, work)
        memory = options.memory or str(streaming_memory(base, adapter, tokens))
        command = (*ours_command(tokens), "--memory", memory, "--calibration", str(text))
        cost = fuse_apart(Contender(row, command, data=True), base, adapter, work / "fused")
        remove(work / "fused")
        progress(f"{row}: {cost.wall_seconds:.1f} s, {cost.peak_bytes / 1e6:.0f} MB")
        plan = planned(base, adapter)
        facts = {
            "shape": name,
            "layers": layers,
            "memory": memory,
            "cost": asdict(cost),
            "shapes": shapes_of(plan),
            "needs": asdict(memory_needs(plan, tokens)),
        }
        rows.keep(PART, row, facts)


def write(shape: Shape, layers: int, tokens: int, work: Path) -> None:
    """Write base, adapter and calibration text."""
    shape = replace(shape, layers=layers + 1)
    checkpoints.replace(work / "base", partial(checkpoints.write_model, shape=shape))
    for name in _TOKENIZER:
        shutil.copyfile(samples.model_path() / name, work / "base" / name)
    write_adapter = partial(
        checkpoints.write_adapter, shape=shape, keys=shape.linears, layers=layers
    )
    checkpoints.replace(work / "adapter", write_adapter)
    (work / "text.txt").write_text(_random_text(tokens), "utf-8")


def _random_text(tokens: int) -> str:
    """Random tokens of the sample's vocabulary as text, enough to hold some aside."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(samples.model_path() / "tokenizer.json"))
    drawn = np.random.default_rng(0).integers(0, tokenizer.get_vocab_size(), 2 * tokens)
    text: str = tokenizer.decode([int(token) for token in drawn], skip_special_tokens=True)
    return text.replace("\0", " ")  # the byte is in the vocabulary, and in no text


def table(rows: Iterable[Facts]) -> Table:
    """A shape's rows, and the difference between neighbours by the layers between them."""
    by_shape: dict[str, list[Facts]] = {}
    for row in rows:
        by_shape.setdefault(row["shape"], []).append(row)
    cells = []
    for name, found in by_shape.items():
        found.sort(key=lambda row: row["layers"])
        cells += [_cells(name, str(row["layers"]), row["cost"], row) for row in found]
        for fewer, more in pairwise(found):
            count = more["layers"] - fewer["layers"]
            fields = ("wall_seconds", "cpu_seconds", "peak_bytes")
            one = {f: (more["cost"][f] - fewer["cost"][f]) / count for f in fields}
            cells.append(_cells(name, f"a layer ({fewer['layers']} to {more['layers']})", one))
    header = ("shape", "layers", "seconds", "CPU seconds", "peak MB", "estimate MB")
    return Table("", (*header, "a layer at a time", "tokens"), cells, text_columns=2)


def _cells(name: str, layers: str, cost: Facts, row: Facts | None = None) -> tuple[str, ...]:
    took = (f"{cost['wall_seconds']:.1f}", f"{cost['cpu_seconds']:.1f}")
    cells = (name, layers, *took, f"{cost['peak_bytes'] / 1e6:.0f}")
    if row is None:
        return (*cells, "", "", "")
    calibration = cost["report"]["calibration"]
    streamed = calibration["streamed"]
    estimate = row["needs"]["streamed" if streamed else "resident"] / 1e6
    return (*cells, f"{estimate:.0f}", "yes" if streamed else "no", str(calibration["tokens"]))
