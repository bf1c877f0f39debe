"""Renders chat templates, which are programs of strangers, in a process of its own.

Run as ``python -m mlx_fusekit.texts.rendering``: it reads a request a line from stdin and answers
with a line on stdout, both JSON. :mod:`mlx_fusekit.texts.templates` starts it and asks.
"""

import contextlib
import json
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

_LONGEST_FAULT = 500


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Render what a request says; the process ends at once when that takes too long.

    Returns:
        ``text``; or ``fault``, what there is against the template; or ``excess``, what of it is too
        much. And the ``seconds`` of processor time that it took.
    """
    tokenizer = _tokenizer(request["template"], request["special_tokens"])
    before = time.process_time()
    _limit_memory(request["memory"])
    # Of the default action: no Python code runs before a long multiplication ends.
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    try:
        text = str(tokenizer.apply_chat_template(tokenize=False, **request["options"]))
        long = len(text) > request["characters"]
        found = {"excess": "writes too much text"} if long else {"text": text}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a template can raise anything
        found = {"fault": _words(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _limit_memory(None)
    return found | {"seconds": time.process_time() - before}


def _tokenizer(template: Any, special_tokens: dict[str, Any]) -> Any:
    """As much of a tokenizer of transformers as renders a template."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    class Tokenizer:
        chat_template = template
        special_tokens_map = special_tokens
        get_chat_template = PreTrainedTokenizerBase.get_chat_template
        apply_chat_template = PreTrainedTokenizerBase.apply_chat_template

    return Tokenizer()


def _words(error: Exception) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        said = f"line {error.lineno}: {error.message}"
    elif isinstance(error, TemplateError):
        said = str(error)
    else:
        said = f"{type(error).__name__}: {error}"
    return " ".join(said.split())[:_LONGEST_FAULT]


def _limit_memory(more: int | None) -> None:
    """Let the process have so many bytes more than it has; macOS does not hold it to that."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = most
    with contextlib.suppress(OSError, ValueError):
        if more is not None:
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
            limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def main() -> None:
    """Answer until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends it
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        try:
            reply = json.dumps(answer(json.loads(line)))
        except MemoryError:
            reply = json.dumps({"excess": "takes too much memory"})
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
