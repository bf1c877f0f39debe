"""Text sampled from a model itself, for calibrating and measuring without data.

That a model's own samples can stand in for its training data is from Liu et al. 2023, "LLM-QAT"
(arXiv 2305.17888); that a tuned model writes the user's turn too when it is given the template up
to there, from Xu et al. 2024, "Magpie" (arXiv 2406.08464).
"""

import functools
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.nn as nn

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.progress import Progress
from mlx_fusekit.texts.chat import TEMPLATE_ERRORS
from mlx_fusekit.texts.data import sequence_start
from mlx_fusekit.texts.sampler import Job, Report, Sampler
from mlx_fusekit.texts.sequences import TokenSequence, derived_seed

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
#: Most tokens of a chat template before the user's message; each conversation begins with them.
_LONGEST_OPENING = 8192
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
    report = Report(progress, tokens)
    sampler = Sampler(model, tokenizer, derived_seed(seed, "sampling"), report)
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


def _write(kinds: "Sequence[_Kind]", sampler: Sampler, shared: Sequence[int]) -> None:
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


class _Kind:
    """A kind of text, and the different sequences of it found so far.

    Attributes:
        target: tokens to reach.
        tokens: tokens found.
        found: the sequences.
        fruitless: rounds in a row that brought next to nothing new.
    """

    def __init__(self, sampler: Sampler, length: int, longest: int, target: float) -> None:
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

    def jobs(self) -> list[Job]:
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

    def _job(self, place: int) -> Job:
        raise NotImplementedError


class _Conversations(_Kind):
    """The user's message up to the end of its turn, then the answer to it."""

    def __init__(self, sampler: Sampler, pieces: _Pieces, length: int, target: float) -> None:
        super().__init__(sampler, length, length + len(pieces.before), target)
        self._pieces = pieces

    def _job(self, place: int) -> Job:
        return Job(
            self._pieces.before,
            self._length // 2,
            self._sampler.ends | self._sampler.special,
            functools.partial(self._answer, place),
        )

    def _answer(self, place: int, opening: list[int]) -> Job | None:
        message = _message(self._sampler, opening, self._pieces)
        prompt = _render(self._sampler.tokenizer, message, tokenize=True) if message else None
        if not prompt:
            return None
        keep = functools.partial(self._keep, place, list(prompt))
        return Job(list(prompt), self._length - len(opening), self._sampler.ends, keep)

    def _keep(self, place: int, prompt: list[int], text: list[int]) -> None:
        self._written[place] = TokenSequence((*prompt, *text), len(prompt))


class _PlainTexts(_Kind):
    """Text from its first token on."""

    def __init__(
        self, sampler: Sampler, pieces: _Pieces | None, length: int, target: float
    ) -> None:
        super().__init__(sampler, length, length, target)
        self._pieces = pieces
        self._start = _plain_start(sampler.tokenizer, pieces)

    def _job(self, place: int) -> Job:
        prompt = self._start or [self._sampler.random_token()]
        stops = self._sampler.ends | self._sampler.special
        keep = functools.partial(self._keep, place, prompt)
        return Job(prompt, self._length - len(prompt), stops, keep)

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


def _message(sampler: Sampler, opening: list[int], pieces: _Pieces) -> str:
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
    return _Pieces(list(ids), after) if 0 < len(ids) <= _LONGEST_OPENING else None


def _render(tokenizer: Any, message: str, *, tokenize: bool) -> Any:
    """A user's message up to where the answer starts, None where the template cannot do it."""
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            add_generation_prompt=True,
            tokenize=tokenize,
            **({"return_dict": False} if tokenize else {}),
        )
    except CheckpointError:  # of the tokenizer
        raise
    except TEMPLATE_ERRORS:
        return None
