"""What nobody foresaw becomes one line, and a file to report it with."""

import errno
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.command import exit_code

import mlx_fusekit.inspecting


def failing(patch: pytest.MonkeyPatch, error: BaseException) -> int:
    def inspect(*_: object, **__: object) -> None:
        raise error

    patch.setattr(mlx_fusekit.inspecting, "inspect", inspect)
    return exit_code(patch, "inspect", "model")


def test_a_bug_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-mine")
    message = (
        "a\nb \x1b[31m hf_abcDEF123 a-secret-of-mine https://x/y?Signature=s3cr3t "
        "{'authorization': 'Bearer s3cr3t'}"
    )
    assert failing(monkeypatch, KeyError(message)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "\x1b" not in shown.err
    assert "a bug of mlx-fusekit (KeyError: " in shown.err
    (file,) = tmp_path.iterdir()
    assert shown.err.endswith(f"please report it with this file: {file}\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text("utf-8")
    assert re.match(r"mlx-fusekit \S+, Python 3\.\S+, ", text)
    assert "in inspect\n    raise error" in text
    for secret in ("abcDEF123", "a-secret-of-mine", "s3cr3t"):
        assert secret not in text + shown.err


def test_its_traceback_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("FUSEKIT_DEBUG", "1")
    assert failing(monkeypatch, KeyError("name \x9b31m hf_abc")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "\x9b" not in shown
    assert "hf_abc" not in shown
    assert not list(tmp_path.iterdir())


def test_no_place_for_the_file(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    assert failing(monkeypatch, RuntimeError()) == 1
    assert capsys.readouterr().err == (
        "error: a bug of mlx-fusekit (RuntimeError: no message); run it again with "
        "FUSEKIT_DEBUG=1, and please report what it prints\n"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "not enough memory; close other programs, or use a smaller model"),
        (OSError(errno.EACCES, "", "x/y"), "x/y: permission denied; check the rights"),
        (OSError(errno.ELOOP, "", b"x\x1b"), r"x\x1b: links that lead in a circle"),
        (OSError(errno.ENAMETOOLONG, "", "x"), "x: the name is too long"),
        (OSError(errno.ENOSPC, ""), "no space left on the disk"),
        (OSError(errno.EMFILE, "", 7), "too many open files"),
    ],
)
def test_what_a_system_refuses_is_no_bug(
    error: BaseException,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert failing(monkeypatch, error) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {line}")
    assert shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_library_that_exits(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert failing(monkeypatch, SystemExit("no such thing")) == 1
    assert capsys.readouterr().err == "error: no such thing\n"
    assert failing(monkeypatch, SystemExit(2)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    assert exit_code(monkeypatch, "inspect", str(tmp_path / "closed" / "model")) == 1
    assert "permission denied" in capsys.readouterr().err
