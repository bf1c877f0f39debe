"""How far one model is from another: KL divergence, agreement, perplexity, exact match.

All of it from log-probabilities at the same positions of the same token sequences, in one forward
pass a model. KL(p||q) is the mean number of nats by which the model q is more surprised than the
reference p by a token that p draws (Kullback and Leibler 1951).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.progress import Progress
from mlx_fusekit.resampling import mean_interval
from mlx_fusekit.texts.sequences import (
    FEWEST_SCORED,
    FEWEST_SEQUENCES,
    TokenSequence,
    grouped_by_length,
)

#: Tokens of a batch, padding included. More are hardly faster, fewer are slower.
BATCH_TOKENS = 1024
#: Bytes of one float32 array of log-probabilities; about five live at once.
LOGIT_BYTES = 96_000_000


@dataclass(frozen=True)
class Variant:
    """A model in a state that is entered for each forward pass, and left after it.

    Several variants may be states of one object, such as a teacher without its adapter.

    Attributes:
        model: mlx-lm's.
        state: makes the context in which the model is that variant.
    """

    model: nn.Module
    state: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    def logits(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """Logits ``[batch, tokens, vocabulary]`` of token ids ``[batch, tokens]``, lazily."""
        with self.state():
            logits: mx.array = self.model(tokens, cache=cache)
        return logits

    def chunk_logits(self, batch: "Batch") -> Iterator[tuple[mx.array, list[Any]]]:
        """Logits of each of a batch's chunks in turn, lazily, and what else to compute with them.

        The next chunk may be asked for when both were computed.
        """
        cache = make_prompt_cache(self.model) if len(batch.chunks) > 1 else None
        for chunk in batch.chunks:
            logits = self.logits(batch.inputs[:, chunk.first : chunk.last], cache)
            yield logits, [layer.state for layer in cache] if cache else []


Model: TypeAlias = nn.Module | Variant


@dataclass(frozen=True)
class Chunk:
    """Scored positions of a batch whose log-probabilities are held at once.

    Attributes:
        first: column of the batch's inputs where the chunk starts.
        last: the column behind its end.
        rows: row of each scored position, ``[scored]``.
        columns: its column, counted from ``first``: that of the token *before* the scored one.
        targets: the scored tokens' ids.
        places: where each belongs among all scored tokens of the batch.
    """

    first: int
    last: int
    rows: npt.NDArray[np.int32]
    columns: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    places: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Sequences that go through a model together, padded on the right.

    Padding lies behind every scored position, where causal attention does not see it.

    Attributes:
        sequences: of similar length.
        chunk_columns: how many columns' logits may live at once; a longer batch runs in chunks
            over a key-value cache.
    """

    sequences: tuple[TokenSequence, ...]
    chunk_columns: int

    @cached_property
    def inputs(self) -> mx.array:
        """Token ids ``[batch, columns]``: all tokens but the last of the longest sequence."""
        width = max(len(sequence.tokens) for sequence in self.sequences)
        return mx.array([[*s.tokens, *[0] * (width - len(s.tokens))] for s in self.sequences])[
            :, :-1
        ]

    @cached_property
    def scored(self) -> int:
        """How many tokens are scored; they are counted sequence by sequence."""
        return sum(len(s.tokens) - s.scored for s in self.sequences)

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """The batch, cut along its columns."""
        rows = np.concatenate(
            [np.full(len(s.tokens) - s.scored, i) for i, s in enumerate(self.sequences)]
        )
        columns = np.concatenate([np.arange(s.scored, len(s.tokens)) - 1 for s in self.sequences])
        targets = np.concatenate([np.array(s.tokens[s.scored :]) for s in self.sequences])
        width = self.inputs.shape[1]
        chunks = []
        for first in range(0, width, self.chunk_columns):
            last = min(first + self.chunk_columns, width)
            places = np.flatnonzero((columns >= first) & (columns < last))
            chunks.append(
                Chunk(
                    first,
                    last,
                    rows[places].astype(np.int32),
                    (columns[places] - first).astype(np.int32),
                    targets[places].astype(np.int32),
                    places,
                )
            )
        return tuple(chunks)


