"""Conversations and completions as mlx-lm trains on them, and where their answer begins."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import jinja2

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.texts.sequences import TokenSequence

#: What a chat template raises at a conversation it was not written for, and transformers where
#: there is no template.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
)

#: Characters that no token of any tokenizer has more of; most have about four.
_LONGEST_TOKEN = 1024
#: Characters that are never cut, as of a role; and what each message counts for beside its text.
_SHORT = 64


def encode_item(item: Mapping[str, Any], tokenizer: Any) -> TokenSequence:
    """A checked line of mlx-lm's formats as tokens, its answer told apart where it has one.

    :func:`~mlx_fusekit.texts.data.read_sequences` says what is scored, and what comes of an item
    that the chat template cannot render.
    """
    if "prompt" in item and "completion" in item:
        asked = [{"role": "user", "content": item["prompt"]}]
        return _render(item, asked, tokenizer) or _joined(item, tokenizer)
    if "messages" in item:
        *before, last = item["messages"]
        sequence = _render(item, before if last["role"] == "assistant" else None, tokenizer)
        return sequence or _text("\n".join(_contents(item["messages"])), tokenizer)
    return _text(item["text"], tokenizer)


def shortened(item: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A checked item without most of what lies behind its first ``tokens`` tokens.

    Whatever the tokenizer is, so many tokens are left. Tokenizing what is cut off later can take
    minutes and gigabytes.
    """
    room = tokens * _LONGEST_TOKEN
    return {key: _within(value, room)[0] for key, value in item.items()}


def _within(value: Any, room: int) -> tuple[Any, int]:
    """A JSON value with about the first ``room`` characters of its texts; and the room left."""
    if isinstance(value, str):
        return value[: max(room, _SHORT)], room - len(value)
    if isinstance(value, list):
        members = []
        for member in value:
            is_full = room <= 0
            kept, room = _within(member, room - _SHORT)
            members.append(kept)
            if is_full:  # of messages one more than fit, so that none of those is the last
                break
        return members, room
    if isinstance(value, dict):
        entries = {}
        for key, member in value.items():
            entries[key], room = _within(member, room - len(key))
        return entries, room
    return value, room


def end_ids(tokenizer: Any) -> frozenset[int]:
    """Ids at which mlx-lm stops generating: its wrapper may know several, a tokenizer knows one."""
    several = getattr(tokenizer, "eos_token_ids", None)
    ids = several if isinstance(several, Collection) else [tokenizer.eos_token_id]
    return frozenset(int(token) for token in ids if token is not None)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that stand for no text: begin, end, padding, roles, modalities and the like."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = {int(token) for token, entry in added.items() if entry.special}
    return frozenset(special | set(tokenizer.all_special_ids))


def _render(
    item: Mapping[str, Any], question: list[dict[str, Any]] | None, tokenizer: Any
) -> TokenSequence | None:
    """An item through the chat template, None where that cannot render it.

    Some templates write text behind the end-of-turn token (ChatML: a line feed), which greedy
    decoding never reaches, so that it is no part of the answer.

    Args:
        item: with ``messages``, or ``prompt`` and ``completion``.
        question: the messages before the answer, None if it ends with no answer.
        tokenizer: mlx-lm's.
    """
    from mlx_lm.tuner.datasets import create_dataset

    try:
        tokens = list(create_dataset([item], tokenizer, SimpleNamespace()).process(item)[0])
    except CheckpointError:  # of the tokenizer
        raise
    except TEMPLATE_ERRORS:
        return None
    start = 0 if question is None else _answer_start(tokens, question, item.get("tools"), tokenizer)
    if not start:
        return TokenSequence(tuple(tokens))
    ends = end_ids(tokenizer)
    stop = next((i + 1 for i in range(start, len(tokens)) if tokens[i] in ends), len(tokens))
    return TokenSequence(tuple(tokens[:stop]), start, is_answer=True)


def _answer_start(
    tokens: list[int], question: list[dict[str, Any]], tools: Any, tokenizer: Any
) -> int:
    """Where the answer begins in a conversation's tokens, 0 where the template does not tell.

    mlx-lm's ``mask_prompt`` gives the length of the question, and does not look whether the
    conversation begins with it.
    """
    try:
        prompt = tokenizer.apply_chat_template(
            question, tools=tools, add_generation_prompt=True, return_dict=False
        )
    except CheckpointError:
        raise
    except TEMPLATE_ERRORS:  # what fails for the question alone may do for the whole
        return 0
    start = len(prompt)
    return start if start < len(tokens) and tokens[:start] == list(prompt) else 0


def _joined(item: Mapping[str, Any], tokenizer: Any) -> TokenSequence:
    """A completion appended to its prompt as it is."""
    end = tokenizer.eos_token_id
    prompt = list(tokenizer.encode(item["prompt"], verbose=False))
    if prompt[-1:] == [end]:
        prompt.pop()
    answer = list(tokenizer.encode(item["completion"], add_special_tokens=False, verbose=False))
    if end is not None:
        answer.append(end)
    if not prompt:
        return TokenSequence(tuple(answer))
    return TokenSequence((*prompt, *answer), len(prompt), is_answer=bool(answer))


def _text(text: str, tokenizer: Any) -> TokenSequence:
    """Tokens as mlx-lm's ``TextDataset`` gives them, with the end-of-text token.

    That class fails on an empty text, takes a tokenizer without an end token for one whose end is
    None, and lets transformers warn of texts longer than the model's context, which are cut later.
    """
    tokens = list(tokenizer.encode(text, verbose=False))
    end = tokenizer.eos_token_id
    if end is not None and tokens[-1:] != [end]:
        tokens.append(end)
    return TokenSequence(tuple(tokens))


def _contents(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The text of messages, whose content may be a string, parts, or missing (a tool call)."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            for part in content:
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    yield part["text"]
