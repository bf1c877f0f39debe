"""Time and memory of fusing: ``mlx-fusekit fuse`` against ``mlx_lm.fuse`` and ``cp -r``.

    python benchmarks/fuse_speed.py --size 1b --repeat 3
    python benchmarks/fuse_speed.py --size all --work /big/disk --keep --json speed.json

Random Llama-shaped 4-bit checkpoints of 1 and 8 billion parameters, and two adapters for each:
rank 8 on the seven linears of the last 16 layers ("all"), and on their q_proj and v_proj only
("qv"). Each run is a process of its own; the contenders take turns. Before each run the base's
files are read once, so that all find them in the page cache, and ``os.sync()`` writes out what the
run before left behind. After each run the time of another ``os.sync()`` is taken: only
mlx-fusekit waits for the disk itself, the others leave that to the system.

Every output is checked (tensor names, dtypes and shapes, an untouched tensor's bytes, a merged
weight's values) and deleted. Needs free disk space for a checkpoint and one copy: 1.4 GB at 1b,
9.1 GB at 8b.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import llama_checkpoints as checkpoints
import speed
from processes import Cost, apart, measure, median, program

from mlx_fusekit.tables import Table

OURS, PEER, COPY = "mlx-fusekit", "mlx_lm.fuse", "cp -r"
PACKAGES = ("mlx-fusekit", "mlx", "mlx-lm", "numpy")


@dataclass(frozen=True)
class Sample(Cost):
    """One run of one contender."""

    size: str
    adapter: str
    contender: str


def main() -> None:
    assert __doc__
    chosen = speed.options(__doc__, "--skip-peer", "leave mlx_lm.fuse out")
    measured = partial(_measure, repeat=chosen.repeat, peer=not chosen.skip)
    speed.run(chosen, PACKAGES, measured, _table)


def _measure(size: str, work: Path, *, repeat: int, peer: bool) -> Iterator[Sample]:
    """Samples of all contenders, which take turns."""
    base = checkpoints.model_folder(work, size)
    for _ in range(repeat):
        for adapter in checkpoints.ADAPTERS:
            folder = checkpoints.adapter_folder(work, size, adapter)
            for contender, command in _commands(base, folder, work / "fused").items():
                if contender != PEER or peer:
                    yield _sample(size, adapter, contender, command, (base, folder, work / "fused"))


def _commands(base: Path, adapter: Path, target: Path) -> dict[str, list[str]]:
    fuse = ["--model", str(base), "--adapter-path", str(adapter), "--save-path", str(target)]
    return {
        COPY: ["cp", "-r", str(base), str(target)],
        PEER: [program("mlx_lm.fuse"), *fuse],
        OURS: [program("mlx-fusekit"), "fuse", "--requantize", "nearest", *fuse],
    }


def _sample(
    size: str,
    adapter: str,
    contender: str,
    command: list[str],
    folders: tuple[Path, Path, Path],
) -> Sample:
    base, adapter_folder, target = folders
    _remove(target)
    try:
        cost = measure(command, (base, adapter_folder), target.with_name("run.log"))
        apart(_check, base, adapter_folder, target, contender == COPY)
    finally:
        _remove(target)
    print(f"{size} {adapter:4} {contender:12} {cost}", file=sys.stderr, flush=True)
    return Sample(**asdict(cost), size=size, adapter=adapter, contender=contender)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _check(base: Path, adapter: Path, fused: Path, copied: bool) -> None:
    """Raise where a folder is not the base with the adapter merged in.

    Args:
        copied: whether it must be the plain base instead.
    """
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    before, after = _load(base), _load(fused)
    described = [{k: (v.shape, v.dtype) for k, v in m.items()} for m in (before, after)]
    if described[0] != described[1] or not (fused / "config.json").exists():
        raise AssertionError(f"{fused}: other tensors or files than {base}")
    if not mx.array_equal(before["model.norm.weight"], after["model.norm.weight"]):
        raise AssertionError(f"{fused}: an untouched tensor differs")
    updates = _load(adapter, "adapters.safetensors")
    touched = {name.rpartition(".")[0] for name in updates}
    for module in (min(touched), max(touched)):
        delta = (updates[f"{module}.lora_a"] @ updates[f"{module}.lora_b"]).T
        delta = checkpoints.LORA_SCALE * delta
        change = _weight(after, module) - _weight(before, module)
        # Rounding to nearest loses most of a small update, but leaves a trace of it in the mean of
        # millions of weights, and no mean error above half a step.
        kept = float((change * delta).sum() / (delta * delta).sum())
        error = float(mx.abs(change - delta).mean())
        step = float(mx.abs(before[f"{module}.scales"].astype(mx.float32)).mean())
        if (copied and kept) or (not copied and (kept < 0.05 or error > step / 2)):
            raise AssertionError(f"{fused}: {module} holds {kept:.1%} of its update")


def _load(folder: Path, pattern: str = "model*.safetensors") -> dict[str, Any]:
    """All tensors of a folder's files, lazily, by name."""
    import mlx.core as mx

    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob(pattern)):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        tensors |= loaded
    return tensors


def _weight(tensors: dict[str, Any], module: str) -> Any:
    """A module's weight, dequantized in float32."""
    import mlx.core as mx

    codes, scales, biases = (tensors[f"{module}.{leaf}"] for leaf in ("weight", "scales", "biases"))
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(codes, scales, biases, checkpoints.GROUP_SIZE, checkpoints.BITS)


def _table(size: str, samples: Sequence[Sample]) -> Table:
    """Medians of each contender, and their ratios."""
    header = ("adapter", "contender", "wall s", "CPU s", "sync after s", "peak MB", "ours : this")
    rows = []
    for adapter in checkpoints.ADAPTERS:
        groups = {
            contender: [s for s in samples if (s.adapter, s.contender) == (adapter, contender)]
            for contender in (COPY, PEER, OURS)
        }
        ours = median(groups[OURS], "wall_seconds")
        for contender, group in groups.items():
            if group:
                wall = median(group, "wall_seconds")
                rows.append(
                    (
                        adapter,
                        contender,
                        f"{wall:.1f}",
                        f"{median(group, 'cpu_seconds'):.1f}",
                        f"{median(group, 'sync_seconds'):.1f}",
                        f"{median(group, 'peak_bytes') / 1e6:.0f}",
                        f"{ours / wall:.2f}" if contender != OURS else "",
                    )
                )
    repeats = len(samples) // len({(s.adapter, s.contender) for s in samples})
    return Table(speed.title(size, repeats), header, rows, text_columns=2)


if __name__ == "__main__":
    main()
