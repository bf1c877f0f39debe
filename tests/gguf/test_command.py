"""The command line of the exports as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from support.command import run
from support.exportable import copy_sample, make_exportable

from mlx_fusekit import samples
from mlx_fusekit.gguf.exporting import export_gguf

FUSE = ["fuse", "--model", "base", "--adapter-path", "adapter", "--save-path", "fused"]
NEAREST = [*FUSE, "--requantize", "nearest", "--export-gguf"]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with the sample as ``base`` and ``adapter``."""
    copy_sample(tmp_path / "base")
    shutil.copytree(samples.adapter_path(), tmp_path / "adapter")
    return tmp_path


def export(work: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(
        "export-gguf", "--model", "base", "--gguf-path", "s.gguf", *more, cwd=work, **environment
    )


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def widest(text: str) -> int:
    return max(len(line) for line in text.splitlines())


def assert_one_line(result: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_help_fits_80_columns_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['mlx-fusekit', 'export-gguf', '--help']\n"
        "from mlx_fusekit.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'mlx', 'gguf', 'mlx_lm', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "--outtype [auto|lossless|f32|f16|bf16|q8_0]" in result.stdout
    assert widest(result.stdout) <= 80


def test_the_table_says_what_was_written(work: Path) -> None:
    result = export(work, "--modelfile")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "Wrote s.gguf" in result.stdout
    assert "exactly those of the MLX model" in result.stdout
    assert "ollama create s -f Modelfile" in result.stdout
    assert widest(result.stdout) <= 80
    assert (work / "Modelfile").read_text().startswith("FROM ./s.gguf\n")
    assert GGUFReader(work / "s.gguf").fields["general.architecture"].contents() == "llama"


def test_the_table_lists_the_worst_errors_first(work: Path) -> None:
    target = work / "a folder with quite a long name" / f"{'m' * 60}.gguf"
    target.parent.mkdir()
    target.write_bytes(b"GGUF, an older one")
    arguments = ["--gguf-path", str(target), "--outtype", "q8_0", "--overwrite"]
    result = export(work, *arguments)
    assert result.returncode == 0, result.stderr
    assert target.stat().st_size > 3_000_000
    assert widest(result.stdout) <= 80
    told = " ".join(result.stdout.split())
    assert "29 of 38 tensors are not exact: " in told
    errors = [float(part.split(",")[0]) for part in told.split("relative RMS error ")[1:]]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)
    assert "and 24 more (--json lists all)" in told


def test_json_is_one_object_on_stdout(work: Path) -> None:
    result = export(work, "--json", "--outtype", "f16")
    report = json.loads(result.stdout)
    assert report["bytes"] == (work / "s.gguf").stat().st_size
    assert (report["architecture"], report["types"]) == ("llama", {"F16": 29, "F32": 9})
    assert {tensor["type"] for tensor in report["inexact"]} == {"F16"}
    assert 0 < report["inexact"][0]["relative_rms_error"] < 1e-3


def test_a_dry_run_writes_nothing(work: Path) -> None:
    before = names_in(work)
    result = export(work, "--dry-run", "--modelfile", "--outtype", "bf16")
    assert "Would write s.gguf" in result.stdout
    assert "29 of 38 tensors may not be exact" in result.stdout
    assert widest(result.stdout) <= 80
    assert names_in(work) == before


def test_what_llama_cpp_does_otherwise_is_said_on_stderr(tmp_path: Path) -> None:
    make_exportable(tmp_path / "base")  # without max_position_embeddings
    result = export(tmp_path)
    assert result.returncode == 0
    assert result.stderr.startswith("warning: config.json has no max_position_embeddings")
    assert len(result.stderr.splitlines()) == 1


def test_an_existing_file(work: Path) -> None:
    (work / "s.gguf").write_bytes(b"GGUF, an older one")
    line = assert_one_line(export(work))
    assert line == "error: s.gguf: exists already; add --overwrite to replace it"
    assert (work / "s.gguf").read_bytes() == b"GGUF, an older one"


def damage_scale(work: Path) -> None:
    """Make a scale of the last tensor of scales a NaN."""
    path = work / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    start = header["model.layers.1.mlp.up_proj.scales"]["data_offsets"][0]
    data[8 + size + start : 8 + size + start + 2] = b"\xc0\x7f"
    path.write_bytes(data)


def test_a_damaged_model_gets_one_line_and_leaves_no_file(work: Path) -> None:
    damage_scale(work)
    before = names_in(work)
    line = assert_one_line(export(work, "--modelfile"))
    assert "up_proj.weight has a scale or bias" in line
    assert names_in(work) == before


# --- Ollama -----------------------------------------------------------------------------------


def fake_ollama(folder: Path, status: int = 0) -> str:
    """A PATH whose ``ollama`` writes down how it was called and what it found."""
    program = folder / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" > called\ncat "$4" >> called\nls s.gguf\nexit {status}\n'
    )
    program.chmod(0o755)
    return os.pathsep.join([str(program.parent), os.environ["PATH"]])


