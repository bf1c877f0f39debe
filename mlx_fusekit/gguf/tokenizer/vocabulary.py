"""From a model's tokenizer to everything that llama.cpp needs under ``tokenizer.*``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_fusekit.checkpoint.mlx_lm import one_line
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.byte_level import (
    byte_level_merges,
    byte_level_notes,
    byte_level_tokens,
)
from mlx_fusekit.gguf.tokenizer.chat_templates import portable, template_notes
from mlx_fusekit.gguf.tokenizer.pretokenizers import detect, is_byte_level
from mlx_fusekit.gguf.tokenizer.sentencepiece import sentencepiece_vocabulary
from mlx_fusekit.gguf.tokenizer.special_tokens import SpecialTokens, special_tokens
from mlx_fusekit.gguf.tokenizer.tokenizer_files import TokenizerFiles
from mlx_fusekit.gguf.tokenizer.tokens import Token, fill

#: What reading values of any type in the place of others raises.
_SENSELESS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: Added tokens that tokenizers list beyond the embedding, and that no text has: padding that was
#: added to the tokenizer alone, and those of image and sound models in text-only siblings.
_SPARE = ("<pad>", "[PAD]", "<image_soft_token>", "<audio_soft_token>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer, as a GGUF file holds it.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
        tokens: one for each row of the embedding.
        pre: llama.cpp's name of the pre-tokenizer; None for SentencePiece, which has none.
        merges: byte-level only.
        space_prefix: SentencePiece only: whether a space is put in front of a text.
        special: tokens that have a role.
        chat_templates: by name, the main one as "default".
        notes: where llama.cpp will do otherwise than Hugging Face, for people.
    """

    model: str
    tokens: tuple[Token, ...]
    pre: str | None
    merges: tuple[str, ...]
    space_prefix: bool
    special: SpecialTokens
    chat_templates: Mapping[str, str]
    notes: tuple[str, ...]

    def add_to(self, writer: "GGUFWriter") -> None:
        """Add all keys under ``tokenizer.`` to a GGUF file; the same vocabulary, the same bytes."""
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([token.text for token in self.tokens])
        if self.model == "llama":
            writer.add_token_scores([token.score for token in self.tokens])
        writer.add_token_types([int(token.kind) for token in self.tokens])
        if self.merges:
            writer.add_token_merges(self.merges)
        for role in ("bos", "eos", "eot", "eom", "unk", "pad"):
            if (token_id := getattr(self.special, role)) is not None:
                getattr(writer, f"add_{role}_token_id")(token_id)
        writer.add_add_bos_token(self.special.add_bos)
        writer.add_add_eos_token(self.special.add_eos)
        if self.model == "llama":
            writer.add_add_space_prefix(self.space_prefix)
        self._add_chat_templates(writer)

    def _add_chat_templates(self, writer: "GGUFWriter") -> None:
        # Not with GGUFWriter.add_chat_template, which writes the names in an order of chance.
        named = sorted(set(self.chat_templates) - {"default"})
        for name in named:
            writer.add_string(f"tokenizer.chat_template.{name}", self.chat_templates[name])
        if named:
            writer.add_array("tokenizer.chat_templates", named)
        if "default" in self.chat_templates:
            writer.add_string("tokenizer.chat_template", self.chat_templates["default"])

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts of the tokens that the model stops at."""
        return tuple(self.tokens[token_id].text for token_id in self.special.stops)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Read the tokenizer of a model folder.

    Args:
        folder: the model folder; its files are read as data, none of its code runs.
        rows: of the embedding, so of the vocabulary of the file.

    Raises:
        CheckpointError: when there is no tokenizer, it does not fit the embedding, or llama.cpp
            has none that cuts text as it does. The message names the file and the cure.
    """
    files = TokenizerFiles.read(folder)
    try:
        return _vocabulary(files, rows)
    except CheckpointError:
        raise
    except _SENSELESS as error:
        raise CheckpointError(
            f"{files.file}: it, or a file of the tokenizer beside it, is not of the form that "
            f"transformers writes ({one_line(error)}); download the model again, with its tokenizer"
        ) from error


def _vocabulary(files: TokenizerFiles, rows: int) -> Vocabulary:
    if files.tokenizer is not None and is_byte_level(files.tokenizer):
        return _byte_level(files, rows)
    return _sentencepiece(files, rows)


def _byte_level(files: TokenizerFiles, rows: int) -> Vocabulary:
    assert files.tokenizer is not None
    if (kind := files.model.get("type")) != "BPE":
        raise CheckpointError(
            f"{files.file}: is a byte-level {kind} model, which llama.cpp has not; this model "
            "cannot be exported"
        )
    tokens, spare = _without_spare(files, byte_level_tokens(files), rows)
    special = _special(files, tokens, rows, adds_bos=False)
    cleans = files.settings.get("clean_up_tokenization_spaces")
    pre = detect(files.tokenizer, files.file, cleans_spaces=cleans, has_bos=special.bos is not None)
    return Vocabulary(
        "gpt2",
        fill(tokens, rows, files.file),
        pre.name,
        byte_level_merges(files),
        False,
        special,
        portable(files.chat_templates),
        (*byte_level_notes(files, pre), *spare, *_shared_notes(files), *special.notes),
    )


def _sentencepiece(files: TokenizerFiles, rows: int) -> Vocabulary:
    pieces = sentencepiece_vocabulary(files)
    tokens, spare = _without_spare(files, pieces.tokens, rows)
    special = _special(files, tokens, rows, adds_bos=files.tokenizer is None)
    return Vocabulary(
        "llama",
        fill(tokens, rows, files.file),
        None,
        (),
        pieces.space_prefix,
        special,
        portable(files.chat_templates),
        (*pieces.notes, *spare, *_shared_notes(files), *special.notes),
    )


def _without_spare(
    files: TokenizerFiles, tokens: dict[int, Token], rows: int
) -> tuple[dict[int, Token], tuple[str, ...]]:
    """Tokens without the spare ones that have no row, and notes of these."""
    needed = {files.role_text("bos"), files.role_text("eos")}
    spare_texts = {*_SPARE, files.role_text("pad")} - needed
    spare = {i: t.text for i, t in tokens.items() if i >= rows and t.text in spare_texts}
    notes = (
        f"token {text!r} is left out: its id is {i}, and the embedding has {rows} rows"
        for i, text in spare.items()
    )
    return {i: t for i, t in tokens.items() if i not in spare}, tuple(notes)


def _special(
    files: TokenizerFiles, tokens: Mapping[int, Token], rows: int, *, adds_bos: bool
) -> SpecialTokens:
    ids = {token.text: token_id for token_id, token in tokens.items()}
    return special_tokens(files, ids, rows, adds_bos=adds_bos)


def _shared_notes(files: TokenizerFiles) -> Iterator[str]:
    greedy = [token.text for token in files.added if token.greedy]
    if greedy:
        yield f"llama.cpp looks for {greedy[0]!r} only, whatever white space or word is beside it"
    yield from template_notes(files.chat_templates)
