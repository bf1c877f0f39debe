"""Chat templates of strangers: what asks for too much ends, and real ones give the same text."""

import json
import os
import shutil
import time
from pathlib import Path

import jinja2
import pytest
from mlx_lm.utils import load_tokenizer

from mlx_fusekit import export_gguf, fuse, processes, samples, verify
from mlx_fusekit.bench.workload import text_prompt
from mlx_fusekit.errors import CheckpointError, FusekitError, ResourceError
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running.tokenizers import tokenizer_of
from mlx_fusekit.texts import templates
from mlx_fusekit.texts.data import read_sequences
from mlx_fusekit.texts.templates import Limits, limit_templates

FILE = "chat_template.jinja"
MEMORY = 100_000_000
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "é <&>"}}]

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{{ 'x' * 10**12 }}"
#: What takes too much of this machine, and of what.
GREEDY = {
    "loops in loops": (LOOP, "too long"),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "too long",
    ),
    "a power of a power": ("{% set n = messages|length %}{{ (9 + n) ** (10**10) }}", "too long"),
    "a string times a number": ("{{ 'x' * 10**10 }}", "memory"),
    "a string times a number that is computed late": (
        "{% set n = messages|length * 10**10 %}{{ 'x' * n }}",
        "memory",
    ),
    "a list times a number": ("{{ (messages * 10**10)|length }}", "memory"),
    "center": ("{{ 'x'|center(10**10) }}", "memory"),
    "a format of ten thousand million digits": ("{{ '%10000000000d' % 1 }}", "memory"),
    "format()": ("{{ '{:>10000000000}'.format('x') }}", "memory"),
    "a text that doubles": (
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}{{ ns.x }}",
        "memory|too long",
    ),
    "a list that doubles": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}",
        "memory|too long",
    ),
    "a range as text": ("{{ range(99999)|list|string * 100000 }}", "memory"),
    "indented JSON": ("{{ messages|tojson(indent=1000000000) }}", "memory"),
    "batches": ("{{ [1]|batch(1000000000, 'x')|list }}", "memory"),
    "much text": ("{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %}", "too much text"),
}
#: What Jinja does not do, and in which words it says so.
REFUSED = {
    "a macro that calls itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "RecursionError",
    ),
    "a division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "loops in loops in loops": ("{% for a in 'a' %}" * 25 + "{% endfor %}" * 25, "SyntaxError"),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
    "a number of many digits": ("{{ 10**100000 }}", "digits"),
    "an end that is missing": ("{% if a %}", "line 1"),
    "a way to the system": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a range that is too long": ("{{ range(10**400) }}", "OverflowError"),
    "its own words": ("{{ raise_exception('no\nsuch role') }}", "no such role"),
}
#: Features that real templates use.
REAL = {
    "turns": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
    ),
    "tools": (
        "{% if tools %}{{ tools | tojson(indent=2) }}{{ tools | tojson }}{% endif %}"
        "{{ bos_token }}{{ messages[-1]['content'] }}{{ eos_token }}"
    ),
    "state": (
        "{% set ns = namespace(last='', count=0) %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.last = m.content %}"
        "{% set ns.count = ns.count + 1 %}{% if ns.count > 9 %}{% break %}{% endif %}{% endfor %}"
        "{{ ns.count }}{{ ns.last }}"
    ),
    "macros and training": (
        "{% macro turn(m) -%}[{{ m.role | upper }}]{{ caller() }}{%- endmacro %}"
        "{% for m in messages %}{% call turn(m) %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endcall %}{% endfor %}"
    ),
    "the date and thoughts": (
        "{{ strftime_now('%d %b %Y') }}{{ enable_thinking is defined and enable_thinking }}"
        "{{ dict(a=1) | tojson }}{{ messages[0].reasoning_content | default('none') }}"
    ),
    "refuses tools": "{% if tools %}{{ raise_exception('none') }}{% endif %}{{ messages }}",
    "several": {"default": "{{ messages[0].content }}", "tool_use": "{{ tools | tojson }}"},
    "none by default": {"rag": "{{ messages[0].content }}"},
}


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "LIMITS", Limits(seconds=0.3, memory=MEMORY))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory as little, and of time what a machine with other work may need for that."""
    monkeypatch.setattr(templates, "LIMITS", Limits(seconds=20, memory=MEMORY))


def tokenizer_with(template, *, limited=True):
    tokenizer = load_tokenizer(samples.model_path())
    tokenizer.encode.__self__.chat_template = template
    if limited:
        limit_templates(tokenizer, samples.model_path())
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose template takes more memory than there is, which ends no process."""
    shutil.copytree(samples.model_path(), tmp_path / "model")
    (tmp_path / "model" / FILE).write_text(HUGE)
    return tmp_path / "model"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    return path


