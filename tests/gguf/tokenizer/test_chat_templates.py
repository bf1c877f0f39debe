"""What Jinja would find wrong in a template, without rendering or compiling it."""

import time
from collections.abc import Iterator

import pytest

from mlx_fusekit.gguf.tokenizer.chat_templates import template_notes


def notes(template: str) -> Iterator[str]:
    return template_notes({"default": template})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ x|nofilter }}", "line 1: No filter named 'nofilter'."),
        ("\n{{ x is nosuch }}", "line 2: No test named 'nosuch'."),
        ("{% for m in x %}", "Unexpected end of template"),
        ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "nested too deeply"),
    ],
)
def test_faults(template: str, said: str) -> None:
    (note,) = notes(template)
    assert said in note


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role is defined %}{{ m|trim }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% break %}{% endfor %}",
        "{% if q %}{{ x|a_filter_of_newer_programs }}{% endif %}",
    ],
)
def test_templates_that_jinja_takes(template: str) -> None:
    assert not list(notes(template))


@pytest.mark.parametrize(
    "template", ["{{ 'a' * 10000000000 }}", "{{ 'a'|center(10000000000) }}", "{{ 9**9**9 }}"]
)
def test_what_is_constant_is_not_computed(template: str) -> None:
    start = time.perf_counter()
    assert not list(notes(template))
    assert time.perf_counter() - start < 1
