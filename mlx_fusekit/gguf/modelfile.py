"""Ollama's Modelfile for an exported GGUF file, and the call that makes a model of it."""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit import processes
from mlx_fusekit.checkpoint.belongings import MODELFILE_NAME
from mlx_fusekit.errors import CheckpointError, ConfigurationError, OutputError
from mlx_fusekit.writing.staging import write_file
from mlx_fusekit.writing.targets import FileTarget

#: Ollama's parameters, and what ``generation_config.json`` calls them.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_NAME_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(rf"(?:{_NAME_PART}(?::\d+)?/)?(?:{_NAME_PART}/)?{_NAME_PART}(?::{_NAME_PART})?")


@dataclass(frozen=True)
class Modelfile:
    """The Modelfile beside a GGUF file, and the Ollama model that may be made of it.

    Attributes:
        gguf_path: the GGUF file.
        system: the system prompt, where one is wanted.
        ollama: name of the Ollama model, where one is to be made.
        overwrite: whether an existing Modelfile may be replaced.
    """

    gguf_path: Path
    system: str | None = None
    ollama: str | None = None
    overwrite: bool = False

    @property
    def path(self) -> Path:
        """The file."""
        return self.gguf_path.with_name(MODELFILE_NAME)

    @property
    def _target(self) -> FileTarget:
        return FileTarget(self.path, "--gguf-path", self.overwrite)

    @property
    def ollama_command(self) -> str:
        """The line that makes an Ollama model of it."""
        return create_line(self.ollama or _model_name(self.gguf_path), self.path)

    def check(self) -> None:
        """Refuse what could not be written or made, before any work.

        Raises:
            ConfigurationError: for a name that Ollama does not allow, or when it is not there.
            OutputError: for a file that must not be written to.
        """
        self._target.check()
        if self.ollama is not None:
            ollama_program(self.ollama, self.path)

    def text(self, generation: Mapping[str, Any], stops: Sequence[str]) -> str:
        """What it says; see :func:`modelfile_text`."""
        return modelfile_text(
            self.gguf_path.name, generation=generation, stops=stops, system=self.system
        )

    def write(self, text: str) -> None:
        """Write it, complete or not at all, and make the Ollama model.

        Raises:
            OutputError: when disk or rights do not let it be written, or Ollama fails.
        """
        try:
            write_file(self._target, text.encode())
        except OutputError as error:
            raise OutputError(f"{error}; the GGUF file is there") from error
        if self.ollama is not None:
            create_in_ollama(self.ollama, self.path)


def modelfile_text(
    gguf_name: str,
    *,
    generation: Mapping[str, Any],
    stops: Sequence[str] = (),
    system: str | None = None,
) -> str:
    """The text of a Modelfile. It has no TEMPLATE, since the GGUF file carries the chat template.

    Args:
        gguf_name: name of the GGUF file, which lies beside the Modelfile.
        generation: ``generation_config.json``.
        stops: texts at which the model ends its answer.
        system: the system prompt, where one is wanted.

    Raises:
        CheckpointError: for a generation parameter that is no number.
        ConfigurationError: for a text that a Modelfile cannot hold.
    """
    lines = [f"FROM {_value(f'./{gguf_name}', 'the name of the GGUF file')}"]
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(generation)]
    lines += [f"PARAMETER stop {_quoted(stop, 'a stop token')}" for stop in dict.fromkeys(stops)]
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system, 'the system prompt')}")
    return "\n".join(lines) + "\n"


def create_command(name: str, modelfile: Path) -> list[str]:
    """The command that makes an Ollama model of a Modelfile.

    Raises:
        ConfigurationError: for a name that Ollama does not allow.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"--ollama {name}: not a name for a model; use letters, digits, '.', '_' and '-', "
            "as my-model or me/my-model:tag"
        )
    return ["ollama", "create", name, "-f", str(modelfile)]


def create_line(name: str, modelfile: Path) -> str:
    """The same as one line for a shell."""
    return shlex.join(create_command(name, modelfile))


def ollama_program(name: str, modelfile: Path) -> str:
    """Where the program is that makes an Ollama model of a Modelfile.

    Raises:
        ConfigurationError: for a name that Ollama does not allow, or when it is not on the PATH.
    """
    program = processes.program(create_command(name, modelfile)[0])
    if program is None:
        raise ConfigurationError(
            f"--ollama {name}: the program ollama is not on the PATH; install it from "
            f"https://ollama.com, or run `{create_line(name, modelfile)}` where it is"
        )
    return program


def create_in_ollama(name: str, modelfile: Path) -> None:
    """Run ``ollama create``; what it prints goes to standard error.

    Raises:
        ConfigurationError: for a name that Ollama does not allow, or when it is not on the PATH.
        OutputError: when it fails.
    """
    program = ollama_program(name, modelfile)
    done = processes.run([program, *create_command(name, modelfile)[1:]], shown=True)
    if done.returncode:
        raise OutputError(
            f"--ollama {name}: `ollama create` failed with status {done.returncode}, see its "
            "message above; is the Ollama server running (`ollama serve`)?"
        )


def _model_name(gguf_path: Path) -> str:
    """A name that Ollama takes, from the file's."""
    allowed = "".join(
        c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in gguf_path.stem
    )
    return allowed.strip(".-").lower() or "my-model"


def _parameters(generation: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    greedy = generation.get("do_sample") is False
    if greedy:
        yield "temperature", "0"
    for name, key in _PARAMETERS.items():
        value = generation.get(key)
        if value is None or (greedy and name in _SAMPLING):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        finite = number and abs(value) <= sys.float_info.max
        if not finite or (name == "top_k" and value != int(value)):
            raise CheckpointError(
                f"generation_config.json: {key} is {value!r}, which is no number for it; "
                "correct or remove it"
            )
        yield name, str(int(value)) if value == int(value) else repr(float(value))


def _value(text: str, what: str) -> str:
    """A value without quotes where Ollama reads it as it is."""
    return text if _read_back(text) == text and _is_visible(text) else _quoted(text, what)


def _quoted(text: str, what: str) -> str:
    """A value in the first kind of quotes that Ollama reads back as it is.

    There is no escape: a value ends with the first line that ends in its closing quotes.
    """
    if not _is_visible(text):
        raise ConfigurationError(
            f"{what} {text!r}: has characters without a shape, which Ollama drops; remove them"
        )
    for quotes in ('"', '"""'):
        if _read_back(quotes + text + quotes) == text:
            return quotes + text + quotes
    raise ConfigurationError(
        f"{what} {text!r}: no quotes of a Modelfile can hold it; let no line end in quotes"
    )


def _read_back(value: str) -> str | None:
    """What Ollama's parser takes a value for that a line end follows; None where it reads on."""
    read = ""
    for line in (value + "\n").splitlines(keepends=True):
        read += line
        if (unquoted := _unquoted(read.strip())) is not None:
            return unquoted
    return None


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def _is_visible(text: str) -> bool:
    """Whether Ollama keeps every character: line ends, tabs, and all that have a shape."""
    return all(c.isprintable() or c in "\n\r\t" for c in text)
