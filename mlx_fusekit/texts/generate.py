"""Text sampled from a model itself, for calibrating and measuring without data.

That a model's own samples can stand in for its training data is from Liu et al. 2023, "LLM-QAT"
(arXiv 2305.17888); that a tuned model writes the user's turn too when it is given the template up
to there, from Xu et al. 2024, "Magpie" (arXiv 2406.08464).
"""

import contextlib
import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_fusekit.progress import Progress
from mlx_fusekit.texts.data import TEMPLATE_ERRORS, sequence_start
from mlx_fusekit.texts.seeds import derived_seed
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.texts.special import special_ids

_BATCH = 32
#: Shorter samples teach nothing, and come from a start that the model has no words for.
_LEAST_TOKENS = 8
#: How often in a row a kind of text may yield less new ones than this share of those asked for
#: before it is given up.
_PATIENCE = 2
_LEAST_YIELD = 0.3
#: Texts are made shorter for a small number of tokens, so that there are at least so many.
_LEAST_TEXTS = 16
#: Share of the tokens at which no further round is started, and how much more a round samples
#: than what its predecessor's mean length makes likely to be enough.
_NEARLY = 0.9
_SPARE = 1.1
#: Lines of a chat template this long are recognized, in characters.
_LEAST_LINE = 16
#: A word that no chat template writes by itself, and every tokenizer can.
_SENTINEL = "sentinelusermessage"


