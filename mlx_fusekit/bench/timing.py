"""One timed generation, as mlx-lm generates."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import (
    BatchGenerator,
    generate_step,
    generation_stream,
    wired_limit,
)

from mlx_fusekit.bench.options import PREFILL_STEP


@dataclass(frozen=True)
class Timing:
    """When the tokens of a generation came.

    Of a batch, a step brings one token of each of its sequences.

    Attributes:
        ttft_seconds: from the start until the first token was there; of a batch, until every
            sequence had one.
        itl_seconds: the gaps between the tokens that followed, one fewer than tokens.
        tokens: what was generated, ``[batch][tokens]``.
    """

    ttft_seconds: float
    itl_seconds: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]


def time_generation(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    generation_tokens: int,
    *,
    prefill_step: int = PREFILL_STEP,
) -> Timing:
    """Generate greedily and note when each token came; an end-of-sequence token does not end it.

    The work that mlx-lm schedules ahead is waited for before this returns, and Python's garbage
    collector runs before, not during.

    Args:
        model: mlx-lm's.
        prompts: token ids, all of one length; more than one run through mlx-lm's batch generator.
        generation_tokens: of each prompt, at least one.
        prefill_step: tokens of a prompt that go through the model at once.
    """
    generate = _one if len(prompts) == 1 else _batch
    gc.collect()
    mx.synchronize(generation_stream)
    gc.disable()
    try:
        with wired_limit(model, [generation_stream]):
            return generate(model, prompts, generation_tokens, prefill_step)
    finally:
        gc.enable()
        mx.synchronize(generation_stream)
        mx.clear_cache()


def _one(
    model: nn.Module, prompts: Sequence[Sequence[int]], generation_tokens: int, prefill_step: int
) -> Timing:
    prompt = mx.array(list(prompts[0]))
    mx.eval(prompt)
    tokens: list[int] = []
    stamps: list[float] = []
    start = time.perf_counter()
    steps = generate_step(
        prompt, model, max_tokens=generation_tokens, prefill_step_size=prefill_step
    )
    for token, _ in steps:
        stamps.append(time.perf_counter())
        tokens.append(token)
    return _timing(start, stamps, [tokens])


def _batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], generation_tokens: int, prefill_step: int
) -> Timing:
    """All prompts are processed together, so that all sequences generate at every step."""
    size = len(prompts)
    generator: Any = BatchGenerator(
        model,
        completion_batch_size=size,
        prefill_batch_size=size,
        prefill_step_size=prefill_step,
    )
    try:
        tokens: dict[int, list[int]] = {}
        stamps: list[float] = []
        start = time.perf_counter()
        for uid in generator.insert([list(p) for p in prompts], [generation_tokens] * size):
            tokens[uid] = []
        while responses := generator.next_generated():
            stamps.append(time.perf_counter())
            for response in responses:
                tokens[response.uid].append(response.token)
    finally:
        generator.close()
    return _timing(start, stamps, list(tokens.values()))


def _timing(start: float, stamps: Sequence[float], tokens: Sequence[Sequence[int]]) -> Timing:
    gaps = tuple(after - before for before, after in pairwise(stamps))
    return Timing(stamps[0] - start, gaps, tuple(tuple(sequence) for sequence in tokens))
