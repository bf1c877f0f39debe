"""Measures between models, against NumPy's float64 arithmetic one sequence at a time."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.models import run_model, run_teacher
from support.tiny import LLAMA, QWEN3_MOE, VOCABULARY, make_adapter, make_model

from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying import parity
from mlx_fusekit.verifying.parity import (
    Variant,
    compare,
    kl_divergence,
    log_probabilities,
    make_batches,
)


def sequence(length: int, scored: int = 1, *, answer: bool = False, seed: int = 0) -> TokenSequence:
    tokens = np.random.default_rng([length, seed]).integers(0, VOCABULARY, length)
    return TokenSequence(tuple(map(int, tokens)), scored, answer)


TEXTS = [sequence(30), sequence(7, 4, answer=True), sequence(2), sequence(55, 20), sequence(31, 30)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Two random models of one vocabulary; with tied embeddings both would repeat their input."""
    folder = tmp_path_factory.mktemp("parity")
    config = {**LLAMA, "tie_word_embeddings": False}
    folders = [
        make_model(folder / str(seed), config, seed=seed, bits=None, dtype=mx.float32)
        for seed in (0, 1)
    ]
    return run_model(folders[0]).model, run_model(folders[1]).model


def by_hand(model: Any, text: TokenSequence) -> np.ndarray:
    """Log-probabilities ``[scored, vocabulary]`` in float64, of the sequence alone."""
    logits = np.array(model(mx.array([text.tokens]))[0], dtype=np.float64)[text.scored - 1 : -1]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def greedy(model: Any, text: TokenSequence) -> TokenSequence:
    """The text with the tokens that the model would give from ``scored`` on."""
    tokens = list(text.tokens[: text.scored])
    while len(tokens) < len(text.tokens):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))
    return TokenSequence(tuple(tokens), text.scored, is_answer=True)


@pytest.mark.parametrize("logit_bytes", [96_000_000, 4 * VOCABULARY * 16, 4 * VOCABULARY])
@pytest.mark.parametrize("batch_tokens", [1, 64, 1024])
def test_compare_is_the_arithmetic_by_hand(
    models: tuple[Any, Any], logit_bytes: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, in batches, and in chunks of 16 columns and of one over a cache."""
    monkeypatch.setattr(parity, "LOGIT_BYTES", logit_bytes)
    reference, candidate = models
    texts = [*TEXTS, TEXTS[1]]
    found = compare(reference, {"c": candidate}, texts, batch_tokens=batch_tokens)["c"]
    truth, other = (np.concatenate([by_hand(m, t) for t in texts]) for m in models)
    targets = np.concatenate([t.tokens[t.scored :] for t in texts])
    kl = (np.exp(truth) * (truth - other)).sum(axis=-1)
    assert kl.mean() > 0.01
    np.testing.assert_allclose(found.kl, kl, rtol=1e-3, atol=1e-5)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-3)
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    assert found.top1_agreement == np.mean(truth.argmax(-1) == other.argmax(-1))
    rows = np.arange(len(targets))
    assert found.perplexity == pytest.approx(np.exp(-other[rows, targets].mean()), rel=1e-4)
    assert found.perplexity_reference == pytest.approx(
        np.exp(-truth[rows, targets].mean()), rel=1e-4
    )
    assert found.exact_match == 0.0


def test_exact_match_counts_whole_answers(models: tuple[Any, Any]) -> None:
    reference, candidate = models
    answers = [greedy(reference, sequence(12, 6, seed=i)) for i in range(3)]
    answers.append(greedy(candidate, sequence(12, 6, seed=9)))
    last = answers[0].tokens[-1]
    spoiled = TokenSequence((*answers[0].tokens[:-1], (last + 1) % VOCABULARY), 6, is_answer=True)
    plain = greedy(candidate, sequence(40, 5))
    texts = [*answers, spoiled, TokenSequence(plain.tokens, 5)]
    found = compare(reference, {"c": candidate}, texts)["c"]
    assert found.exact_match_reference == 3 / 5
    assert found.exact_match == 1 / 5
    assert compare(reference, {"c": candidate}, texts[-1:])["c"].exact_match is None


def test_a_model_is_at_no_distance_from_itself(models: tuple[Any, Any]) -> None:
    found = compare(models[0], {"same": models[0]}, TEXTS)["same"]
    assert not found.kl.any()
    assert found.top1_agreement == 1.0
    assert found.perplexity == found.perplexity_reference


def test_kl_of_known_distributions() -> None:
    half, skewed = mx.log(mx.array([0.5, 0.5, 0.0])), mx.log(mx.array([0.25, 0.75, 0.0]))
    wanted = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert kl_divergence(half, skewed).item() == pytest.approx(wanted, rel=1e-5)
    certain = mx.log(mx.array([1.0, 0.0, 0.0]))
    assert kl_divergence(certain, half).item() == pytest.approx(np.log(2), rel=1e-5)
    assert kl_divergence(half, certain).item() == np.inf


def test_what_lives_at_once_is_bounded(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LOGIT_BYTES", 4 * VOCABULARY * 16)
    shapes = []

    class Watched:
        layers = models[0].layers

        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            shapes.append(tokens.shape)
            return models[0](tokens, cache=cache)

    for batch in make_batches(TEXTS, VOCABULARY, 1024):
        sizes = [len(p) for p in log_probabilities(Variant(Watched()), batch)]
        assert sum(sizes) == batch.scored
    assert max(rows * columns for rows, columns in shapes) <= 16
    assert len(shapes) > len(TEXTS)


def test_experts_run_in_chunks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = run_model(make_model(tmp_path / "base", QWEN3_MOE)).model
    other = run_model(make_model(tmp_path / "other", QWEN3_MOE, seed=3)).model
    whole = compare(model, {"o": other}, TEXTS)["o"]
    monkeypatch.setattr(parity, "LOGIT_BYTES", 4 * VOCABULARY * 8)
    chunked = compare(model, {"o": other}, TEXTS)["o"]
    np.testing.assert_allclose(chunked.kl, whole.kl, rtol=1e-2, atol=1e-4)


def test_states_of_one_model_are_compared(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    teacher = run_teacher(base, adapter)
    candidates = {
        "state": Variant(teacher.model, teacher.without_adapter),
        "alone": run_model(base).model,
    }
    found = compare(teacher.model, candidates, TEXTS)
    assert found["state"].kl_mean > 0.01
    np.testing.assert_allclose(found["state"].kl, found["alone"].kl, atol=1e-5)


def test_progress_counts_scored_tokens(models: tuple[Any, Any]) -> None:
    steps: list[tuple[int, int]] = []
    compare(
        models[0],
        {"c": models[1]},
        TEXTS,
        batch_tokens=32,
        progress=lambda *step: steps.append(step),
    )
    total = sum(len(t.tokens) - t.scored for t in TEXTS)
    assert steps[-1] == (total, total)
    assert steps == sorted(set(steps))


def test_what_cannot_be_compared_is_said(models: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no text"):
        compare(models[0], {"c": models[1]}, [])
    larger = run_model(make_model(tmp_path / "larger", {**LLAMA, "vocab_size": 128})).model
    with pytest.raises(ConfigurationError, match="vocabulary of 128 tokens"):
        compare(models[0], {"c": larger}, TEXTS)
