"""Control characters in names of files and in what files hold never reach a terminal."""

import io
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.command import exit_code
from support.tiny import make_adapter, make_model

from mlx_fusekit.cli import output
from mlx_fusekit.cli.streams import guarded, one_line, visible
from mlx_fusekit.tables import Table

#: Colors, a link, the terminal's title, a C1 sequence, text turned round, line and paragraph
#: separators, bell and backspace, and a line that looks like one of ours.
EVIL = (
    "\x1b[31m\x1b]8;;http:x\x1b\\\x1b]0;t\x07\x9b2J\u202e\u2066\u2028\u2029\x7f\b\x00\r\nerror: no"
).replace("\x00", "")
#: Control characters that a text of several lines has.
LINES = "\n\t"


def is_clean(text: str) -> bool:
    return all(c.isprintable() or c in LINES for c in text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter, good ones and such whose every name is hostile."""
    folder = tmp_path_factory.mktemp("escapes")
    make_adapter(folder / "adapters", make_model(folder / "mlx_model"))
    shutil.copytree(folder / "mlx_model", folder / f"m{EVIL}")
    shutil.copytree(folder / "adapters", folder / f"a{EVIL}")
    change(folder / f"m{EVIL}" / "config.json", architectures=[EVIL])
    change(folder / f"a{EVIL}" / "adapter_config.json", model=EVIL, data=EVIL)
    (folder / f"m{EVIL}" / f"x{EVIL}.bin").write_text("x")
    (folder / f"m{EVIL}" / "README.md").write_text(f"---\nlicense: mit\n---\n{EVIL}")
    shutil.copytree(folder / "mlx_model", folder / "odd")
    change(folder / "odd" / "config.json", model_type=EVIL)
    shutil.copytree(folder / "adapters", folder / "bad")
    rename_tensor(folder / "bad" / "adapters.safetensors")
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rename_tensor(file: Path) -> None:
    import mlx.core as mx

    tensors = mx.load(str(file))
    first = next(iter(tensors))
    mx.save_safetensors(str(file), {f"{EVIL}.lora_a" if n == first else n: t
                                    for n, t in tensors.items()})  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", f"m{EVIL}"),
        ("inspect", f"a{EVIL}"),
        ("inspect", "odd"),
        ("inspect", "bad", "--model", "mlx_model"),
        ("inspect", f"none{EVIL}"),
        ("inspect", f"a{EVIL}", "--model", f"m{EVIL}"),
        ("fuse", "--model", f"m{EVIL}", "--adapter-path", f"a{EVIL}", "--save-path", f"s{EVIL}",
         "--dry-run", "--requantize", "nearest"),
        ("fuse", "--model", "odd"),
        ("fuse", "--adapter-path", "bad", "--requantize", "nearest"),
        ("fuse", "--save-path", f"m{EVIL}"),
        ("fuse", "--save-path", f"{EVIL}/../adapters/x"),
        ("fuse", "--bits", EVIL),
        ("fuse", f"--{EVIL}"),
        (EVIL,),
        ("verify", "--model", "mlx_model", "--adapter-path", "adapters", "--fused", f"n{EVIL}"),
        ("bench", "--model", "mlx_model", "--adapter-path", "adapters", "--prompt-file", EVIL),
        ("bench", "report", f"n{EVIL}.json"),
        ("export-gguf", "--model", f"m{EVIL}", "--gguf-path", f"{EVIL}.gguf"),
        ("export-lora", "--model", "mlx_model", "--adapter-path", "bad", "--gguf-path", "x.gguf"),
        ("convert-adapter", "--model", "mlx_model", "--adapter-path", "adapters", "--save-path",
         f"p{EVIL}", "--to", "peft"),
        ("extract", "--model", "mlx_model", "--fused", f"m{EVIL}", "--rank", "2",
         "--save-path", "e"),
        ("diff", "mlx_model", f"m{EVIL}"),
        ("publish", "--path", f"m{EVIL}", "--repo", "a/b", "--dry-run"),
        ("exercise", "--check", f"n{EVIL}"),
    ],
)  # fmt: skip
def test_no_name_steers_the_terminal(
    arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(folder)
    code = exit_code(monkeypatch, *arguments)
    shown = capsys.readouterr()
    assert is_clean(shown.out)
    assert is_clean(shown.err)
    # Nor does one make a line of its own of what it says.
    if code == 1:
        assert shown.err.splitlines()[-1].startswith("error: ")
    if arguments[0] != "publish":  # which shows the card
        assert "\nerror: no" not in f"\n{shown.out}{shown.err}"


def test_json_has_the_names_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(folder)
    assert exit_code(monkeypatch, "inspect", f"a{EVIL}", "--json") == 0
    shown = capsys.readouterr().out
    assert is_clean(shown)
    assert json.loads(shown)["path"] == f"a{EVIL}"


def test_what_libraries_print_is_escaped_too(capsys: Any) -> None:
    with guarded():
        logging.StreamHandler().handle(logging.makeLogRecord({"msg": EVIL}))
        sys.stderr.write(warnings.formatwarning(EVIL, UserWarning, "f.py", 1))
        sys.stdout.write(EVIL)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert is_clean(text)
        assert r"\x1b[31m" in text


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_colors_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where escape sequences are written, none of them is a name's."""
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    with guarded():
        output.warn(f"[red]{EVIL}")
        with output.steps_bar(animated=False) as progress:
            assert progress is not None
            progress(EVIL, 1, 2)
        output.print_table(Table(EVIL, (EVIL,), ((EVIL,),)))
        output.say(EVIL)
        sys.stderr.write("\rbar\x1b[A\x1b[1mbold\x1b[0m" + "\x1b]0;title\x07\x1b[2J")
        shown = sys.stdout.getvalue()
    said = terminal.getvalue()
    assert said.startswith("\x1b[33mwarning:\x1b[0m [red]\\x1b[31m")
    assert said.endswith("\rbar\x1b[A\x1b[1mbold\x1b[0m\\x1b]0;title\\x07\\x1b[2J")
    for evil in ("\x1b]8", "\x1b]0", "\x9b", "\u202e", "\x1b[31m", "\u2028", "\b"):
        assert evil not in said + shown


@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_what_is_visible(text: str) -> None:
    shown = visible(text)
    assert all(c.isprintable() or c in "\u200c\u200d" or (c.isspace() and ord(c) > 0x9F)
               for c in shown)  # fmt: skip
    assert len(one_line(text).splitlines()) <= 1
    assert visible(shown) == shown


def test_what_has_a_shape_stays() -> None:
    text = "한국어 né 中 \u00a0a\u3000b 👩\u200d💻 می\u200cش"
    assert visible(text) == text
