"""LlamaCpp: what it gives is llama.cpp's, whatever the length, and nothing stays behind."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from support.tiny_architectures import VOCABULARY, make_model

from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.gguf.file.plan import plan_gguf
from mlx_fusekit.gguf.file.target import gguf_target
from mlx_fusekit.gguf.file.writer import write_gguf
from mlx_fusekit.gguf.models import hyperparameters
from mlx_fusekit.gguf.models.architectures import lay_out
from mlx_fusekit.running.llamacpp import BATCH_TOKENS, LlamaCpp

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("llama_cpp")

END = VOCABULARY - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as mlx-lm has it."""
    return make_model(tmp_path_factory.mktemp("llamacpp"), "qwen3")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    """It as GGUF."""
    return export(folder, folder / "model.gguf", end=END)


def export(folder: Path, path: Path, *, end: int) -> Path:
    """Write it with a vocabulary of single characters, one of two, and one that ends a turn."""
    base = open_base(folder)
    layout = lay_out(base)
    keys = gguf.GGUFWriter(None, layout.architecture)
    hyperparameters.write(layout.hyperparameters, keys)
    keys.add_tokenizer_model("gpt2")
    keys.add_tokenizer_pre("gpt-2")
    keys.add_token_list([*(chr(33 + i) for i in range(END - 1)), "AB", "<|end|>"])
    keys.add_token_types([gguf.TokenType.NORMAL] * END + [gguf.TokenType.CONTROL])
    keys.add_token_merges(["A B"])
    keys.add_eos_token_id(end)
    write_gguf(plan_gguf(base, layout.tensors, outtype="f32"), keys, gguf_target(path))
    return path


def test_long_texts_run_in_batches(path: Path) -> None:
    tokens = [(5 * i) % VOCABULARY for i in range(BATCH_TOKENS + 40)]
    with LlamaCpp(path, context=1024, threads=1) as model:
        whole = model.logits(tokens)
        start = model.logits(tokens[:50])
    assert whole.shape == (len(tokens), VOCABULARY)
    np.testing.assert_allclose(whole[:50], start, atol=1e-4)
    assert np.isfinite(whole).all()
    assert np.abs(whole[-1] - whole[BATCH_TOKENS - 1]).max() > 0.1


def test_generates_the_most_likely_tokens(path: Path) -> None:
    with LlamaCpp(path, context=256, threads=1) as model:
        generated = model.generate([1, 2, 3], 12)
        logits = model.logits([1, 2, 3, *generated])
    assert 0 < len(generated) <= 12
    assert [int(row.argmax()) for row in logits[2:-1]] == generated


def test_stops_at_the_end_of_the_turn(folder: Path, path: Path, tmp_path: Path) -> None:
    with LlamaCpp(path, context=256, threads=1) as model:
        first, second, third = model.generate([1, 2, 3], 3)
    assert third not in (first, second)
    with LlamaCpp(
        export(folder, tmp_path / "model.gguf", end=third), context=256, threads=1
    ) as model:
        assert model.generate([1, 2, 3], 3) == [first, second]


def test_tokenizes(path: Path) -> None:
    with LlamaCpp(path, vocabulary_only=True) as model:
        assert model.vocabulary_size == VOCABULARY
        assert model.tokenize("ABA<|end|>") == [END - 1, 32, END]
        assert len(model.tokenize("ABA<|end|>", parse_special=False)) == 9
        assert model.tokenize("ABA<|end|>" * 200) == [END - 1, 32, END] * 200


def test_too_long_a_text_is_an_error(path: Path) -> None:
    with LlamaCpp(path, context=256, threads=1) as model:
        assert model.logits([1] * model.context).shape == (model.context, VOCABULARY)
        with pytest.raises(ConfigurationError, match=r"257 tokens .* context of 256"):
            model.logits([1] * 257)
        with pytest.raises(ConfigurationError, match="260 tokens"):
            model.generate([1] * 250, 10)


def test_token_that_there_is_not(path: Path) -> None:
    with (
        LlamaCpp(path, context=256, threads=1) as model,
        pytest.raises(CheckpointError, match="2 tokens"),
    ):
        model.logits([1, VOCABULARY])


def test_file_that_is_no_model(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="cannot load it"):
        LlamaCpp(broken)


def test_nothing_leaks(path: Path) -> None:
    def peak() -> int:
        for _ in range(10):
            with LlamaCpp(path, context=256, threads=1) as model:
                model.logits([1, 2, 3])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    first = peak()
    assert peak() - first < 20_000  # kilobytes on Linux, bytes on macOS


def test_an_object_that_is_forgotten_is_freed(path: Path) -> None:
    model = LlamaCpp(path, context=256, threads=1)
    close = model._close
    del model
    assert not close.alive
