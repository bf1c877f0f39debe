"""Chat templates with tags that transformers knows and plain Jinja does not."""

import shutil
from pathlib import Path
from typing import Any

import gguf
import jinja2
import pytest
import transformers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support.command import exit_code

from mlx_fusekit import export_gguf, samples

MESSAGES = [
    {"role": "user", "content": "Which tables are there?"},
    {"role": "assistant", "content": " Two. "},
]
#: As SmolLM3 and LFM2.5 have it: with and without control of white space, in loops and conditions.
MARKED = """\
{%- for message in messages %}
  {% if message.role == 'assistant' %}
    {{- '<|im_start|>assistant' }}
    {% generation %}
      {{ message.content }}{{ '<|im_end|>' }}
    {% endgeneration %}
  {%- else %}
    {%- generation -%}  {{ message.content }}  {%- endgeneration -%}
    {%+ generation +%} x {%generation%}y{% endgeneration%}{%- endgeneration %}
  {% endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}
"""
#: As Command R7B has it; llama.cpp and llama-cpp-python know these.
LOOPS = "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}"


def model_with_template(folder: Path, template: str, **named: str) -> Path:
    shutil.copytree(samples.model_path(), folder)
    (folder / "chat_template.jinja").write_text(template)
    for name, text in named.items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    return folder


def exported(model: Path, file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    report = export_gguf(model, file)
    keys = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    return keys, report.notes


def plain_jinja(text: str) -> jinja2.Template:
    """As llama-cpp-python made it before it knew the tags."""
    extensions = ["jinja2.ext.loopcontrols"]
    how = {"trim_blocks": True, "lstrip_blocks": True, "extensions": extensions}
    return ImmutableSandboxedEnvironment(**how).from_string(text)


def test_the_written_template_renders_the_same_everywhere(tmp_path: Path) -> None:
    model = model_with_template(tmp_path / "model", MARKED, rag=MARKED + "rag")
    keys, notes = exported(model, tmp_path / "model.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for name, template in (("", MARKED), (".rag", MARKED + "rag")):
        written = keys[f"tokenizer.chat_template{name}"]
        with pytest.raises(jinja2.TemplateSyntaxError, match="unknown tag 'generation'"):
            plain_jinja(template)
        for prompt in (False, True):
            how = {"add_generation_prompt": prompt}
            wanted = tokenizer.apply_chat_template(
                MESSAGES, chat_template=template, tokenize=False, **how
            )
            assert plain_jinja(written).render(messages=MESSAGES, **how) == wanted
    assert [note.partition(" marks ")[0] for note in notes if "template" in note] == [
        "the chat template",
        "the chat template 'rag'",
    ]


def test_it_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_with_template(tmp_path / "model", MARKED)
    asked = ["--model", str(model), "--gguf-path", str(tmp_path / "model.gguf"), "--dry-run"]
    assert exit_code(monkeypatch, "export-gguf", *asked) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: the chat template marks text for training with {% generation %}" in told


def test_templates_that_all_read_are_left_alone(tmp_path: Path) -> None:
    model = model_with_template(tmp_path / "model", LOOPS)
    keys, notes = exported(model, tmp_path / "model.gguf")
    assert keys["tokenizer.chat_template"] == LOOPS
    assert not any("template" in note for note in notes)


def test_a_template_that_jinja_cannot_read_is_named(tmp_path: Path) -> None:
    model = model_with_template(tmp_path / "model", "{{ 1 }}\n{% if x %}", rag="{% trans %}a")
    _, notes = exported(model, tmp_path / "model.gguf")
    first, second = (note for note in notes if "cannot be read by plain Jinja" in note)
    assert first.startswith("the chat template cannot")
    assert "line 2" in first
    assert second.startswith("the chat template 'rag'")
    assert "unknown tag 'trans'" in second
