"""The text of a Modelfile, read back as Ollama's parser reads it, and running ``ollama``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mlx_fusekit.errors import CheckpointError, ConfigurationError, OutputError
from mlx_fusekit.gguf.modelfile import create_in_ollama, create_line, modelfile_text


def _parse(text: str) -> list[tuple[str, str]]:
    """What Ollama's parser makes of a Modelfile, one character after the other."""
    commands, state, buffer, name = [], "start", "", ""
    for c in text:
        if state == "start":
            if not c.isspace():
                state, buffer = "name", c
        elif state == "name":
            if c in " \t":
                name = buffer.lower()
                state, buffer = ("parameter" if name == "parameter" else "value"), ""
            else:
                buffer += c
        elif state == "parameter":
            if c in " \t":
                name, state, buffer = buffer, "value", ""
            else:
                buffer += c
        else:
            value = _unquote(buffer.strip())
            if c in "\r\n" and value is not None:
                commands.append((name, value))
                state, buffer = "start", ""
            elif c in " \t\r\n" or c.isprintable():
                buffer += c
    assert state == "start", f"the parser still waits for the end of {buffer!r}"
    return commands


def _unquote(text: str) -> str | None:
    if text[:3] == '"""':
        return text[3:-3] if len(text) >= 6 and text[-3:] == '"""' else None
    if text[:1] == '"':
        return text[1:-1] if len(text) >= 2 and text[-1] == '"' else None
    return text


def test_all_parts() -> None:
    text = modelfile_text(
        "model.gguf",
        generation={
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "min_p": 0,
            "repetition_penalty": 1.05,
            "do_sample": True,
            "eos_token_id": [1, 2],
            "max_length": 2048,
        },
        stops=["<|im_end|>", "<|endoftext|>", "<|im_end|>"],
        system="You are kind.",
    )
    assert text == (
        "FROM ./model.gguf\n"
        "PARAMETER temperature 0.6\n"
        "PARAMETER top_k 20\n"
        "PARAMETER top_p 0.95\n"
        "PARAMETER min_p 0\n"
        "PARAMETER repeat_penalty 1.05\n"
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|endoftext|>"\n'
        'SYSTEM "You are kind."\n'
    )


def test_nothing_but_the_file() -> None:
    assert modelfile_text("a b.gguf", generation={}) == "FROM ./a b.gguf\n"


def test_greedy_generation() -> None:
    generation = {"do_sample": False, "temperature": 1.0, "top_p": 0.5, "repetition_penalty": 2}
    text = modelfile_text("m.gguf", generation=generation)
    assert _parse(text)[1:] == [("temperature", "0"), ("repeat_penalty", "2")]


@pytest.mark.parametrize("value", ["0.5", True, float("nan"), float("inf"), 10**400, [1], {}])
def test_refuses_parameters_that_are_no_numbers(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p is"):
        modelfile_text("m.gguf", generation={"top_p": value})


def test_refuses_a_fraction_of_a_token() -> None:
    with pytest.raises(CheckpointError, match=r"top_k is 1\.5"):
        modelfile_text("m.gguf", generation={"top_k": 1.5})


@pytest.mark.parametrize(
    "system",
    [
        "",
        " spaces around ",
        'say "hi"',
        '"quoted"',
        '""two',
        'two""',
        "two\nlines\n",
        'first "line"\nsecond',
        'a """triple""" in a line',
        '"""starts',
        "# no comment\nFROM other\nPARAMETER x",
        "back\\slash \\n 'single' `tick`",
        "\ttab",
        "carriage\r\nreturn",
        '"',
        "日本語 😀",
    ],
)
def test_quoting(system: str) -> None:
    text = modelfile_text("m.gguf", generation={}, stops=["</s>"], system=system)
    assert _parse(text) == [("from", "./m.gguf"), ("stop", "</s>"), ("system", system)]


@given(st.text(alphabet='a "\n#', max_size=12), st.text(alphabet='x"\n ', max_size=6))
@example('ends "\nin quotes"""\n', "x")
@example('"""', '""')
def test_what_is_written_is_read(system: str, stop: str) -> None:
    try:
        text = modelfile_text("m.gguf", generation={}, stops=[stop], system=system)
    except ConfigurationError as error:
        # Only lines that end in quotes have no form.
        assume("no quotes of a Modelfile" in str(error))
        assert '"\n' in (system + stop).replace(" ", "") or '""' in system + stop
    else:
        assert _parse(text) == [("from", "./m.gguf"), ("stop", stop), ("system", system)]


def test_refuses_what_no_quotes_hold() -> None:
    with pytest.raises(ConfigurationError, match=r"the system prompt .* let no line end in quotes"):
        modelfile_text("m.gguf", generation={}, system='a "\nb"""\nc')


def test_refuses_characters_that_ollama_drops() -> None:
    with pytest.raises(ConfigurationError, match=r"a stop token .* without a shape"):
        modelfile_text("m.gguf", generation={}, stops=["a\u200bb"])


class TestOllama:
    @pytest.fixture
    def ollama(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A program ``ollama`` that writes down how it was called."""
        program = tmp_path / "bin" / "ollama"
        program.parent.mkdir()
        program.write_text(
            '#!/bin/sh\nprintf "%s\\n" "$@" > "$OLLAMA_CALL"\necho working\nexit "$OLLAMA_STATUS"\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
        monkeypatch.setenv("OLLAMA_CALL", str(tmp_path / "call"))
        monkeypatch.setenv("OLLAMA_STATUS", "0")
        return tmp_path / "call"

    def test_runs_it(self, ollama: Path, capfd: pytest.CaptureFixture[str]) -> None:
        create_in_ollama("me/my-model:v1.2", Path("a folder/Modelfile"))
        assert ollama.read_text() == "create\nme/my-model:v1.2\n-f\na folder/Modelfile\n"
        assert capfd.readouterr() == ("", "working\n")

    def test_says_that_it_failed(self, ollama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OLLAMA_STATUS", "3")
        with pytest.raises(OutputError, match="failed with status 3"):
            create_in_ollama("model", Path("Modelfile"))

    def test_says_that_it_is_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigurationError, match="ollama is not on the PATH"):
            create_in_ollama("model", Path("Modelfile"))

    @pytest.mark.parametrize(
        "name",
        ["", "-f", "--help", "a b", "a;b", "$(x)", "a/b/c/d", "../a", "a:", ":a", "é", "a\n"],
    )
    def test_refuses_names(self, name: str, ollama: Path) -> None:
        with pytest.raises(ConfigurationError, match="not a name for a model"):
            create_in_ollama(name, Path("Modelfile"))
        assert not ollama.exists()

    def test_line_for_a_shell(self) -> None:
        line = create_line("a.b/c_d:e-f", Path("a b/Modelfile"))
        assert line == "ollama create a.b/c_d:e-f -f 'a b/Modelfile'"
