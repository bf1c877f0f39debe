"""Options that contradict each other or a path, refused on one line before any work."""

from pathlib import Path
from typing import Any

import pytest
from support.command import exit_code
from support.exportable import copy_sample
from support.tiny import make_adapter, make_model

from mlx_fusekit import fuse, samples
from mlx_fusekit.errors import FusekitError
from mlx_fusekit.fusing import prepared as fusing
from mlx_fusekit.running import loading

LONG = "x" * 300
BENCH = ("bench", "--model", "mlx_model", "--adapter-path", "adapters")
VERIFY = ("verify", "--model", "mlx_model", "--adapter-path", "adapters", "--fused", "mlx_model")
SAMPLE = ("fuse", "--model", "sample", "--adapter-path", str(samples.adapter_path()))
GGUF = (*SAMPLE, "--export-gguf", "--gguf-path")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    make_adapter(folder / "adapters", make_model(folder / "mlx_model"))
    make_model(folder / "dense", bits=None)
    make_model(folder / "mx", group_size=32, mode="mxfp4")
    make_adapter(folder / "for_mx", folder / "mx")
    copy_sample(folder / "sample")
    (folder / "loop").symlink_to("loop")
    (folder / "file").write_text("text")
    (folder / "bytes").write_bytes(b"text \xff")
    (folder / "empty").write_text(" \n")
    return folder


