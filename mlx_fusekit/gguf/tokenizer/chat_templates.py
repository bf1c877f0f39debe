"""Chat templates such that what reads GGUF files can render them."""

import re
from collections.abc import Iterator, Mapping

#: Marks what an assistant wrote, for training; nothing of it is rendered.
_MARKER = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def portable(templates: Mapping[str, str]) -> dict[str, str]:
    """Templates under names that a key may have, in tags that all of Jinja's readers know.

    ``{% generation %}`` becomes ``{% if true %}``, which renders the same: llama.cpp knows it, but
    plain Jinja does not, and older llama-cpp-python does not load a file that has it.
    """
    return {_key(name): _MARKER.sub(_neutral, text) for name, text in templates.items()}


def template_notes(templates: Mapping[str, str]) -> Iterator[str]:
    """What people should know of the templates, as they are in the model's folder."""
    for name, text in templates.items():
        which = "the chat template" if name == "default" else f"the chat template {name!r}"
        if _MARKER.search(text):
            yield (
                f"{which} marks text for training with {{% generation %}}, for which older "
                "llama-cpp-python does not load a file; it is written as {% if true %}, which "
                "renders the same"
            )
        if fault := _fault(_MARKER.sub(_neutral, text)):
            yield (
                f"{which} cannot be read by plain Jinja ({fault}), so some programs will not load "
                "the file; correct it in the model's folder and export again"
            )


def _key(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)


def _neutral(marker: re.Match[str]) -> str:
    before, end, after = marker.groups()
    return f"{before}{'endif' if end else 'if true'}{after}"


def _fault(text: str) -> str | None:
    """What Jinja, with the tags for loops that llama-cpp-python adds, finds wrong; nothing runs."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.compile(text)
    except TemplateSyntaxError as error:
        return " ".join(f"line {error.lineno}: {error.message}".split())
    return None
