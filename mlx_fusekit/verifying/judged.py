"""The fused model that is judged: a folder in mlx-lm, or a GGUF file in llama.cpp."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.reading import is_file
from mlx_fusekit.running.llamacpp import LlamaCpp
from mlx_fusekit.running.loading import run_model
from mlx_fusekit.running.model import RunningModel
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.reference import EACH_SHARE
from mlx_fusekit.verifying.structure import Check

_NAMED = 3


@dataclass(frozen=True)
class Judged:
    """The fused model, ready to be called.

    Attributes:
        checks: that take running it.
        exact: as :attr:`~mlx_fusekit.running.model.RunningModel.exact`.
    """

    model: Any
    checks: tuple[Check, ...]
    exact: bool


@contextlib.contextmanager
def in_mlx(fused: LocalFolder, reference: RunningModel) -> Iterator[Judged]:
    """A model folder."""
    running = run_model(fused, memory_share=EACH_SHARE)
    yield Judged(running.model, (_check_vocabulary(reference, running),), running.exact)


@contextlib.contextmanager
def in_llama_cpp(
    file: Path, reference: RunningModel, sequences: Sequence[TokenSequence]
) -> Iterator[Judged]:
    """A GGUF file, with room for the longest of the texts."""
    longest = max(len(sequence.tokens) for sequence in sequences)
    with LlamaCpp(file, context=longest) as running:
        check = check_tokenization(running, reference.tokenizer, sequences)
        yield Judged(JudgedGguf(running), (check,), exact=False)


def loadable_gguf(fused: str | Path) -> Path | None:
    """The GGUF file that the fused model is; None where it is a folder.

    Raises:
        CheckpointError: for a file that is not there or that llama.cpp cannot load, before anything
            takes long.
    """
    path = Path(fused).expanduser()
    if path.suffix != ".gguf":
        return None
    if not is_file(path):
        raise CheckpointError(f"--fused {fused}: there is no such file")
    LlamaCpp(path, vocabulary_only=True).close()
    return path


class _History:
    """What was run before, in the place of a layer's key-value cache."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.state: list[mx.array] = []


class JudgedGguf:
    """Called as mlx-lm's models are: token ids ``[batch, tokens]`` to logits."""

    def __init__(self, running: LlamaCpp) -> None:
        self._running = running

    def make_cache(self) -> list[Any]:
        """mlx-lm asks the model for its cache."""
        return [_History()]

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Logits ``[batch, tokens, vocabulary]``; with a cache, of tokens that follow others.

        llama.cpp runs one text at a time, from its start, so that long texts in several pieces take
        longer than in one.
        """
        rows = [list(row) for row in np.array(tokens).tolist()]
        width = tokens.shape[1]
        if cache is not None:
            before = cache[0].tokens or [[] for _ in rows]
            rows = cache[0].tokens = [old + new for old, new in zip(before, rows, strict=True)]
        return mx.array(np.stack([self._running.logits(row)[-width:] for row in rows]))


def check_tokenization(
    running: LlamaCpp, tokenizer: Any, sequences: Sequence[TokenSequence]
) -> Check:
    """Whether llama.cpp cuts the texts into the same tokens as the model's own tokenizer.

    Args:
        running: the file.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        sequences: their texts are compared, special tokens as such.
    """
    different = []
    for sequence in sequences:
        text = tokenizer.decode(list(sequence.tokens))
        expected = list(tokenizer.encode(text, add_special_tokens=False))
        if running.tokenize(text) != expected:
            different.append(text)
    detail = f"{len(sequences) - len(different)} of {len(sequences)} texts"
    if different:
        detail += f"; not {', '.join(repr(text[:40]) for text in different[:_NAMED])}"
    return Check("same tokens in llama.cpp", not different, detail)


def _check_vocabulary(reference: RunningModel, fused: RunningModel) -> Check:
    """Whether a token id means the same to both models."""
    ours, theirs = (running.tokenizer.get_vocab() for running in (reference, fused))
    differing = len(set(ours.items()) ^ set(theirs.items()))
    detail = f"{len(ours)} tokens"
    if differing:
        detail = f"{differing} tokens of only one of them"
    return Check("same vocabulary", not differing, detail)