def generate_sequences(
    model: nn.Module,
    tokenizer: Any,
    *,
    tokens: int,
    seed: int,
    length: int = 160,
    chat_share: float = 0.75,
    progress: Progress | None = None,
) -> list[TokenSequence]:
    """Sample text at temperature 1 from the model.

    A conversation starts with the chat template up to the user's message, which the model writes,
    and goes on with its answer; its ``scored`` is the answer's start, and it is no ``is_answer``,
    since a sampled answer is not the arg-max one. Plain text starts with the BOS token, or with a
    random token of the vocabulary where there is none or it opens a turn (SmolLM2's is
    ``<|im_start|>``). Base models without a chat template, and models that write no user messages,
    give plain text only; models that recite their system message from every start, as those tuned
    on conversations only may do, give conversations only.

    MLX's global random state is neither used nor changed. On one backend, the same model, arguments
    and versions give the same text.

    Args:
        model: as ``mlx_lm.load`` returns it, in evaluation mode (a dropout would draw numbers).
        tokenizer: its tokenizer, as ``mlx_lm.load`` returns it.
        tokens: how many tokens in all, about: at least nine tenths of it, unless the model does
            not write different texts.
        seed: of the random numbers.
        length: most tokens of a plain text, or of a conversation's two messages together; less
            where ``tokens`` is less than 16 such texts.
        chat_share: share of the tokens that is conversations, 0 to 1.
        progress: called with tokens done and tokens in all.

    Returns:
        Different sequences, conversations and plain texts in random order.
    """
    # Batches are what makes this fast, and short texts are as many different ones.
    length = max(min(length, tokens // _LEAST_TEXTS), 2 * _LEAST_TOKENS)
    report = _Report(progress, tokens)
    sampler = _Sampler(model, tokenizer, derived_seed(seed, "sampling"), report)
    pieces = _template_pieces(tokenizer)
    if pieces is None:
        chat_share = 0.0
    kinds: list[_Kind] = []
    if pieces is not None and chat_share > 0:
        kinds.append(_Conversations(sampler, pieces, length, tokens * chat_share))
    kinds.append(_PlainTexts(sampler, pieces, length, tokens * (1 - chat_share)))
    _write(kinds, sampler, pieces.before if pieces is not None else ())
    report.finish()
    sequences = [sequence for kind in kinds for sequence in kind.found]
    random.Random(derived_seed(seed, "order")).shuffle(sequences)  # noqa: S311
    return sequences


def _write(kinds: "Sequence[_Kind]", sampler: "_Sampler", shared: Sequence[int]) -> None:
    """Run rounds until every kind has its tokens; a kind that gives up leaves its to the others."""
    while active := [kind for kind in kinds if kind.missing > 0]:
        # In one batch, since few long texts alone take as many steps as many.
        sampler.run([job for kind in active for job in kind.jobs()], shared)
        for kind in active:
            kind.collect()
        sampler.report.keep(sum(kind.tokens for kind in kinds))
        for kind in active:
            others = [other for other in kinds if other.fruitless < _PATIENCE]
            if kind.fruitless == _PATIENCE and others:
                others[0].target += kind.target - kind.tokens
                kind.target = kind.tokens


class _Pieces(NamedTuple):
    """A chat template around the user's message."""

    before: list[int]
    after: str


@dataclass
class _Report:
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


class _Kind:
    """A kind of text, and the different sequences of it found so far.

    Attributes:
        target: tokens to reach.
        tokens: tokens found.
        found: the sequences.
        fruitless: rounds in a row that brought next to nothing new.
    """

    def __init__(self, sampler: "_Sampler", length: int, longest: int, target: float) -> None:
        self.target = target
        self.tokens = 0
        self.found: dict[TokenSequence, None] = {}
        self.fruitless = 0
        self._sampler = sampler
        self._length = length
        self._mean: float = longest
        self._asked = 0
        self._written: dict[int, TokenSequence] = {}

    @property
    def missing(self) -> float:
        """Tokens that are still to be written; a last round for a few is not worth its time."""
        if self.fruitless == _PATIENCE or self.tokens >= _NEARLY * self.target:
            return 0
        return self.target - self.tokens

    def jobs(self) -> "list[_Job]":
        """What to sample for the tokens that are missing."""
        self._asked = math.ceil(_SPARE * self.missing / self._mean)
        return [self._job(place) for place in range(self._asked)]

    def collect(self) -> None:
        """Take what the jobs wrote, in their order; they end in that of their lengths."""
        batch = [self._written[place] for place in sorted(self._written)]
        self._written.clear()
        new = [sequence for sequence in dict.fromkeys(batch) if sequence not in self.found]
        for sequence in new:
            if self.tokens < self.target:
                self.found[sequence] = None
                self.tokens += len(sequence.tokens)
        if batch:
            self._mean = sum(len(sequence.tokens) for sequence in batch) / len(batch)
        self.fruitless = self.fruitless + 1 if len(new) < _LEAST_YIELD * self._asked else 0

    def _job(self, place: int) -> "_Job":
        raise NotImplementedError


class _Conversations(_Kind):
    """The user's message up to the end of its turn, then the answer to it."""

    def __init__(self, sampler: "_Sampler", pieces: _Pieces, length: int, target: float) -> None:
        super().__init__(sampler, length, length + len(pieces.before), target)
        self._pieces = pieces

    def _job(self, place: int) -> "_Job":
        return _Job(
            self._pieces.before,
            self._length // 2,
            self._sampler.ends | self._sampler.special,
            functools.partial(self._answer, place),
        )

    def _answer(self, place: int, opening: list[int]) -> "_Job | None":
        message = _message(self._sampler, opening, self._pieces)
        prompt = _render(self._sampler.tokenizer, message, tokenize=True) if message else None
        if not prompt:
            return None
        keep = functools.partial(self._keep, place, list(prompt))
        return _Job(list(prompt), self._length - len(opening), self._sampler.ends, keep)

    def _keep(self, place: int, prompt: list[int], text: list[int]) -> None:
        self._written[place] = TokenSequence((*prompt, *text), len(prompt))


class _PlainTexts(_Kind):
    """Text from its first token on."""

    def __init__(
        self, sampler: "_Sampler", pieces: _Pieces | None, length: int, target: float
    ) -> None:
        super().__init__(sampler, length, length, target)
        self._pieces = pieces
        self._start = _plain_start(sampler.tokenizer, pieces)

    def _job(self, place: int) -> "_Job":
        prompt = self._start or [self._sampler.random_token()]
        stops = self._sampler.ends | self._sampler.special
        keep = functools.partial(self._keep, place, prompt)
        return _Job(prompt, self._length - len(prompt), stops, keep)

    def _keep(self, place: int, prompt: list[int], text: list[int]) -> None:
        # A special token ends the text, and belongs to it only if it is an end token.
        if text[-1] not in self._sampler.ends:
            text = [token for token in text if token not in self._sampler.special]
        if _is_varied(text) and not self._recites(text):
            self._written[place] = TokenSequence((*prompt, *text))

    def _recites(self, text: list[int]) -> bool:
        """Whether a text goes on as the chat template begins, or holds its system message.

        Models tuned on conversations only, which all begin alike, do so from nearly every start.
        """
        if self._pieces is None:
            return False
        special, decode = self._sampler.special, self._sampler.tokenizer.decode
        words = [token for token in self._pieces.before if token not in special]
        recited = str(decode(text))
        lines = str(decode(words)).split("\n")
        return text[:1] == words[:1] or any(
            len(line) >= _LEAST_LINE and line.strip() in recited for line in lines
        )


def _message(sampler: "_Sampler", opening: list[int], pieces: _Pieces) -> str:
    """The text of a user's message: the sampled tokens up to whatever ends the turn."""
    # No token after the first special one is sampled.
    text = str(sampler.tokenizer.decode([t for t in opening if t not in sampler.special]))
    # Some templates end the turn in plain characters ("[/INST]").
    end = pieces.after.strip().split("\n")[0]
    if end:
        text = text.split(end)[0]
    # A character cut in two is decoded as U+FFFD.
    return text.strip().strip("\ufffd").strip()


def _plain_start(tokenizer: Any, pieces: _Pieces | None) -> list[int]:
    """The BOS token if plain text can follow it, nothing otherwise."""
    bos = tokenizer.bos_token_id
    opens_turn = pieces is not None and bos in pieces.before
    return list(sequence_start(tokenizer)) or ([] if bos is None or opens_turn else [bos])


def _is_varied(text: list[int]) -> bool:
    """Whether a text is neither very short nor one token again and again."""
    return len(text) >= _LEAST_TOKENS and max(Counter(text).values()) <= len(text) / 2


def _template_pieces(tokenizer: Any) -> _Pieces | None:
    """The chat template around a user's message, None where there is no usable one."""
    rendered = _render(tokenizer, _SENTINEL, tokenize=False)
    if not isinstance(rendered, str) or rendered.count(_SENTINEL) != 1:
        return None
    before, _, after = rendered.partition(_SENTINEL)
    # A space before the message is part of the message's first token.
    ids = tokenizer.encode(before.rstrip(" "), add_special_tokens=False)
    return _Pieces(list(ids), after) if ids else None


def _render(tokenizer: Any, message: str, *, tokenize: bool) -> Any:
    """A user's message up to where the answer starts, None where the template cannot do it."""
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            add_generation_prompt=True,
            tokenize=tokenize,
            **({"return_dict": False} if tokenize else {}),
        )
    except TEMPLATE_ERRORS:
        return None


def _end_ids(tokenizer: Any) -> frozenset[int]:
    """Ids at which mlx-lm stops generating."""
    several = getattr(tokenizer, "eos_token_ids", None)
    ids = several if isinstance(several, Collection) else [tokenizer.eos_token_id]
    return frozenset(int(token) for token in ids if token is not None)


@dataclass(frozen=True)
class _Job:
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
    then: Callable[[list[int]], "_Job | None"]


class _Sampler:
    """Draws continuations from a model at temperature 1, with random numbers of its own."""

    def __init__(self, model: nn.Module, tokenizer: Any, seed: int, report: _Report) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.ends = _end_ids(tokenizer)
        self.special = special_ids(tokenizer)
        self.report = report
        self._key = mx.random.key(seed)
        self._random = random.Random(seed)  # noqa: S311
        self._mask: mx.array | None = None

    def random_token(self) -> int:
        """A token of printable text, from all over the vocabulary."""
        for _ in range(1000):
            token = self._random.randrange(len(self.tokenizer))
            text = str(self.tokenizer.decode([token])).strip()
            if token not in self.special and text and text.isprintable() and "\ufffd" not in text:
                break
        return token

    def run(self, jobs: Sequence[_Job], shared: Sequence[int] = ()) -> None:
        """Do the jobs, and those that come of them; ``shared`` begins many of their prompts."""
        from mlx_lm.models.cache import make_prompt_cache

        # mlx-lm's server asks the same before it batches.
        if all(hasattr(cache, "merge") for cache in make_prompt_cache(self.model)):
            self._run_batched(jobs, shared)
        else:
            self._run_one_by_one(jobs)

    def _run_batched(self, jobs: Sequence[_Job], shared: Sequence[int]) -> None:
        from mlx_lm.generate import BatchGenerator, StopSequences

        prefix = list(shared[:-1])
        prefix_cache = self._cache(prefix) if prefix else None
        active: dict[int, tuple[_Job, list[int]]] = {}

        def insert(generator: Any, new: Sequence[_Job]) -> None:
            known = [prefix_cache is not None and j.prompt[: len(prefix)] == prefix for j in new]
            ids = generator.insert(
                [job.prompt[len(prefix) * k :] for job, k in zip(new, known, strict=True)],
                [job.room for job in new],
                # The generator copies the caches it is given, and makes those it is not.
                caches=[prefix_cache if k else None for k in known],
                stop_sequences=[StopSequences([[t] for t in sorted(job.stops)]) for job in new],
            )
            active.update((i, (job, [])) for i, job in zip(ids, new, strict=True))

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
            insert(generator, jobs)
            while active:
                following = []
                for response in generator.next_generated():
                    job, text = active[response.uid]
                    text.append(int(response.token))
                    self.report.sampled()
                    if response.finish_reason is not None:
                        del active[response.uid]
                        next_job = job.then(text)
                        if next_job is not None:
                            following.append(next_job)
                if following:
                    insert(generator, following)

    def _run_one_by_one(self, jobs: Sequence[_Job]) -> None:
        from mlx_lm.generate import generate_step

        stream = mx.default_stream(mx.default_device())
        for first in jobs:
            job: _Job | None = first
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

    def _cache(self, tokens: list[int]) -> list[Any]:
        """The model's cache after these tokens."""
        from mlx_lm.models.cache import make_prompt_cache

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
