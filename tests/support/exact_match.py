"""Exact match of chat items, by another way than the package's: mlx-lm's own tokens, one by one."""

import json

import mlx.core as mx
from mlx_lm.tuner.datasets import ChatDataset


def load_chat_items(path):
    """The lines of a file of conversations, all of which end with the assistant."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def encode_chat_item(tokenizer, item):
    """Tokens up to the end of the answer, where greedy decoding stops, and the answer's start."""
    tokens, start = ChatDataset([], tokenizer, mask_prompt=True).process(item)
    stop = next(i for i in range(start, len(tokens)) if tokens[i] in tokenizer.eos_token_ids)
    return tokens[: stop + 1], start


def exact_match(model, tokenizer, items):
    """The share of the items whose every answer token is the arg-max, as greedy decoding needs."""
    matched = 0
    for tokens, start in (encode_chat_item(tokenizer, item) for item in items):
        likely = mx.argmax(model(mx.array([tokens[:-1]])), axis=-1)[0].tolist()
        matched += likely[start - 1 :] == tokens[start:]
    return matched / len(items)
