"""Continuations of many prompts, drawn from a model together."""

import contextlib
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fusekit.progress import Progress
from mlx_fusekit.texts.chat import end_ids, special_ids
from mlx_fusekit.texts.tokens import token_rows

_BATCH = 32


@dataclass
class Report:
    """Progress that never goes back, though samples may be dropped."""

    progress: Progress | None
    total: int
    kept: int = 0
    _sampled: int = field(default=0, init=False)
    _shown: int = field(default=0, init=False)

    def keep(self, tokens: int) -> None:
        """Say that so many tokens are kept in all, and the sampled ones among them."""
        self.kept, self._sampled = tokens, 0

    def sampled(self) -> None:
        """Say that one more token was sampled."""
        self._sampled += 1
        self._show(min(self.kept + self._sampled, self.total))

    def finish(self) -> None:
        """Say that all is done."""
        self._show(self.total)

    def _show(self, done: int) -> None:
        if self.progress is not None and done > self._shown:
            self._shown = done
            self.progress(done, self.total)


@dataclass(frozen=True)
class Job:
    """A prompt to be continued.

    Attributes:
        prompt: token ids, at least one.
        room: most tokens to add, at least one.
        stops: tokens that end the text, and are part of it.
        then: called with the added tokens, may return what is to be continued next.
    """

    prompt: list[int]
    room: int
    stops: frozenset[int]
    then: Callable[[list[int]], "Job | None"]


class Sampler:
    """Draws continuations from a model at temperature 1, with random numbers of its own."""

    def __init__(self, model: nn.Module, tokenizer: Any, seed: int, report: Report) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.ends = end_ids(tokenizer)
        self.special = special_ids(tokenizer)
        self.report = report
        self._key = mx.random.key(seed)
        self._random = random.Random(seed)  # noqa: S311
        self._mask: mx.array | None = None

    def random_token(self) -> int:
        """A token of printable text, from all over the vocabulary."""
        known = len(self.tokenizer)
        rows = token_rows(self.model, {}) or known
        for _ in range(1000):
            token = self._random.randrange(min(known, rows))
            text = str(self.tokenizer.decode([token])).strip()
            if token not in self.special and text and text.isprintable() and "\ufffd" not in text:
                break
        return token

    def run(self, jobs: Sequence[Job], shared: Sequence[int] = ()) -> None:
        """Do the jobs, and those that come of them; ``shared`` begins many of their prompts."""
        from mlx_lm.models.cache import make_prompt_cache

        # mlx-lm's server asks the same before it batches.
        if all(hasattr(cache, "merge") for cache in make_prompt_cache(self.model)):
            self._run_batched(jobs, shared)
        else:
            self._run_one_by_one(jobs)

    def _run_batched(self, jobs: Sequence[Job], shared: Sequence[int]) -> None:
        from mlx_lm.generate import BatchGenerator

        prefix = list(shared[:-1])
        insert = functools.partial(_insert, prefix=prefix, cache=self._cache(prefix))
        # Closing gives Metal's wired limit back.
        with contextlib.closing(
            BatchGenerator(
                self.model,
                sampler=self._draw,
                completion_batch_size=_BATCH,
                prefill_batch_size=_BATCH,
                stream=mx.default_stream(mx.default_device()),
            )
        ) as generator:
            active = insert(generator, jobs)
            while active:
                following = []
                for response in generator.next_generated():
                    job, text = active[response.uid]
                    text.append(int(response.token))
                    self.report.sampled()
                    if response.finish_reason is not None:
                        del active[response.uid]
                        following.append(job.then(text))
                active |= insert(generator, [job for job in following if job is not None])

    def _run_one_by_one(self, jobs: Sequence[Job]) -> None:
        from mlx_lm.generate import generate_step

        stream = mx.default_stream(mx.default_device())
        for first in jobs:
            job: Job | None = first
            while job is not None:
                text: list[int] = []
                prompt = mx.array(job.prompt)
                for token, _ in generate_step(
                    prompt, self.model, stream, max_tokens=job.room, sampler=self._draw
                ):
                    text.append(int(token))
                    self.report.sampled()
                    if text[-1] in job.stops:
                        break
                job = job.then(text)

    def _cache(self, tokens: list[int]) -> list[Any] | None:
        """The model's cache after these tokens, None after none."""
        from mlx_lm.models.cache import make_prompt_cache

        if not tokens:
            return None
        cache: list[Any] = make_prompt_cache(self.model)
        self.model(mx.array([tokens]), cache=cache)
        mx.eval([layer.state for layer in cache])
        return cache

    def _draw(self, logprobs: mx.array) -> mx.array:
        """Tokens ``[batch]`` drawn from log-probabilities ``[batch, vocabulary]``."""
        if self._mask is None:
            self._mask = mx.array(self._barred(logprobs.shape[-1]))
        self._key, key = mx.random.split(self._key)
        allowed = mx.where(self._mask, -mx.inf, logprobs.astype(mx.float32))
        return mx.random.categorical(allowed, key=key)

    def _barred(self, vocabulary: int) -> list[bool]:
        """Ids that are no token, or one that no text goes on with (BOS, padding, unknown)."""
        known = len(self.tokenizer)
        never = {
            self.tokenizer.bos_token_id,
            self.tokenizer.pad_token_id,
            self.tokenizer.unk_token_id,
        } - self.ends
        return [token >= known or token in never for token in range(vocabulary)]


def _insert(
    generator: Any, jobs: Sequence[Job], prefix: list[int], cache: list[Any] | None
) -> dict[int, tuple[Job, list[int]]]:
    """Hand jobs to mlx-lm's ``BatchGenerator``; of those that begin with the prefix, the rest.

    Returns:
        Each job and its text, still empty, by the generator's number for it.
    """
    from mlx_lm.generate import StopSequences

    if not jobs:
        return {}
    known = [cache is not None and job.prompt[: len(prefix)] == prefix for job in jobs]
    ids = generator.insert(
        [job.prompt[len(prefix) * k :] for job, k in zip(jobs, known, strict=True)],
        [job.room for job in jobs],
        # The generator copies the caches it is given, and makes those it is not.
        caches=[cache if k else None for k in known],
        stop_sequences=[StopSequences([[t] for t in sorted(job.stops)]) for job in jobs],
    )
    return {i: (job, []) for i, job in zip(ids, jobs, strict=True)}