@pytest.mark.parametrize("name", GREEDY)
def test_a_template_that_asks_for_too_much_ends(name: str, limited, request) -> None:
    template, excess = GREEDY[name]
    if "too long" not in excess:
        request.getfixturevalue("patient")
    tokenizer = tokenizer_with(template)
    start = time.monotonic()
    with pytest.raises(ResourceError, match=excess) as refused:
        tokenizer.apply_chat_template(CHAT)
    assert time.monotonic() - start < 20  # with the start of another process
    assert FILE in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_limit_of_memory_holds(patient) -> None:
    # Of a number that Jinja cannot know before: it writes what it knows into a program.
    fits = "{{% set x = 'x' * (messages|length * {} // 2) %}}{{{{ x[0] }}}}"
    assert tokenizer_with(fits.format(MEMORY // 2)).apply_chat_template(CHAT, tokenize=False) == "x"
    with pytest.raises(ResourceError, match="memory"):
        tokenizer_with(fits.format(MEMORY * 2)).apply_chat_template(CHAT)


def test_memory_is_watched_where_the_system_does_not_limit_it(monkeypatch) -> None:
    """As on macOS."""
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="memory"):
        patch.setattr(processes, "resident_bytes", lambda _: 1 << 40)
        tokenizer_with(LOOP).apply_chat_template(CHAT)
    assert tokenizer_with(REAL["turns"]).apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize("where", ["/proc", "ps"])
def test_the_size_of_a_process_is_known(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "ps":
        if processes.program("ps") is None:
            pytest.skip("there is no ps")
        monkeypatch.setattr(Path, "read_text", refuse)
    assert 10_000_000 < processes.resident_bytes(os.getpid()) < 100_000_000_000


def refuse(*_):
    raise FileNotFoundError


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_rendered_is_none(name: str, tmp_path: Path, chats) -> None:
    """As ever for these, the conversation is read as text."""
    template, words = REFUSED[name]
    tokenizer = tokenizer_with(template)
    with pytest.raises(jinja2.TemplateError, match=words) as refused:
        tokenizer.apply_chat_template(CHAT)
    assert "\n" not in str(refused.value)
    (sequence,) = read_sequences(chats, tokenizer)
    assert tokenizer.decode(sequence.tokens) == "Hi\nHello<|im_end|>"


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("tokenize", [True, False], ids=["tokens", "text"])
def test_text_and_tokens_are_those_of_transformers(name, tools, tokenize) -> None:
    texts = []
    for limited in (False, True):
        tokenizer = tokenizer_with(REAL[name], limited=limited)
        for messages in (CHAT[:1], CHAT, [{"role": "system", "content": "Ünï"}, *CHAT]):
            for prompt in (False, True):
                try:
                    text = tokenizer.apply_chat_template(
                        messages,
                        tools=tools,
                        add_generation_prompt=prompt,
                        tokenize=tokenize,
                        return_dict=False,
                    )
                except (ValueError, jinja2.TemplateError):
                    text = "refused"
                texts.append(text)
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]
    assert len(texts) == 12


def test_many_conversations_are_no_excess(limited) -> None:
    """Time is counted for each; all of them may take longer than one may."""
    tokenizer = tokenizer_with("{% for i in range(60000) %}{% endfor %}{{ messages[0].content }}")
    start = time.process_time()
    for _ in range(60):
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "Hi"
    assert time.process_time() - start < 5


def test_slow_conversations_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "LIMITS", Limits(seconds=0.3, seconds_each=0.001))
    tokenizer = tokenizer_with(
        "{% for i in range(2000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ResourceError, match="too long"):
        for _ in range(100):
            tokenizer.apply_chat_template(CHAT)


def test_a_fork_asks_a_process_of_its_own() -> None:
    tokenizer = tokenizer_with(REAL["turns"])
    expected = tokenizer.apply_chat_template(CHAT)
    child = os.fork()
    if child == 0:
        same = all(tokenizer.apply_chat_template(CHAT) == expected for _ in range(20))
        templates._end_renderers()
        os._exit(0 if same else 1)
    assert all(tokenizer.apply_chat_template(CHAT) == expected for _ in range(20))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_tokenizer_of_a_model_is_limited(folder: Path, limited) -> None:
    tokenizer = tokenizer_of(LocalFolder(folder, "model"), {})
    with pytest.raises(ResourceError, match=FILE):
        tokenizer.apply_chat_template(CHAT)
    with pytest.raises(ResourceError, match=FILE):
        text_prompt("Hi", tokenizer)


def test_a_template_of_the_configuration_is_named(folder: Path, limited) -> None:
    (folder / FILE).unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": HUGE}))
    with pytest.raises(ResourceError, match=r"tokenizer_config\.json"):
        tokenizer_of(LocalFolder(folder, "model"), {}).apply_chat_template(CHAT)


def test_calibrating_names_the_template(folder: Path, tmp_path: Path, chats, limited) -> None:
    with pytest.raises(FusekitError, match=FILE):
        fuse(folder, samples.adapter_path(), tmp_path / "fused", calibration=chats)
    assert not (tmp_path / "fused").exists()


def test_verifying_names_the_template(folder: Path, chats, limited) -> None:
    with pytest.raises(FusekitError, match=FILE):
        verify(folder, samples.adapter_path(), folder, data=chats)


def test_an_export_does_not_render_it(folder: Path, tmp_path: Path) -> None:
    (folder / FILE).write_text("{{ 10 ** (10 ** 10) }}")
    start = time.monotonic()
    export_gguf(folder, tmp_path / "model.gguf")
    assert time.monotonic() - start < 20


def test_an_export_refuses_a_template_of_a_million_characters(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / FILE).write_text("a" * 1_000_001)
    with pytest.raises(CheckpointError, match=FILE):
        export_gguf(folder, tmp_path / "model.gguf")
    (folder / FILE).unlink()
    config["chat_template"] = [{"name": "default", "template": "a" * 1_000_001}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
