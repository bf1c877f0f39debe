"""Fuzz the readers with atheris, each in a process of its own: ``make fuzz``.

Runs begin with the committed corpus, and end with a table: runs, coverage, findings. A finding is
an error that is none of ours or has several lines, 5 s, or 300 MB; each is saved once, beside its
traceback, and the run goes on.

    python tests/fuzz/fuzz.py --runs 1000000 --seed 7
    python tests/fuzz/fuzz.py adapter --replay build/fuzz/adapter/finding-0123456789
"""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import re
import resource
import subprocess
import sys
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]

CORPUS = HERE / "corpus"
BUILD = ROOT / "build" / "fuzz"
#: Of 100 runs, how many each target gets: the more, the more its reader decides.
SHARES = {
    "header": 20,
    "index": 2,
    "config": 10,
    "adapter": 18,
    "data": 14,
    "tokenizer": 12,
    "sentencepiece": 8,
    "gguf": 8,
    "report": 8,
}
_LONGEST_INPUT = 16384
#: Of address space that a target may take beyond what the packages hold.
_ROOM_BYTES = 4_000_000_000
#: Where the input of the moment is, for when the process does not outlive it.
_CURRENT = "current"
#: For what waits without working, in s; the rest is told apart by processor time.
_HANG_SECONDS = 60


@dataclass(frozen=True)
class Result:
    """What came of one target."""

    target: str
    runs: int
    coverage: int
    corpus: int
    seconds: float
    findings: tuple[str, ...]


