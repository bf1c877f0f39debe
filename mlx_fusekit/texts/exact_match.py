"""Exact match: the share of chat items whose whole answer a model gives greedily.

The answer is scored teacher-forced, in one forward pass an item: every answer token must be the
arg-max at its position. By induction over positions that is the same as greedy decoding
producing exactly the answer, and much cheaper.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import mlx.core as mx


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class ChatItem(TypedDict):
    """One line of mlx-lm's chat format; the last message is the answer to be scored."""

    messages: list[Message]


class ScoredTokens(NamedTuple):
    """A conversation as token ids; ``tokens[offset:]`` is the answer up to its end-of-turn."""

    tokens: list[int]
    offset: int


def load_chat_items(path: str | Path) -> list[ChatItem]:
    """Read a JSONL file of chat items whose last message is the assistant's.

    Raises ValueError, naming file and line, for a line that is not such an item.
    """
    items: list[ChatItem] = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                items.append(_parse_item(line, f"{path}:{number}"))
    return items


def exact_match(
    model: Any, tokenizer: Any, items: Sequence[ChatItem], batch_size: int = 8
) -> float:
    """Return the share (0 to 1) of ``items`` whose every answer token is the arg-max.

    ``model`` and ``tokenizer`` are what ``mlx_lm.load`` returns. The answer runs from the end of
    the generation prompt through the end-of-turn token, where greedy decoding would stop.

    Raises ValueError when there are no items, or when the chat template does not render the
    prompt as a prefix of the conversation, so that the answer's start is undefined.
    """
    if not items:
        raise ValueError("exact_match needs at least one item")
    encoded = [encode_chat_item(tokenizer, item) for item in items]
    matched = sum(sum(_matches(model, batch)) for batch in _batches(encoded, batch_size))
    return matched / len(items)


def encode_chat_item(tokenizer: Any, item: ChatItem, tools: Any = None) -> ScoredTokens:
    """Tokenize as mlx-lm's ``ChatDataset`` with ``mask_prompt`` does, cut after end-of-turn.

    Some templates write text behind the end-of-turn token (ChatML: a newline), which greedy
    decoding never reaches, so it is not part of the answer.
    """
    render = partial(tokenizer.apply_chat_template, tools=tools, return_dict=False)
    messages = item["messages"]
    tokens = list(render(messages))
    prompt = list(render(messages[:-1], add_generation_prompt=True))
    offset = len(prompt)
    if tokens[:offset] != prompt or len(tokens) == offset:
        raise ValueError(
            "the chat template does not render the prompt as a proper prefix of the conversation"
        )
    ends = _end_of_turn_ids(tokenizer)
    stop = next((i + 1 for i in range(offset, len(tokens)) if tokens[i] in ends), len(tokens))
    return ScoredTokens(tokens[:stop], offset)


def _parse_item(line: str, where: str) -> ChatItem:
    """Check one JSONL line; ``where`` names it in the error."""
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    messages = item.get("messages") if isinstance(item, dict) else None
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f'{where}: expected {{"messages": [...]}} with at least two messages')
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: every message needs a role and a content")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the last message must be the assistant's")
    return ChatItem(messages=messages)


def _end_of_turn_ids(tokenizer: Any) -> set[int]:
    """Ids at which generation stops: mlx-lm's wrapper may know several, a plain tokenizer one."""
    several = getattr(tokenizer, "eos_token_ids", None)
    return set(several) if isinstance(several, Collection) else {tokenizer.eos_token_id}


def _batches(encoded: Sequence[ScoredTokens], size: int) -> Iterator[list[ScoredTokens]]:
    """Yield batches of similar length, so that little of the work is padding."""
    by_length = sorted(encoded, key=lambda item: len(item.tokens))
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]


def _matches(model: Any, batch: Sequence[ScoredTokens]) -> list[bool]:
    """Tell for each sequence whether its whole answer is the arg-max.

    Padding goes to the right, where causal attention keeps it away from every scored position.
    """
    width = max(len(item.tokens) for item in batch)
    inputs = mx.array([item.tokens + [0] * (width - len(item.tokens)) for item in batch])
    # The logits at position i predict token i + 1.
    predicted = cast(list[list[int]], mx.argmax(model(inputs[:, :-1]), axis=-1).tolist())
    return [
        row[item.offset - 1 : len(item.tokens) - 1] == item.tokens[item.offset :]
        for row, item in zip(predicted, batch, strict=True)
    ]
