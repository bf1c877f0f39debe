"""SentencePiece tokenizers: llama.cpp's tokenizer model "llama"."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gguf import TokenType

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.sentencepiece_model import SentencePieceModel, read_sentencepiece
from mlx_fusekit.gguf.tokenizer.tokenizer_files import TokenizerFiles, steps
from mlx_fusekit.gguf.tokenizer.tokens import SPACE, AddedToken, Token

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ADVICE = (
    "llama.cpp's SentencePiece tokenizer would cut text otherwise; this model cannot be exported"
)


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """A SentencePiece vocabulary.

    Attributes:
        tokens: by id.
        space_prefix: whether a space is put in front of a text.
        notes: where llama.cpp will cut text otherwise than Hugging Face does.
    """

    tokens: dict[int, Token]
    space_prefix: bool
    notes: tuple[str, ...]


def sentencepiece_vocabulary(files: TokenizerFiles) -> SentencePiece:
    """The vocabulary from ``tokenizer.model``, or where that is gone, from ``tokenizer.json``.

    ``tokenizer.json`` is what MLX runs. Where both are there and name different pieces, it counts.

    Raises:
        CheckpointError: for a tokenizer that llama.cpp's SentencePiece tokenizer is not.
    """
    model = read_sentencepiece(files.pieces) if files.pieces else None
    if files.tokenizer is None:
        assert model is not None
        tokens, space_prefix, notes = _from_model(files, model)
    else:
        tokens = _from_merges(files)
        space_prefix, notes = _space_prefix(files)
        if model is not None and _same_pieces(model, tokens):
            tokens, _, _ = _from_model(files, model)
        else:
            notes += _unlisted_merges(files)
    tokens |= _added(files, tokens)
    _check_bytes(files, tokens)
    return SentencePiece(tokens, space_prefix, notes)


def _from_model(
    files: TokenizerFiles, model: SentencePieceModel
) -> tuple[dict[int, Token], bool, tuple[str, ...]]:
    if not model.bpe:
        raise CheckpointError(f"{files.pieces}: is a unigram model; {_ADVICE}")
    tokens = {
        token_id: replace(token, text=token.text.replace(SPACE, " "))
        if token.kind == TokenType.USER_DEFINED
        else token
        for token_id, token in enumerate(model.tokens)
    }
    asked = files.settings.get("add_prefix_space")
    notes = ("llama.cpp does not replace characters first",) if model.normalizes else ()
    return tokens, model.space_prefix if asked is None else bool(asked), notes


def _from_merges(files: TokenizerFiles) -> dict[int, Token]:
    """Pieces scored so that llama.cpp merges in the order of ``tokenizer.json``.

    llama.cpp merges the adjacent pieces whose union has the highest score. The score is the
    negated rank of the first merge that makes the piece; pieces that no merge makes come last.
    """
    if files.model.get("type") != "BPE":
        raise CheckpointError(f"{files.file}: is a {files.model.get('type')} model; {_ADVICE}")
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(files.merges):
        scores.setdefault(left + right, float(-rank))
    unknown = files.model.get("unk_token")
    return {
        token_id: Token(text, _kind(text, unknown), scores.get(text, float(-len(files.merges))))
        for text, token_id in files.vocabulary.items()
    }


def _kind(text: str, unknown: str | None) -> int:
    if text == unknown:
        return int(TokenType.UNKNOWN)
    return int(TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL)


def _same_pieces(model: SentencePieceModel, tokens: dict[int, Token]) -> bool:
    """Whether the ids of both files agree on all pieces of text."""
    ours = {i: t.text for i, t in tokens.items() if t.kind == TokenType.NORMAL}
    theirs = dict(enumerate(token.text for token in model.tokens))
    return model.bpe and all(theirs.get(token_id) == text for token_id, text in ours.items())


def _added(files: TokenizerFiles, tokens: dict[int, Token]) -> dict[int, Token]:
    lowest = min((token.score for token in tokens.values()), default=0.0)
    return {
        added.token_id: _added_token(added, lowest)
        for added in files.added
        if not _is_piece(added, tokens.get(added.token_id), files)
    }


def _added_token(added: AddedToken, score: float) -> Token:
    text = added.text if added.special else added.text.replace(SPACE, " ")
    return Token(text, added.kind, score)


def _is_piece(added: AddedToken, token: Token | None, files: TokenizerFiles) -> bool:
    """Whether an added token stays what it is in the vocabulary.

    The unknown token and bytes keep their kind. A piece with spaces that is looked for before
    spaces get their mark never matches one, so it takes part in merging only.
    """
    if token is None:
        return False
    if token.kind in (TokenType.UNKNOWN, TokenType.BYTE):
        return True
    from_json = files.tokenizer is not None
    return from_json and SPACE in added.text and not (added.special or added.normalized)


def _space_prefix(files: TokenizerFiles) -> tuple[bool, tuple[str, ...]]:
    """Whether a space goes in front of a text, from the steps of ``tokenizer.json``."""
    tokenizer = files.tokenizer or {}
    found = False
    notes: list[str] = []
    for step in steps(tokenizer.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            found = True
        elif kind in ("NFC", "NFKC", "Precompiled"):
            notes.append(f"llama.cpp does not replace characters first ({kind})")
        elif not (kind == "Replace" and _replaces_spaces(step)):
            raise CheckpointError(f"{files.file}: has the normalizer {step!r}; {_ADVICE}")
    for step in steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement") == SPACE:
            scheme = step.get("prepend_scheme") or (
                "always" if step.get("add_prefix_space", True) else "never"
            )
            found |= scheme != "never"
            notes += _metaspace_notes(files, scheme, bool(step.get("split", True)))
        elif not (step.get("type") == "Split" and step.get("pattern") == {"String": " "}):
            raise CheckpointError(f"{files.file}: has the pre-tokenizer {step!r}; {_ADVICE}")
    return found, tuple(notes)


def _replaces_spaces(step: object) -> bool:
    return (
        isinstance(step, dict)
        and step.get("pattern") == {"String": " "}
        and step.get("content") == SPACE
    )


def _metaspace_notes(files: TokenizerFiles, scheme: str, split: bool) -> Iterator[str]:
    if scheme == "first":
        yield "llama.cpp puts a space in front of text after every special token too"
    if scheme != "never":
        yield "llama.cpp puts a space in front of text that begins with one too"
    if split and any(SPACE in text[1:] and text.strip(SPACE) for text in files.vocabulary):
        yield "llama.cpp may merge several words into one token"


def _unlisted_merges(files: TokenizerFiles) -> tuple[str, ...]:
    """A note where llama.cpp merges pieces that ``tokenizer.json`` leaves apart."""
    vocabulary, listed = files.vocabulary, set(files.merges)
    special = {token.text for token in files.added} | {files.model.get("unk_token")}
    unlisted = 0
    for text in vocabulary:
        if text in special or _BYTE.fullmatch(text):
            continue
        splits = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        unlisted += any(
            left in vocabulary and right in vocabulary and (left, right) not in listed
            for left, right in splits
        )
    if not unlisted:
        return ()
    return (f"llama.cpp merges {unlisted} tokens in ways that Hugging Face does not",)


def _check_bytes(files: TokenizerFiles, tokens: dict[int, Token]) -> None:
    """llama.cpp spells unknown characters in byte tokens, and stops the program without them."""
    texts = {token.text for token in tokens.values()}
    for byte in range(256):
        if f"<0x{byte:02X}>" not in texts and not (byte < 0x80 and chr(byte) in texts):
            raise CheckpointError(
                f"{files.file}: has no token for the byte 0x{byte:02X}, so that llama.cpp could "
                "not spell unknown characters; this model cannot be exported"
            )
