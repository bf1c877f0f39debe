"""Standard streams that are closed, full, a broken pipe, or cannot hold a name."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.command import exit_code
from support.tiny import make_adapter, make_model

from mlx_fusekit.cli.streams import guarded, json_text

FUSEKIT = f"'{sys.executable}' -m mlx_fusekit"
FULL = "error: standard output: cannot be written to (No space left on device); send it elsewhere\n"
NONE = "error: PATH none: neither a folder here nor a Hub id (owner/name)\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    make_adapter(folder / "adapters", make_model(folder / "mlx_model"))
    return folder


def shell(line: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        cwd=folder,
        env={**os.environ, **environment},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param("inspect adapters >&-", (0, "", ""), id="stdout closed"),
        pytest.param("inspect none 2>&- <&-", (1, "", ""), id="stderr and stdin closed"),
        pytest.param("inspect none >&- 2>&- <&-", (1, "", ""), id="all closed"),
        pytest.param("inspect none 2>/dev/full", (1, "", ""), id="stderr full"),
        pytest.param("inspect adapters >/dev/full", (1, "", FULL), id="stdout full"),
        pytest.param("inspect adapters --json >/dev/full", (1, "", FULL), id="JSON, full"),
        pytest.param("inspect none >/dev/full", (1, "", NONE), id="an error, stdout full"),
    ],
)
def test_streams_that_take_nothing(line: str, expected: tuple[int, str, str], folder: Path) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("needs Linux's /dev/full")
    assert shell(f"{FUSEKIT} {line}", folder) == expected


def test_no_file_gets_the_number_of_a_closed_stream(folder: Path) -> None:
    """Or what MLX prints by itself would be written into a model."""
    code = (
        "import os\n"
        "from mlx_fusekit.cli.streams import guarded\n"
        "with guarded():\n"
        "    assert os.open('/dev/null', os.O_RDONLY) > 2\n"
    )
    line = f"'{sys.executable}' -c \"{code}\" <&- >&- 2>&-"
    assert shell(line, folder) == (0, "", "")


def test_a_warning_that_cannot_be_written_does_not_end_the_work(folder: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux's /dev/full")
    line = f"{FUSEKIT} fuse --save-path fused --requantize nearest --json 2>/dev/full"
    code, output, _ = shell(line, folder)
    assert code == 0
    assert json.loads(output)["warnings"]


def test_a_reader_that_has_gone(folder: Path) -> None:
    code, _, errors = shell(f"({FUSEKIT} inspect adapters; echo $? >&2) | true", folder)
    assert (code, errors) == (0, "1\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_encoding_that_cannot_hold_a_name(
    encoding: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r"""Text gets ``\u4e2d`` and ``\udcff``, JSON stays JSON, on both streams."""
    name = os.fsdecode("中-é-".encode() + b"\xff")
    (folder / name).mkdir(exist_ok=True)
    for path in (folder / "adapters").iterdir():
        (folder / name / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(folder)
    for arguments in (["inspect", name], ["inspect", name, "--json"], ["inspect", f"{name}-none"]):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        code = exit_code(monkeypatch, *arguments)
        shown, said = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
        if arguments[-1] == "--json":
            assert json.loads(shown)["path"] == name
        elif code == 0:
            assert f"Adapter {name}".encode(encoding, "backslashreplace").decode(encoding) in shown
        else:
            assert said.count("\n") == 1
            assert "-none: neither" in said


@given(st.text(st.characters(exclude_categories=()), max_size=20))
def test_json_stays_the_same_value(text: str) -> None:
    for encoding in ("ascii", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        written = json_text(json.dumps({"a": [text]}, indent=2, ensure_ascii=False), stream)
        assert json.loads(written.encode(encoding)) == {"a": [text]}
        assert all(c == "\n" or c in "\u200c\u200d" or c.isprintable() or c.isspace()
                   for c in written)  # fmt: skip


def test_the_streams_are_as_before_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with guarded():
        assert (sys.stdout, sys.stderr) != before
        assert sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
