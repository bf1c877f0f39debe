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

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import llama_checkpoints as checkpoints

OURS, PEER, COPY = "mlx-fusekit", "mlx_lm.fuse", "cp -r"
_CHUNK = 16 << 20
#: ru_maxrss is in bytes on macOS and in KiB elsewhere.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Sample:
    """One run of one contender.

    Attributes:
        wall_seconds: from starting the process to its end.
        cpu_seconds: of all its threads, user and system.
        sync_seconds: what ``os.sync()`` took afterwards.
        peak_bytes: largest resident memory.
        load_average: of the machine over the minute before the run.
    """

    size: str
    adapter: str
    contender: str
    wall_seconds: float
    cpu_seconds: float
    sync_seconds: float
    peak_bytes: int
    load_average: float


def main() -> None:
    options = _options()
    sizes = list(checkpoints.SHAPES) if options.size == "all" else [options.size]
    samples: list[Sample] = []
    with _work_folder(options.work, keep=options.keep) as work:
        for size in sizes:
            _apart(checkpoints.make_all, size, work)
            of_size = list(_measure(size, work, options.repeat, peer=not options.skip_peer))
            print(_table(size, of_size), flush=True)
            samples += of_size
            if not options.keep and options.work is None:
                shutil.rmtree(checkpoints.model_folder(work, size))
    if options.json:
        report = {"environment": _environment(), "samples": [asdict(s) for s in samples]}
        options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=[*checkpoints.SHAPES, "all"], default="all")
    parser.add_argument("--work", type=Path, help="folder to work in; checkpoints there are reused")
    parser.add_argument("--keep", action="store_true", help="keep the temporary work folder")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each contender")
    parser.add_argument("--skip-peer", action="store_true", help="leave mlx_lm.fuse out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to a file")
    return parser.parse_args()


@contextmanager
def _work_folder(chosen: Path | None, *, keep: bool) -> Iterator[Path]:
    """The user's folder, which is kept, or a temporary one, which is not unless asked."""
    work = chosen or Path(tempfile.mkdtemp(prefix="fuse-speed-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work.resolve()
    finally:
        if chosen is None and keep:
            print(f"kept {work}", file=sys.stderr)
        elif chosen is None:
            shutil.rmtree(work, ignore_errors=True)


def _measure(size: str, work: Path, repeat: int, *, peer: bool) -> Iterator[Sample]:
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
        PEER: [_program("mlx_lm.fuse"), *fuse],
        OURS: [_program("mlx-fusekit"), "fuse", "--requantize", "nearest", *fuse],
    }


def _program(name: str) -> str:
    """A command of the environment this script runs in."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed beside {sys.executable}")
    return found


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
        os.sync()
        _read_all(base)
        _read_all(adapter_folder)
        load = os.getloadavg()[0]
        wall, cpu, peak = _run(command, target.with_name("run.log"))
        start = time.perf_counter()
        os.sync()
        synced = time.perf_counter() - start
        _apart(_check, base, adapter_folder, target, contender == COPY)
    finally:
        _remove(target)
    print(
        f"{size} {adapter:4} {contender:12} {wall:7.1f} s wall {cpu:7.1f} s CPU"
        f" {synced:6.1f} s to sync {peak / 1e6:7.0f} MB   load {load:.1f}",
        file=sys.stderr,
        flush=True,
    )
    return Sample(size, adapter, contender, wall, cpu, synced, peak, load)


def _run(command: list[str], log: Path) -> tuple[float, float, int]:
    """Run a command to its end: wall seconds, CPU seconds, peak resident bytes.

    On Linux a child's peak counts what its parent held before the exec, so this process imports
    and holds little: whatever needs NumPy or MLX is done :func:`_apart`.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text("utf-8", "replace")[-4000:]
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    log.unlink()
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _RSS_UNIT


def _apart(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def _read_all(folder: Path) -> None:
    """Bring a folder's files into the page cache."""
    buffer = bytearray(_CHUNK)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


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


def _table(size: str, samples: Sequence[Sample]) -> str:
    """Medians of each contender, and their ratios, as a Markdown table."""
    header = ("adapter", "contender", "wall s", "CPU s", "sync after s", "peak MB", "ours : this")
    rows = [header, tuple("-" * len(name) for name in header)]
    for adapter in checkpoints.ADAPTERS:
        groups = {
            contender: [s for s in samples if (s.adapter, s.contender) == (adapter, contender)]
            for contender in (COPY, PEER, OURS)
        }
        ours = _median(groups[OURS], "wall_seconds")
        for contender, group in groups.items():
            if group:
                wall = _median(group, "wall_seconds")
                rows.append(
                    (
                        adapter,
                        contender,
                        f"{wall:.1f}",
                        f"{_median(group, 'cpu_seconds'):.1f}",
                        f"{_median(group, 'sync_seconds'):.1f}",
                        f"{_median(group, 'peak_bytes') / 1e6:.0f}",
                        f"{ours / wall:.2f}" if contender != OURS else "",
                    )
                )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    repeats = len(samples) // len({(s.adapter, s.contender) for s in samples})
    lines = [f"Llama {size}, 4 bits, group 64; warm page cache; median of {repeats}", ""]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _median(samples: Sequence[Sample], field: str) -> float:
    return float(statistics.median(getattr(sample, field) for sample in samples))


def _environment() -> dict[str, object]:
    packages = ("mlx-fusekit", "mlx", "mlx-lm", "numpy")
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "page_cache": "warm: the base's files are read once before each run",
    }


if __name__ == "__main__":
    main()
