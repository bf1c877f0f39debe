"""Byte-level BPE tokenizers: llama.cpp's tokenizer model "gpt2"."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.pretokenizers import UNICODE_FORMS, PreTokenizer
from mlx_fusekit.gguf.tokenizer.tokenizer_files import TokenizerFiles, steps
from mlx_fusekit.gguf.tokenizer.tokens import Token


def byte_level_tokens(files: TokenizerFiles) -> dict[int, Token]:
    """All tokens by id. Those of the model stay spelled in bytes; added ones are plain text."""
    tokens = {token_id: Token(text) for text, token_id in files.vocabulary.items()}
    return tokens | {token.token_id: Token(token.text, token.kind) for token in files.added}


def byte_level_merges(files: TokenizerFiles) -> tuple[str, ...]:
    """Merges as llama.cpp reads them, the two parts with a space between.

    Raises:
        CheckpointError: when there are none, and for a part that has a space itself.
    """
    if not files.merges:
        raise CheckpointError(
            f"{files.file}: has no merges, and llama.cpp runs no byte-level tokenizer without; "
            "download the model again, with its tokenizer"
        )
    for pair in files.merges:
        if " " in "".join(pair):
            raise CheckpointError(
                f"{files.file}: merge {pair!r} has a space, which byte-level tokenizers spell "
                "as another letter; download the model again, with its tokenizer"
            )
    return tuple(" ".join(pair) for pair in files.merges)


def byte_level_notes(files: TokenizerFiles, pre: PreTokenizer) -> Iterator[str]:
    """Where llama.cpp will cut text otherwise than Hugging Face does."""
    if pre.limits:
        yield pre.limits
    for step in steps((files.tokenizer or {}).get("normalizer"), "normalizers"):
        if (form := step.get("type")) in UNICODE_FORMS:
            yield f"llama.cpp does not bring text into Unicode's form {form} first"
    if bool(files.model.get("ignore_merges")) != pre.ignore_merges:
        lost = _unmergeable(files)
        if lost:
            whole, pieces = ("llama.cpp", "Hugging Face")
            if not pre.ignore_merges:
                whole, pieces = pieces, whole
            yield (
                f"{len(lost)} tokens, as {lost[0]!r}, that {whole} takes whole are pieces in "
                f"{pieces}"
            )


def _unmergeable(files: TokenizerFiles) -> list[str]:
    """Tokens that their own text does not merge into."""
    ranks = {pair: rank for rank, pair in enumerate(files.merges)}
    added = {token.text for token in files.added}
    return [
        text
        for text in files.vocabulary
        if text not in added and len(text) > 1 and len(_merged(text, ranks)) > 1
    ]


def _merged(text: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    parts = list(text)
    unranked = len(ranks)
    while len(parts) > 1:
        found = [ranks.get(pair, unranked) for pair in pairwise(parts)]
        best = min(found)
        if best == unranked:
            break
        place = found.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