def make_batches(
    sequences: Sequence[TokenSequence], vocabulary: int, batch_tokens: int = BATCH_TOKENS
) -> list[Batch]:
    """Batches of similar length, such that their logits fit into ``LOGIT_BYTES``.

    Args:
        sequences: each with at least one scored token.
        vocabulary: width of the model's logits.
        batch_tokens: most tokens of a batch of several sequences, padding included.
    """
    positions = max(1, LOGIT_BYTES // (4 * vocabulary))
    groups = grouped_by_length(sequences, min(batch_tokens, positions))
    return [Batch(tuple(group), max(1, positions // len(group))) for group in groups]


def vocabulary_of(model: Model) -> int:
    """Width of a model's logits; nothing is computed."""
    return int(_variant(model).logits(mx.array([[0]])).shape[-1])


def log_probabilities(model: Model, batch: Batch) -> Iterator[mx.array]:
    """A model's log-probabilities of a batch, for each of its chunks in turn.

    Yields:
        Float32 ``[scored, vocabulary]``, the rows in the order of the chunk's positions.
    """
    for chunk, (logits, more) in zip(
        batch.chunks, _variant(model).chunk_logits(batch), strict=True
    ):
        if len(chunk.places):
            chosen = logits[mx.array(chunk.rows), mx.array(chunk.columns)].astype(mx.float32)
            logarithms = chosen - mx.logsumexp(chosen, axis=-1, keepdims=True)
            del chosen
        else:  # the logits are never computed, only what the cache keeps
            logarithms = mx.zeros((0, logits.shape[-1]))
        del logits
        mx.eval(logarithms, *more)
        yield logarithms


def kl_divergence(reference: mx.array, candidate: mx.array) -> mx.array:
    """KL(reference || candidate) of log-probabilities ``[..., vocabulary]``, in nats, ``[...]``."""
    probabilities = mx.exp(reference)
    # A token of no probability counts nothing, even where both logarithms are infinite; one of
    # which the probability is NaN makes all of it NaN.
    terms = mx.where(probabilities == 0, 0, probabilities * (reference - candidate))
    return terms.sum(axis=-1)


@dataclass(frozen=True, eq=False)
class Parity:
    """How far a candidate is from the reference, over the scored tokens.

    Attributes:
        kl: KL(reference || candidate) in nats at each scored token, float32 ``[tokens]``, in the
            order of the sequences.
        lengths: how many tokens are scored of each sequence, ``[sequences]``.
        top1_agreement: share of the tokens where both have the same arg-max.
        perplexity: the candidate's, of the actual tokens: exp of the mean negative log-likelihood.
        perplexity_reference: the reference's.
        answers: of each answer, whether its every token is the candidate's arg-max, ``[answers]``.
        answers_reference: whether it is the reference's.
    """

    kl: Float32
    lengths: tuple[int, ...]
    top1_agreement: float
    perplexity: float
    perplexity_reference: float
    answers: npt.NDArray[np.bool_]
    answers_reference: npt.NDArray[np.bool_]

    @property
    def exact_match(self) -> float | None:
        """Share of the answers that the candidate gives exactly; None without answers."""
        return float(self.answers.mean()) if len(self.answers) else None

    @property
    def exact_match_reference(self) -> float | None:
        """That of the reference."""
        return float(self.answers_reference.mean()) if len(self.answers) else None

    @property
    def kl_mean(self) -> float:
        """Mean KL in nats a token."""
        return float(self.kl.mean(dtype=np.float64))

    @cached_property
    def kl_mean_ci95(self) -> tuple[float, float] | None:
        """Bounds of the 95 % interval of the mean, by resampling whole sequences.

        None where there are too few sequences or tokens for one, or KL is not finite.
        """
        if sum(self.lengths) < FEWEST_SCORED or len(self.lengths) < FEWEST_SEQUENCES:
            return None
        starts = np.cumsum([0, *self.lengths[:-1]])
        sums = np.add.reduceat(self.kl.astype(np.float64), starts)
        return mean_interval(sums, np.array(self.lengths, np.float64))

    @property
    def kl_median(self) -> float:
        """Median KL in nats."""
        return float(np.median(self.kl))

    @property
    def kl_p99(self) -> float:
        """The KL in nats that 99 % of the tokens stay below."""
        return float(np.percentile(self.kl, 99))


def compare(
    reference: Model,
    candidates: Mapping[str, Model],
    sequences: Sequence[TokenSequence],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Parity]:
    """Compare models with a reference, batch by batch, all of them in memory.

    Args:
        reference: what the candidates should be like.
        candidates: by name.
        sequences: what they are run on; each has at least one scored token.
        batch_tokens: most tokens of a batch.
        progress: called with scored tokens done and in all.

    Returns:
        The measures, by the candidates' names.

    Raises:
        ConfigurationError: without sequences, or when the vocabularies differ in size.
    """
    if not sequences:
        raise ConfigurationError("there is no text to compare the models on; give --data a file")
    vocabulary = vocabulary_of(reference)
    for name, candidate in candidates.items():
        if (other := vocabulary_of(candidate)) != vocabulary:
            raise ConfigurationError(
                f"{name}: has a vocabulary of {other} tokens, but the reference one of "
                f"{vocabulary}; only models of the same vocabulary can be compared"
            )
    scores = {name: _Scores(sequences) for name in candidates}
    own = _Scores(sequences)
    total, done = sum(len(s.tokens) - s.scored for s in sequences), 0
    indices = _Indices(sequences)
    for batch in make_batches(sequences, vocabulary, batch_tokens):
        where = indices.take(batch)
        passes = {name: log_probabilities(model, batch) for name, model in candidates.items()}
        for chunk, truth in zip(batch.chunks, log_probabilities(reference, batch), strict=True):
            here = where[chunk.places]
            if not len(here):
                for chunks in passes.values():
                    next(chunks)
                continue
            best = own.add(here, chunk, truth)
            for name, chunks in passes.items():
                logarithms = next(chunks)
                found = scores[name].add(here, chunk, logarithms)
                scores[name].kl[here] = np.array(kl_divergence(truth, logarithms))
                scores[name].agrees[here] = found == best
                del logarithms
            done += len(here)
            if progress is not None:
                progress(done, total)
    return {name: score.parity(own) for name, score in scores.items()}


def _variant(model: Model) -> Variant:
    return model if isinstance(model, Variant) else Variant(model)


@dataclass
class _Indices:
    """Where the scored tokens of each sequence lie among all."""

    sequences: Sequence[TokenSequence]
    _spans: dict[TokenSequence, list[npt.NDArray[np.int64]]] = field(init=False)

    def __post_init__(self) -> None:
        self._spans, start = {}, 0
        for sequence in self.sequences:
            count = len(sequence.tokens) - sequence.scored
            self._spans.setdefault(sequence, []).append(np.arange(start, start + count))
            start += count

    def take(self, batch: Batch) -> npt.NDArray[np.int64]:
        """The places of a batch's scored tokens; a sequence that occurs twice has two."""
        return np.concatenate([self._spans[sequence].pop() for sequence in batch.sequences])


class _Scores:
    """What is counted of one model, over all scored tokens."""

    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        self._sequences = sequences
        count = sum(len(s.tokens) - s.scored for s in sequences)
        self.kl = np.zeros(count, np.float32)
        self.agrees = np.zeros(count, np.bool_)
        self._likelihood = np.zeros(count, np.float32)
        self._hits = np.zeros(count, np.bool_)

    def add(
        self, where: npt.NDArray[np.int64], chunk: Chunk, logarithms: mx.array
    ) -> npt.NDArray[np.uint32]:
        """Note a chunk's log-probabilities; returns the arg-max of each position."""
        targets = mx.array(chunk.targets)[:, None]
        best: npt.NDArray[np.uint32] = np.array(mx.argmax(logarithms, axis=-1))
        self._likelihood[where] = np.array(mx.take_along_axis(logarithms, targets, axis=-1))[:, 0]
        self._hits[where] = best == chunk.targets
        return best

    def parity(self, reference: "_Scores") -> Parity:
        return Parity(
            kl=self.kl,
            top1_agreement=float(self.agrees.mean()),
            perplexity=self.perplexity,
            perplexity_reference=reference.perplexity,
            lengths=tuple(len(s.tokens) - s.scored for s in self._sequences),
            answers=self.answers,
            answers_reference=reference.answers,
        )

    @property
    def perplexity(self) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(-self._likelihood.mean(dtype=np.float64)))

    @property
    def answers(self) -> npt.NDArray[np.bool_]:
        matched, start = [], 0
        for sequence in self._sequences:
            end = start + len(sequence.tokens) - sequence.scored
            if sequence.is_answer:
                matched.append(bool(self._hits[start:end].all()))
            start = end
        return np.array(matched, np.bool_)
