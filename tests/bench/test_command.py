"""``mlx-fusekit bench`` as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command import exit_code
from support.tiny import make_adapter, make_model

from mlx_fusekit import fuse


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mlx_fusekit", "bench", *arguments]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80"},
        check=False,
        timeout=120,
    )


ARMS = ("--model", "base", "--adapter-path", "adapter")
SMALL = ("-p", "8", "-g", "4", "-n", "6", "--load-trials", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make_adapter(folder / "adapter", make_model(folder / "base"))
    fuse(folder / "base", folder / "adapter", folder / "fused", requantize="nearest")
    return folder


def test_help_fits_80_columns(folder: Path) -> None:
    for arguments in (("--help",), ("report", "--help")):
        result = run(*arguments, cwd=folder)
        assert result.returncode == 0
        assert max(map(len, result.stdout.splitlines())) <= 80


def test_tables_fit_80_columns_and_files_are_written(folder: Path) -> None:
    files = ("--json", "b.json", "--csv", "b.csv", "--plot", "b.svg")
    fused = ("--fused", "fused", "--fused", "again=fused", "--fuse-seconds", "60")
    result = run(*ARMS, *fused, *SMALL, *files, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in ("8 prompt tokens, 4 generated; medians of 6 trials", "of limit", "again"):
        assert words in result.stdout
    assert "Is fusing worth it? (fused for base+adapter)" in result.stdout
    report = json.loads((folder / "b.json").read_text())
    assert list(report["arms"]) == ["base", "base+adapter", "fused", "again"]
    assert report["arms"]["fused"]["model"] == "fused"
    assert len((folder / "b.csv").read_text().splitlines()) == 25

    again = run(*ARMS, *SMALL, "--json", "b.json", cwd=folder)
    assert again.returncode == 1
    assert again.stderr == ("error: b.json: exists already; add --overwrite to replace it\n")

    shown = run("report", "b.json", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == result.stdout
    (folder / "c.json").write_bytes((folder / "b.json").read_bytes())
    both = run("report", "b.json", "c.json", "--plot", "both.png", cwd=folder)
    assert both.returncode == 0, both.stderr
    assert "Time a token, unfused and fused" in both.stdout
    assert max(map(len, both.stdout.splitlines())) <= 80
    assert (folder / "both.png").exists()


def test_json_on_stdout_is_one_object(folder: Path) -> None:
    few = ("--load-trials", "0")
    result = run(*ARMS, "--fused", "fused", *SMALL, *few, "--json", "-", cwd=folder)
    assert json.loads(result.stdout)["speedup"]["pairs"] == 6
    assert "Against base+adapter" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "Missing option '--model'"),
        (("--model", "base"), 1, "nothing to compare"),
        ((*ARMS, "-p", "0"), 2, "-p"),
        ((*ARMS, "--prompt", "x", "--prompt-file", "y"), 2, "give one of them"),
        ((*ARMS, "--prompt", "x", "-p", "4"), 2, "leave it out beside --prompt"),
        ((*ARMS, "--prompt-file", "missing"), 1, "--prompt-file missing"),
        ((*ARMS, "--prompt", "x"), 1, "tokenizer cannot be loaded"),
        ((*ARMS, "--plot", "b.gif"), 1, "--plot b.gif: name a .png, .svg, .pdf file"),
        (
            (*ARMS, "--json", "adapter/adapter_config.json/b.json"),
            1,
            "cannot be made; choose another",
        ),
        ((*ARMS, "--json", "base"), 1, "base: is a folder; give a file name in it as --json"),
        ((*ARMS, "--fused", "a=fused", "--fused", "a=fused"), 2, "a is taken"),
        ((*ARMS, "--fused", "adapter"), 1, "adapter: is an adapter, not a model"),
        (("report", "missing.json"), 1, "missing.json: there is no such file"),
        (("report", "base/config.json"), 1, "not a report"),
    ],
)
def test_a_mistake_gets_one_line(
    folder: Path,
    arguments: tuple[str, ...],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert exit_code(monkeypatch, "bench", *arguments) == code
    shown = capsys.readouterr()
    assert words in shown.err
    if code == 1:
        assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_ctrl_c_keeps_what_was_measured(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.json"
    many = (*ARMS, "-p", "8", "-g", "16", "-n", "8000", "--json", str(target))
    with subprocess.Popen(
        command(*many),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a script ignores the signal, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        # Ready once it computes: a core is busy for some seconds beyond the imports.
        ends = time.monotonic() + 60
        while _processor_seconds(process.pid) < 6 and time.monotonic() < ends:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "INCOMPLETE" in output
    assert "interrupted; what was measured" in errors
    report = json.loads(target.read_text())
    assert report["complete"] is False
    assert report["runs"][0]["trials"]


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
