"""Tokenized text, and which of its tokens a measurement counts."""

from dataclasses import dataclass


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
