"""Chat templates, which are programs of strangers, with a limit on what they may use.

They are rendered by transformers itself, in a process of its own that the system ends when a
template asks for too much: Jinja's sandbox keeps a template from the machine's files, not from its
time and memory.
"""

import atexit
import contextlib
import json
import os
import selectors
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from mlx_fusekit import processes
from mlx_fusekit.errors import ResourceError
from mlx_fusekit.reading import exists


@dataclass(frozen=True)
class Limits:
    """What the templates of one tokenizer may use; real ones take a few milliseconds.

    Attributes:
        seconds: of processor time, for a conversation and all before it.
        seconds_each: that every conversation adds to what is left of them.
        memory: bytes, beside those of a process without a template.
        characters: of text, beside ten times those of the conversation.
        patience: seconds of wall-clock time, for one that waits rather than computes.
    """

    seconds: float = 10.0
    seconds_each: float = 0.05
    memory: int = 1_000_000_000
    characters: int = 100_000
    patience: float = 60.0


LIMITS = Limits()
#: Bytes that a renderer may have without a template.
_WITHOUT = 200_000_000
#: How often a renderer that takes long is looked at, where the system does not limit its memory.
_LOOK_SECONDS = 0.05


def limit_templates(tokenizer: Any, folder: Path) -> None:
    """Let a tokenizer render its chat templates within :data:`LIMITS`.

    What it raises for a template that cannot render a conversation is ``jinja2.TemplateError``,
    and for one that asks for too much :class:`~mlx_fusekit.errors.ResourceError`. A tokenizer that
    renders by code of its own, mlx-lm's or trusted code of the folder, is left as it is.

    Args:
        tokenizer: as ``mlx_lm.load`` returns it.
        folder: where it was loaded from.
    """
    from transformers import PreTrainedTokenizerBase

    wrapped: Any = getattr(tokenizer.encode, "__self__", None)  # transformers', in mlx-lm's
    own = getattr(type(wrapped), "apply_chat_template", None)
    if own is not PreTrainedTokenizerBase.apply_chat_template or wrapped.chat_template is None:
        return
    file = folder / "chat_template.jinja"  # which transformers takes before the configuration's
    file = file if exists(file) else folder / "tokenizer_config.json"
    wrapped.apply_chat_template = _Templates(wrapped, file).apply


class _Templates:
    """The chat templates of one tokenizer of transformers."""

    def __init__(self, tokenizer: Any, file: Path) -> None:
        self._tokenizer = tokenizer
        self._file = file
        self._seconds = LIMITS.seconds

    def apply(
        self, conversation: Any, *, tokenize: bool = True, return_dict: bool = False, **options: Any
    ) -> Any:
        """In the place of ``apply_chat_template``: text, or its token ids."""
        assert not return_dict, "mlx-lm's wrapper never asks for one"
        request = {
            "template": self._tokenizer.chat_template,
            "special_tokens": self._tokenizer.special_tokens_map,
            "options": {"conversation": conversation, **options},
        }
        limits = {
            "seconds": self._seconds,
            "memory": LIMITS.memory,
            "characters": LIMITS.characters + 10 * len(json.dumps(request["options"])),
        }
        found = _renderer().ask(json.dumps(request | limits).encode() + b"\n")
        if "excess" in found:
            raise ResourceError(
                f"{self._file}: the chat template {found['excess']} for a conversation; put back "
                "the one that the model came with"
            )
        left = self._seconds - found["seconds"] + LIMITS.seconds_each
        self._seconds = min(max(left, LIMITS.seconds_each), LIMITS.seconds)
        if "fault" in found:
            raise jinja2.TemplateError(found["fault"])
        if not tokenize:
            return found["text"]
        return self._tokenizer.encode(found["text"], add_special_tokens=False, verbose=False)


class _Renderer:
    """The process that renders."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._process = processes.start(processes.python_module("mlx_fusekit.texts.rendering"))

    def ask(self, request: bytes) -> dict[str, Any]:
        """Its answer, or what ended it."""
        with self._lock:
            found = None
            try:
                found = self._answer(request)
            finally:
                if found is None:
                    self.end()
        return found or {"excess": self._why_it_ended()}

    def end(self) -> None:
        """End it, and forget it."""
        _renderers.clear()
        self._process.kill()
        self._process.communicate()

    def _answer(self, request: bytes) -> dict[str, Any] | None:
        """Its answer; None where it ended instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(request)
            self._process.stdin.flush()
        start, line = time.monotonic(), bytearray()
        pipe = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if selector.select(_LOOK_SECONDS):
                    part = os.read(pipe, 1 << 20)
                    if not part:
                        self._process.wait()
                        return None
                    line += part
                elif processes.resident_bytes(self._process.pid) > LIMITS.memory + _WITHOUT:
                    self._process.send_signal(signal.SIGKILL)
                elif time.monotonic() - start > LIMITS.patience:
                    self._process.send_signal(signal.SIGPROF)
        found: dict[str, Any] = json.loads(line)
        return found

    def _why_it_ended(self) -> str:
        status = self._process.returncode
        if status == -signal.SIGPROF:
            return "takes too long"
        if status == -signal.SIGKILL:  # as Linux does when memory is short
            return "takes too much memory"
        if status == -signal.SIGSEGV:
            return "nests too deeply"
        raise RuntimeError(f"the process that renders chat templates ended with {status}")


#: The one of this process; a fork has its own.
_renderers: list[_Renderer] = []


def _renderer() -> _Renderer:
    if not _renderers or _renderers[0].owner != os.getpid():
        _renderers[:] = [_Renderer()]
    return _renderers[0]


@atexit.register
def _end_renderers() -> None:
    for renderer in _renderers:
        if renderer.owner == os.getpid():
            renderer.end()