def main() -> None:
    """Fuzz, replay one input, or be the process of one target."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of files.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(SHARES))
    parser.add_argument("--runs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replay", type=Path, help="an input of the one target that is named")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    names = asked.targets or list(SHARES)
    if unknown := set(names) - set(SHARES):
        parser.error(f"there is no target {', '.join(unknown)}; there are {', '.join(SHARES)}")
    if asked.child:
        _fuzz_here(names[0], asked.runs, asked.seed)
    elif asked.replay:
        from fuzz.targets import run

        run(names[0], asked.replay.read_bytes())
    elif importlib.util.find_spec("atheris") is None:
        sys.exit(
            "error: fuzzing needs atheris, of which there are builds for Linux on x86-64 only; "
            "the committed corpus is read everywhere: make test ARGS=tests/fuzz"
        )
    else:
        sys.exit(_fuzz_all(names, asked.runs, asked.seed, asked.jobs))


def _fuzz_all(names: list[str], runs: int, seed: int, jobs: int) -> int:
    whole = sum(SHARES[name] for name in names)
    shares = {name: runs * SHARES[name] // whole for name in names}
    shares[names[0]] += runs - sum(shares.values())
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda name: _fuzz_apart(name, shares[name], seed), names))
    print(f"{'target':14}{'runs':>10}{'edges':>8}{'inputs':>8}{'s':>7}  findings")
    for r in results:
        row = f"{r.target:14}{r.runs:10,}{r.coverage:8,}{r.corpus:8,}{r.seconds:7.0f}"
        print(f"{row}  {len(r.findings)}")
    done = sum(r.runs for r in results)
    found = [finding for result in results for finding in result.findings]
    print(f"{'all':14}{done:10,}{'':16}{'':7}  {len(found)}")
    for line in found:
        print(line)
    if done < runs:
        print(f"error: {runs:,} runs were asked for")
    return int(bool(found) or done < runs)


def _fuzz_apart(name: str, runs: int, seed: int) -> Result:
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*-*"):
        old.unlink()
    start = time.monotonic()
    command = [sys.executable, __file__, name, "--child", f"--runs={runs}", f"--seed={seed}"]
    log = folder / "log.txt"
    with open(log, "w") as output:
        code = subprocess.run(
            command, stdout=output, stderr=output, cwd=ROOT, check=False
        ).returncode
    done = coverage = corpus = 0
    with open(log, errors="replace") as lines:
        for line in lines:
            if told := re.match(r"#(\d+)\s.* cov: (\d+) ft: \d+ corp: (\d+)", line):
                done, coverage, corpus = map(int, told.groups())
            elif told := re.match(r"Done (\d+) runs", line):
                done = int(told[1])
    findings = [
        f"{name}: {path.relative_to(ROOT)}: {_last_line(path.with_suffix('.txt'))}"
        for path in sorted(folder.glob("*-*"))
        if path.suffix != ".txt"
    ]
    if code:
        saved = (folder / _CURRENT).rename(folder / "ended-here").relative_to(ROOT)
        findings.append(f"{name}: {saved}: the process ended with {code}; see log.txt beside it")
    return Result(name, done, coverage, corpus, time.monotonic() - start, tuple(findings))


def _last_line(path: Path) -> str:
    lines = path.read_text().strip().splitlines() if path.is_file() else []
    return lines[-1] if lines else "libFuzzer ended here"


def _fuzz_here(name: str, runs: int, seed: int) -> None:
    import atheris

    for package in ("mlx_lm.utils", "transformers", "gguf", "huggingface_hub", "rich", "jinja2"):
        __import__(package)
    with atheris.instrument_imports(include=["mlx_fusekit"]):
        from fuzz import targets
    from fuzz.mutate import mutated_json

    folder, seen = BUILD / name, set[str]()
    current = os.open(folder / _CURRENT, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)

    def one_input(content: bytes) -> None:
        os.ftruncate(current, os.pwrite(current, content, 0))
        try:
            targets.run(name, content)
        except BaseException as error:  # noqa: BLE001  # SystemExit too is a finding
            _save(folder, content, error, seen)

    def mutate(content: bytes, longest: int, seed: int) -> bytes:
        if seed % 2:
            parts = content.split(targets.DIVIDER)
            place = seed // 2 % len(parts)
            head, line, rest = _line_of(parts[place], seed)
            if (changed := mutated_json(line, seed)) is not None:
                parts[place] = head + changed + rest
                return targets.DIVIDER.join(parts)[:longest]
        changed_bytes: bytes = atheris.Mutate(content, longest)
        return changed_bytes

    targets.run(name, b"")  # what is loaded and made once counts for no input
    _limit_memory()
    flags = [
        f"-runs={runs}",
        f"-seed={seed}",
        f"-max_len={_LONGEST_INPUT}",
        f"-timeout={_HANG_SECONDS}",
        f"-artifact_prefix={folder}/",
        f"-dict={HERE / 'json.dict'}",
        "-report_slow_units=1000",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
    ]
    found = BUILD / name / "corpus"
    found.mkdir(exist_ok=True)
    folders = [str(found), *(str(CORPUS / name) for _ in range((CORPUS / name).is_dir()))]
    arguments = [sys.argv[0], *flags, *folders]
    atheris.Setup(arguments, one_input, custom_mutator=mutate)
    atheris.Fuzz()


def _line_of(content: bytes, seed: int) -> tuple[bytes, bytes, bytes]:
    """What stands before one of several lines, the line, and what stands after it."""
    lines = content.split(b"\n")
    if len(lines) < 2 or content.startswith(b"{"):
        return b"", content, b""
    place = seed // 7 % len(lines)
    head, rest = lines[:place], lines[place + 1 :]
    return b"".join(x + b"\n" for x in head), lines[place], b"".join(b"\n" + x for x in rest)


def _save(folder: Path, content: bytes, error: BaseException, seen: set[str]) -> None:
    """Keep the first input of each kind of finding: one that ends in the same lines is the same."""
    calls = deque(traceback.extract_tb(error.__traceback__), 3)
    cause = error.__cause__ or error
    kind = f"{type(error)} {type(cause)} {[(call.filename, call.lineno) for call in calls]}"
    digest = hashlib.sha256(kind.encode()).hexdigest()[:10]
    if digest in seen:
        return
    seen.add(digest)
    (folder / f"finding-{digest}").write_bytes(content)
    with contextlib.suppress(ValueError):
        told = "".join(traceback.format_exception(error))
        (folder / f"finding-{digest}.txt").write_text(told, errors="backslashreplace")


def _limit_memory() -> None:
    """More than any reader needs ends in a MemoryError, and not in the machine's."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
