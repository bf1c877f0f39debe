"""Chat templates such that what reads GGUF files can render them."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment, nodes

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
    """What Jinja, with the tags for loops that llama-cpp-python adds, finds wrong; nothing runs.

    It is parsed, and not compiled: the compiler computes what is constant, so ``'a' * 10**10`` too.
    """
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        unknown = next(_unknown(environment.parse(text), environment), None)
    except TemplateSyntaxError as error:
        return " ".join(f"line {error.lineno}: {error.message}".split())
    except RecursionError:
        return "nested too deeply"
    return unknown


def _unknown(node: "nodes.Node", environment: "Environment") -> Iterator[str]:
    """Filters and tests that Jinja has not, where it looks for them before it renders."""
    from jinja2 import nodes

    for child in node.iter_child_nodes():
        for kind, known in ((nodes.Filter, environment.filters), (nodes.Test, environment.tests)):
            if isinstance(child, kind) and child.name not in known:
                yield f"line {child.lineno}: No {kind.__name__.lower()} named {child.name!r}."
        if not isinstance(child, nodes.If | nodes.CondExpr):  # in these when it renders
            yield from _unknown(child, environment)
