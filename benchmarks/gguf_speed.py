"""Time and memory of exporting to GGUF: ``mlx-fusekit export-gguf`` beside ``cp`` and mlx-lm.

    python benchmarks/gguf_speed.py --size 1b --repeat 3
    python benchmarks/gguf_speed.py --size 8b --work /big/disk --json speed.json

Random Llama-shaped 4-bit checkpoints of 1 and 8 billion parameters, exported

- with ``--outtype auto``: 4-bit weights become Q4_1, bit by bit;
- with ``--outtype f16``, at 1b: what mlx-lm can write;
- by ``mlx_lm.fuse --dequantize --export-gguf``, at 1b: the only other program that makes a GGUF
  file of such a checkpoint. It merges an adapter too, on two linears of a layer, and writes a model
  folder of 16 bits before the file, which it cannot leave out.

``cp`` copies the file that the first makes. Each run is a process of its own; the contenders take
turns. Before each run what it reads is read once, so that all find it in the page cache, and
``os.sync()`` writes out what the run before left behind. After each run the time of another
``os.sync()`` is taken, since only mlx-fusekit waits for the disk itself; both together are the time
until the file is on the disk. ``times cp`` compares that, a byte of the file, with ``cp``.

Every file is checked (names, shapes, and the values of two tensors of ours) and deleted. Ends with
an error where exporting took more than 1 GB of memory. Needs free disk space for a checkpoint and
two files: 2.4 GB at 1b without mlx-lm, 6.4 GB with it, 14.6 GB at 8b.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import llama_checkpoints as checkpoints
import speed
from processes import Cost, apart, measure, median, program

from mlx_fusekit.tables import Table

OURS, OURS_F16 = "mlx-fusekit export-gguf", "the same, --outtype f16"
COPY, PEER = "cp of its file", "mlx_lm.fuse --export-gguf"
ADAPTER = "qv"
#: The sizes at which 16-bit files are made.
F16_SIZES = ("1b",)
MOST_BYTES = 10**9
PACKAGES = ("mlx-fusekit", "gguf", "mlx", "mlx-lm", "numpy")
#: Largest error of a weight that is rounded to float16, relative to it.
_HALF = 2.0**-11


@dataclass(frozen=True)
class Sample(Cost):
    """One run of one contender.

    Attributes:
        written_bytes: size of the GGUF file.
    """

    size: str
    contender: str
    written_bytes: int

    @property
    def disk_seconds(self) -> float:
        """Until the file was on the disk."""
        return self.wall_seconds + self.sync_seconds


@dataclass(frozen=True)
class Contender:
    """A way to a GGUF file.

    Attributes:
        command: program and arguments.
        sources: what it reads.
        file: what it writes.
    """

    command: list[str]
    sources: list[Path]
    file: Path


def main() -> None:
    assert __doc__
    chosen = speed.options(__doc__, "--skip-f16", "leave out 16 bits and mlx-lm")
    measured = partial(_measure, repeat=chosen.repeat, f16=not chosen.skip)
    for sample in speed.run(chosen, PACKAGES, measured, _table):
        if sample.contender in (OURS, OURS_F16) and sample.peak_bytes > MOST_BYTES:
            raise SystemExit(f"{sample.size}: {sample.contender} took {sample.peak_bytes:,} bytes")


def _measure(size: str, work: Path, *, repeat: int, f16: bool) -> Iterator[Sample]:
    """Samples of all contenders, which take turns."""
    base, scratch = checkpoints.model_folder(work, size), work / "exported"
    contenders = _contenders(base, checkpoints.adapter_folder(work, size, ADAPTER), scratch)
    if size not in F16_SIZES or not f16:
        contenders = {name: contenders[name] for name in (OURS, COPY)}
    for _ in range(repeat):
        try:
            scratch.mkdir()
            for name, contender in contenders.items():
                yield _sample(size, name, contender, base)
        finally:
            shutil.rmtree(scratch)


def _contenders(base: Path, adapter: Path, scratch: Path) -> dict[str, Contender]:
    """All of them, in an order in which each finds what it needs."""
    export = [program("mlx-fusekit"), "export-gguf", "--model", str(base), "--gguf-path"]
    fuse = [program("mlx_lm.fuse"), "--model", str(base), "--adapter-path", str(adapter)]
    ours, copy, wide = (scratch / f"{name}.gguf" for name in ("ours", "copy", "wide"))
    folder = scratch / "fused"
    peer = [*fuse, "--save-path", str(folder), "--dequantize", "--export-gguf"]
    return {
        OURS: Contender([*export, str(ours)], [base], ours),
        COPY: Contender(["cp", str(ours), str(copy)], [ours], copy),
        OURS_F16: Contender([*export, str(wide), "--outtype", "f16"], [base], wide),
        PEER: Contender(peer, [base, adapter], folder / "ggml-model-f16.gguf"),
    }


def _sample(size: str, name: str, contender: Contender, base: Path) -> Sample:
    file = contender.file
    cost = measure(contender.command, contender.sources, file.parent.with_name("run.log"))
    apart(_check, base, file, {OURS_F16: _HALF, PEER: None}.get(name, 0.0))
    nbytes = file.stat().st_size
    if name == PEER:
        shutil.rmtree(file.parent)
    elif name != OURS:  # whose file is copied next
        file.unlink()
    print(f"{size} {name:25} {cost}", file=sys.stderr, flush=True)
    return Sample(**asdict(cost), size=size, contender=name, written_bytes=nbytes)


def _check(base: Path, file: Path, tolerance: float | None) -> None:
    """Raise where a file is not the base.

    Args:
        tolerance: largest relative error of a value; None where an adapter was merged in.
    """
    import gguf
    import mlx.core as mx
    import numpy as np

    mx.set_default_device(mx.cpu)
    stored = {}
    for path in base.glob("model*.safetensors"):
        stored |= mx.load(str(path))
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    modules = {name.removesuffix(".weight") for name in stored if name.endswith(".weight")}
    if len(written) != len(modules):
        raise AssertionError(f"{file}: {len(written)} tensors of {len(modules)}")
    for module, name in (("mlp.down_proj", "ffn_down"), ("self_attn.o_proj", "attn_output")):
        weight, scales, biases = (
            stored[f"model.layers.3.{module}.{leaf}"] for leaf in ("weight", "scales", "biases")
        )
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        truth = np.array(
            mx.dequantize(weight, scales, biases, checkpoints.GROUP_SIZE, checkpoints.BITS)
        )
        tensor = written[f"blk.3.{name}.weight"]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if found.shape != truth.shape:
            raise AssertionError(f"{file}: {name} has shape {found.shape}")
        if tolerance is not None and (np.abs(found - truth) > tolerance * np.abs(truth)).any():
            raise AssertionError(f"{file}: {name} has other values")


def _table(size: str, samples: Sequence[Sample]) -> Table:
    """Medians of each contender."""
    header = ("contender", "file GB", "wall s", "CPU s", "on disk s", "peak MB", "times cp")
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.contender, []).append(sample)
    copy = _seconds_per_byte(groups[COPY])
    rows = [
        (
            name,
            f"{group[0].written_bytes / 1e9:.2f}",
            f"{median(group, 'wall_seconds'):.1f}",
            f"{median(group, 'cpu_seconds'):.1f}",
            f"{median(group, 'disk_seconds'):.1f}",
            f"{median(group, 'peak_bytes') / 1e6:.0f}",
            f"{_seconds_per_byte(group) / copy:.1f}" if name != COPY else "",
        )
        for name, group in groups.items()
    ]
    repeats = len(samples) // len(groups)
    return Table(speed.title(size, repeats), header, rows, text_columns=1)


def _seconds_per_byte(group: Sequence[Sample]) -> float:
    return median(group, "disk_seconds") / group[0].written_bytes


if __name__ == "__main__":
    main()
