"""Texts to measure fused models on, against base and adapter unmerged."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from preserve_results import Case, Measures

from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running.adapted import run_adapted
from mlx_fusekit.running.loading import run_model
from mlx_fusekit.texts.data import read_sequences
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.parity import (
    Batch,
    Model,
    kl_divergence,
    log_probabilities,
    make_batches,
    vocabulary_of,
)

#: Tokens of plain prose to measure on.
PROSE_TOKENS = 2048


class Text:
    """Token sequences, and base+adapter's log-probabilities of them, kept on disk."""

    def __init__(self, sequences: Sequence[TokenSequence], teacher: Model, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._batches = make_batches(sequences, vocabulary_of(teacher))
        self.teacher = self._measure(teacher, store=True)

    def measure(self, model: Model) -> Measures:
        """Compare a model with base and adapter."""
        return self._measure(model, store=False)

    def _measure(self, model: Model, *, store: bool) -> Measures:
        batches = [
            self._measure_batch(model, batch, self._folder / str(number), store)
            for number, batch in enumerate(self._batches)
        ]
        kl, agrees, likelihood = np.concatenate([tokens for tokens, _ in batches], axis=1)
        exact = [hit for _, answers in batches for hit in answers]
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(-likelihood.mean()))
        return Measures(
            kl_mean=float(kl.mean()),
            kl_median=float(np.median(kl)),
            kl_p99=float(np.percentile(kl, 99)),
            top1_agreement=float(agrees.mean()),
            perplexity=perplexity,
            exact_match=sum(exact) / len(exact) if exact else None,
            tokens=len(kl),
        )

    @staticmethod
    def _measure_batch(
        model: Model, batch: Batch, path: Path, store: bool
    ) -> tuple[Any, list[bool]]:
        """KL, agreement and log-likelihood ``[3, scored]``, and whether each answer is exact."""
        tokens, hits = np.zeros((3, batch.scored)), np.zeros(batch.scored, np.bool_)
        chunks = zip(batch.chunks, log_probabilities(model, batch), strict=True)
        for number, (chunk, logarithms) in enumerate(chunks):
            file = f"{path}-{number}.npy"
            if store:
                np.save(file, np.array(logarithms))
            truth = logarithms if store else mx.array(np.load(file))
            if not len(chunk.places):
                continue
            targets = mx.array(chunk.targets)
            best = mx.argmax(logarithms, axis=-1)
            chosen = mx.take_along_axis(logarithms, targets[:, None], axis=-1)[:, 0]
            tokens[0, chunk.places] = np.array(kl_divergence(truth, logarithms))
            tokens[1, chunk.places] = np.array(best == mx.argmax(truth, axis=-1))
            tokens[2, chunk.places] = np.array(chosen)
            hits[chunk.places] = np.array(best == targets)
        ends = np.cumsum([len(s.tokens) - s.scored for s in batch.sequences])
        answers = [
            bool(part.all())
            for sequence, part in zip(batch.sequences, np.split(hits, ends[:-1]), strict=True)
            if sequence.is_answer
        ]
        return tokens, answers


def texts_of(case: Case, items: int | None, folder: Path) -> dict[str, Text]:
    """The texts to measure on, with what base and adapter make of them.

    Args:
        case: base, adapter and the files of the texts.
        items: of a file of items, the first so many; None for all.
        folder: for the teacher's log-probabilities.
    """
    sources = NamedSources.find(case.base, case.adapter).open()
    running = run_adapted(sources.model, sources.adapter)
    texts = {}
    for name, path in {"task": case.test, **case.off_task}.items():
        tokens = PROSE_TOKENS if path.suffix == ".txt" else None
        sequences = read_sequences(path, running.tokenizer, tokens=tokens)
        if path.suffix == ".jsonl":
            sequences = sequences[:items]
        texts[name] = Text(sequences, running.model, folder / name)
    del running
    free_memory()
    return texts


def measured(folder: Path, texts: dict[str, Text]) -> dict[str, Measures]:
    """Run a model from disk on the texts; it is gone from memory afterwards."""
    running = run_model(LocalFolder(folder))
    measures = {name: text.measure(running.model) for name, text in texts.items()}
    del running
    free_memory()
    return measures


def free_memory() -> None:
    """Give back what models that are gone have left behind; they contain reference cycles."""
    gc.collect()
    mx.clear_cache()
