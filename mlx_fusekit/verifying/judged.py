"""A GGUF file in llama.cpp, in the place of one of mlx-lm's models, to be measured beside them."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fusekit.running.llamacpp import LlamaCpp
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.structure import Check

_NAMED = 3


class _History:
    """What was run before, in the place of a layer's key-value cache."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.state: list[mx.array] = []


class JudgedGguf:
    """Called as mlx-lm's models are: token ids ``[batch, tokens]`` to logits."""

    def __init__(self, running: LlamaCpp) -> None:
        self._running = running

    def make_cache(self) -> list[Any]:
        """mlx-lm asks the model for its cache."""
        return [_History()]

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Logits ``[batch, tokens, vocabulary]``; with a cache, of tokens that follow others.

        llama.cpp runs one text at a time, from its start, so that long texts in several pieces take
        longer than in one.
        """
        rows = [list(row) for row in np.array(tokens).tolist()]
        width = tokens.shape[1]
        if cache is not None:
            before = cache[0].tokens or [[] for _ in rows]
            rows = cache[0].tokens = [old + new for old, new in zip(before, rows, strict=True)]
        return mx.array(np.stack([self._running.logits(row)[-width:] for row in rows]))


def check_tokenization(
    running: LlamaCpp, tokenizer: Any, sequences: Sequence[TokenSequence]
) -> Check:
    """Whether llama.cpp cuts the texts into the same tokens as the model's own tokenizer.

    Args:
        running: the file.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        sequences: their texts are compared, special tokens as such.
    """
    different = []
    for sequence in sequences:
        text = tokenizer.decode(list(sequence.tokens))
        expected = list(tokenizer.encode(text, add_special_tokens=False))
        if running.tokenize(text) != expected:
            different.append(text)
    detail = f"{len(sequences) - len(different)} of {len(sequences)} texts"
    if different:
        detail += f"; not {', '.join(repr(text[:40]) for text in different[:_NAMED])}"
    return Check("same tokens in llama.cpp", not different, detail)
