"""The tokens of a GGUF vocabulary: one for each row of the embedding."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from mlx_fusekit.errors import CheckpointError

#: SentencePiece's mark of a space.
SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Token:
    """One token, as llama.cpp is told of it.

    Attributes:
        text: byte-level spelling or SentencePiece spelling of a normal token, else what it prints.
        kind: a ``gguf.TokenType``.
        score: SentencePiece only; adjacent pieces with the highest score merge first.
    """

    text: str
    kind: int = TokenType.NORMAL
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is cut out of the text before anything else looks at it.

    Attributes:
        token_id: its row of the embedding.
        text: as it stands in the text.
        special: whether it steers the model rather than being text.
        normalized: whether it is looked for in the text after the normalizer, not before.
        greedy: whether Hugging Face looks at what is beside it: takes white space along, or wants
            the edge of a word.
    """

    token_id: int
    text: str
    special: bool
    normalized: bool = False
    greedy: bool = False

    @property
    def kind(self) -> int:
        """Its ``gguf.TokenType``."""
        return int(TokenType.CONTROL if self.special else TokenType.USER_DEFINED)


def fill(tokens: Mapping[int, Token], rows: int, file: Path) -> tuple[Token, ...]:
    """One token for each of ``rows`` rows; rows that no token uses get an unused ``[PADi]``.

    Args:
        tokens: by id.
        rows: of the embedding.
        file: the tokenizer's file, for messages.

    Raises:
        CheckpointError: for a token beyond the embedding, and for two tokens of the same text,
            which llama.cpp would stop the whole program for.
    """
    if beyond := sorted(i for i in tokens if not 0 <= i < rows):
        raise CheckpointError(
            f"{file}: token {tokens[beyond[0]].text!r} has id {beyond[0]}, but the embedding has "
            f"{rows} rows; the tokenizer belongs to another model, put back the one it came with"
        )
    owners: dict[str, int] = {}
    for token_id, token in tokens.items():
        # llama.cpp reads texts up to their first NUL.
        text = token.text.partition("\0")[0] or f"[EMPTY_{token_id}]"
        if text in owners:
            raise CheckpointError(
                f"{file}: tokens {owners[text]} and {token_id} are both {text!r}, which llama.cpp "
                "does not allow; give one of them another text"
            )
        owners[text] = token_id
    return tuple(tokens.get(row) or _padding(row, owners) for row in range(rows))


def _padding(row: int, taken: Mapping[str, int]) -> Token:
    text = f"[PAD{row}]"
    while text in taken:
        text = f"[{text}]"
    return Token(text, TokenType.UNUSED)
