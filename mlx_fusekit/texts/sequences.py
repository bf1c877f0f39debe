"""Tokenized text, which of its tokens a measurement counts, and the seeds it is drawn with."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

#: On fewer scored tokens, or fewer sequences, nothing is concluded from a measurement: tokens of
#: one sequence are alike, and an interval over fewer sequences does not hold what it promises.
FEWEST_SCORED = 200
FEWEST_SEQUENCES = 8
_MOST_HELD_OUT = 1024


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Tokens that a model is run on in one forward pass.

    Attributes:
        tokens: token ids, as the model sees them, at least two.
        scored: index of the first token whose prediction counts: 1 for plain text (nothing
            predicts the first), where the answer begins for a conversation or a completion.
        is_answer: whether ``tokens[scored:]`` is one answer, for which exact match is defined.
    """

    tokens: tuple[int, ...]
    scored: int = 1
    is_answer: bool = False


def enough_to_conclude(sequences: Iterable[TokenSequence]) -> bool:
    """Whether a measurement on these sequences concludes anything."""
    scored = [len(sequence.tokens) - sequence.scored for sequence in sequences]
    return len(scored) >= FEWEST_SEQUENCES and sum(scored) >= FEWEST_SCORED


def most_held_out(tokens: int) -> int:
    """How many tokens are kept aside of a text of so many, to measure on."""
    return min(_MOST_HELD_OUT, max(1, tokens // 5))


def up_to(sequences: Iterable[TokenSequence], tokens: int | None) -> Iterator[TokenSequence]:
    """Sequences up to the one that reaches so many tokens, or all."""
    taken = 0
    for sequence in sequences:
        yield sequence
        taken += len(sequence.tokens)
        if tokens is not None and taken >= tokens:
            return


def grouped_by_length(
    sequences: Iterable[TokenSequence], most_tokens: int
) -> list[list[TokenSequence]]:
    """Sequences of similar length, to be run together.

    Args:
        sequences: in any order.
        most_tokens: of a group, padding to its longest included; a single sequence may have more.
    """
    groups: list[list[TokenSequence]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.tokens)):
        if not groups or (len(groups[-1]) + 1) * len(sequence.tokens) > most_tokens:
            groups.append([])
        groups[-1].append(sequence)
    return groups


def derived_seed(seed: int, part: str) -> int:
    """A seed of 32 bits for one part of a work, which must not draw the numbers of another.

    It depends on ``seed`` and the part's name, on every machine alike.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{part}".encode()).digest()[:4], "big")