@pytest.fixture(autouse=True)
def _no_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused here is so before a model is loaded or anything is written."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(fusing, "execute", work)
    monkeypatch.setattr(loading, "load_lazily", work)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # A path of any option.
        (("fuse", "--model", ""), "--model '': the name is empty"),
        (("fuse", "--model", "~no-one-here/x"), "--model ~no-one-here/x: there is no user no-one"),
        (("fuse", "--save-path", "~no-one-here"), "--save-path ~no-one-here: there is no user"),
        (("inspect", "~no-one-here/x"), "~no-one-here/x: there is no user"),
        ((*BENCH, "--csv", "~no-one-here/x"), "--csv ~no-one-here/x: there is no user"),
        (("exercise", "--out", "~no-one-here/x"), "--out ~no-one-here/x: there is no user"),
        ((*BENCH, "--fused", "a=~no-one-here/x"), "--fused ~no-one-here/x: there is no such user"),
        (("fuse", "--save-path", LONG), "the name is too long for a file"),
        (("fuse", "--save-path", f"{LONG}/x"), "the name is too long for a file"),
        (("fuse", "--calibration", LONG), "the name is too long for a file"),
        (("export-gguf", "--model", "sample", "--gguf-path", LONG), "the name is too long"),
        ((*BENCH, "--json", LONG), "the name is too long for a file"),
        (("publish", "--path", LONG, "--repo", "a/b"), "the name is too long for a file"),
        (("fuse", "--model", "loop"), "loop: links that lead in a circle"),
        (("fuse", "--save-path", "loop"), "loop: links that lead in a circle"),
        (("fuse", "--save-path", "loop/x"), "loop/x: links that lead in a circle"),
        (("inspect", "loop"), "loop: links that lead in a circle"),
        ((*VERIFY, "--data", "loop"), "loop: links that lead in a circle"),
        (("exercise", "--check", "loop/x"), "loop/x: links that lead in a circle"),
        (("fuse", "--save-path", "file/x"), "file: cannot be made"),
        (("exercise", "--out", "file/x"), "file: cannot be made"),
        ((*BENCH, "--json", "file/x"), "file: cannot be made"),
        # Places that cannot be replaced.
        (("fuse", "--save-path", "."), "is the current folder, or holds it"),
        (("fuse", "--save-path", "..", "--overwrite"), "is the current folder, or holds it"),
        (("fuse", "--save-path", "mlx_model/.."), "is the current folder, or holds it"),
        (("fuse", "--save-path", "/"), "is a mount point"),
        (("fuse", "--save-path", "/dev", "--overwrite"), "is a mount point"),
        (("exercise", "--out", ".", "--overwrite"), "is the current folder, or holds it"),
        (("exercise", "--out", "/dev"), "is a mount point"),
        # The GGUF file.
        ((*GGUF, "config.json"), "its name must end in .gguf"),
        ((*GGUF, "model.safetensors"), "its name must end in .gguf"),
        ((*GGUF, "./tokenizer.json"), "its name must end in .gguf"),
        ((*GGUF, "sub/fusekit.json"), "its name must end in .gguf"),
        ((*GGUF, "../sample/x.gguf"), "lies in what is read (sample)"),
        (("fuse", "--gguf-path", "x.gguf"), "names the file of --export-gguf"),
        (("export-gguf", "--model", "adapters", "--gguf-path", "x.gguf"), "`mlx-fusekit ex"),
        # Settings of what is not done.
        (("fuse", "--bits", "8", "--model", "dense"), "--bits 8: the base is not quantized"),
        (("fuse", "--calibration", "file", "--model", "dense"), "--calibration: nothing is re-qu"),
        (("fuse", "--calibration", "file", "--dequantize"), "--calibration: nothing is re-quant"),
        (("fuse", "--max-growth", "1", "--dequantize"), "--max-growth: nothing is re-quantized"),
        (("fuse", "--calibration-tokens", "9", "--dequantize"), "--calibration-tokens: nothing is"),
        # Text to read.
        (("fuse", "--calibration", "bytes"), "bytes: not UTF-8 text at byte 5"),
        (("fuse", "--calibration", "empty"), "empty: holds no text"),
        ((*VERIFY, "--data", "none"), "none: no such file"),
        ((*VERIFY, "--data", "bytes"), "bytes: not UTF-8 text at byte 5"),
        ((*VERIFY, "--data", "dense"), "dense: has no train.jsonl"),
        (("exercise", "--data", "bytes"), "bytes: not UTF-8 text at byte 5"),
        ((*BENCH, "--prompt-file", "bytes"), "--prompt-file bytes: not UTF-8 text at byte 5"),
        ((*BENCH, "--prompt-file", "none"), "--prompt-file none: No such file"),
        # Files to write.
        ((*BENCH, "--json", "a.json", "--csv", "./a.json"), "is the same file as --json a.json"),
        ((*BENCH, "--csv", "p.svg", "--plot", "p.svg"), "is the same file as --csv p.svg"),
        ((*BENCH, "--prompt-file", "file", "--csv", "file", "--overwrite"), "same file as file"),
        (("bench", "report", "file", "--csv", "file", "--overwrite"), "same file as file"),
        # What a command does not take.
        (("publish", "--path", "adapters", "--repo", "a/b"), "--path adapters: is an adapter"),
        (("publish", "--path", "file", "--repo", "a/b"), "give the folder that it lies in"),
        (("publish", "--path", "none", "--repo", "a/b"), "--path none: there is no such folder"),
    ],
)  # fmt: skip
def test_refused_on_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = sorted(Path().rglob("*"))
    assert exit_code(monkeypatch, *arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*BENCH, "--delay", "nan"), "nan is not a finite number"),
        ((*BENCH, "--fuse-seconds", "inf"), "inf is not a finite number"),
        ((*VERIFY, "--max-kl", "nan"), "nan is not a finite number"),
        (("bench", "--model", "mlx_model", "--fused", "mlx_model", "--skip-base"), "--skip-base"),
        (("bench", "--model", "mlx_model", "report", "x.json"), "--model: give it behind report"),
    ],
)
def test_refused_as_wrong_usage(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert exit_code(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_model(tmp_path / "base")
    assert exit_code(monkeypatch, "inspect", "~/base") == 0
    assert exit_code(monkeypatch, *BENCH, "--json", "~/base/config.json/x.json") == 1
    assert f"{tmp_path}/base/config.json: cannot be made" in capsys.readouterr().err


def test_wider_bits_of_another_format_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ("fuse", "--model", "mx", "--adapter-path", "for_mx", "--dry-run")
    assert exit_code(monkeypatch, *arguments, "--bits", "5") == 0
    shown = capsys.readouterr()
    assert "warning: 14 modules leave mxfp4: wider bits are affine (5-bit group 32)" in shown.err
    assert exit_code(monkeypatch, *arguments, "--bits", "4") == 0
    shown = capsys.readouterr()
    assert "leave mxfp4" not in shown.err
    assert "14 as mxfp4" in shown.out


def test_of_modules_that_are_not_quantized(folder: Path) -> None:
    with pytest.raises(FusekitError, match="the base is not quantized"):
        fuse(folder / "dense", folder / "adapters", folder / "never", bits=8)