def test_ollama_makes_a_model_of_the_file(work: Path) -> None:
    options = ["--ollama", "me/sql:1", "--system", "Be short.", "--json"]
    result = export(work, *options, PATH=fake_ollama(work))
    assert result.returncode == 0, result.stderr
    called = (work / "called").read_text()
    assert called == "create me/sql:1 -f Modelfile\n" + (work / "Modelfile").read_text()
    assert 'SYSTEM "Be short."\n' in called
    assert result.stderr == "s.gguf\n"
    assert json.loads(result.stdout)["ollama_command"] == "ollama create me/sql:1 -f Modelfile"


def test_ollama_fails(work: Path) -> None:
    result = export(work, "--ollama", "sql", PATH=fake_ollama(work, 1))
    assert result.returncode == 1
    assert "error: --ollama sql: `ollama create` failed with status 1" in result.stderr
    assert {"s.gguf", "Modelfile"} < names_in(work)


# --- fuse --export-gguf -----------------------------------------------------------------------


def test_fuse_exports_what_it_made(work: Path) -> None:
    result = run(*NEAREST, "--json", cwd=work)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    path = work / "fused" / "model.gguf"
    assert report["gguf"]["gguf_path"] == "fused/model.gguf"
    assert report["gguf"]["bytes"] == path.stat().st_size
    assert report["gguf"]["exact"]
    export_gguf(work / "fused", work / "again.gguf")
    assert path.read_bytes() == (work / "again.gguf").read_bytes()


def test_fuse_prints_both_tables_and_replaces_both(work: Path) -> None:
    (work / "fused").mkdir()
    (work / "fused" / "config.json").write_text("{}")
    (work / "fused" / "model.gguf").write_bytes(b"GGUF, an older one")
    result = run(*NEAREST, "--overwrite", "--gguf-path", "sql.gguf", cwd=work)
    assert result.returncode == 0, result.stderr
    assert "Fused into fused" in result.stdout
    assert "Wrote fused/sql.gguf" in result.stdout
    assert widest(result.stdout) <= 80
    assert {"sql.gguf", "model.safetensors"} < names_in(work / "fused")
    assert "model.gguf" not in names_in(work / "fused")


def set_in_config(**settings: Any) -> Callable[[Path], None]:
    def change(work: Path) -> None:
        path = work / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def remove_tokenizer(work: Path) -> None:
    (work / "base" / "tokenizer.json").unlink()


def write_target(work: Path) -> None:
    (work / "s.gguf").write_bytes(b"GGUF, an older one")


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (set_in_config(model_type="gpt2"), [], "models of type 'gpt2' cannot be exported"),
        (remove_tokenizer, ["--dry-run"], "has neither tokenizer.json nor tokenizer.model"),
        (write_target, ["--gguf-path", "../s.gguf"], "s.gguf: exists already; add --overwrite"),
    ],
)
def test_fuse_refuses_what_it_cannot_export_before_it_fuses(
    work: Path, change: Callable[[Path], None], more: list[str], message: str
) -> None:
    change(work)
    before = names_in(work)
    assert message in assert_one_line(run(*NEAREST, *more, cwd=work))
    assert names_in(work) == before


def test_verify_says_at_once_how_to_get_llama_cpp(tmp_path: Path) -> None:
    (tmp_path / "s.gguf").write_bytes(b"GGUF")
    code = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "sys.argv = ['mlx-fusekit', 'verify', '--model', 'none', '--adapter-path', 'none',"
        " '--fused', 's.gguf']\n"
        "from mlx_fusekit.cli import main\n"
        "main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert "pip install 'mlx-fusekit[llamacpp]'" in assert_one_line(result)
