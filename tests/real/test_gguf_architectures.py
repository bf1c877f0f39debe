"""A random model of every architecture gives the same logits in llama.cpp as in MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from support.models import run_model
from support.tiny_architectures import CONFIGS, VOCABULARY, make_model

from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.gguf.file.plan import plan_gguf
from mlx_fusekit.gguf.file.target import gguf_target
from mlx_fusekit.gguf.file.writer import write_gguf
from mlx_fusekit.gguf.models import hyperparameters
from mlx_fusekit.gguf.models.architectures import lay_out
from mlx_fusekit.gguf.models.families import FAMILIES
from mlx_fusekit.running.llamacpp import LlamaCpp

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_fusekit.formats.floats import Float32
    from mlx_fusekit.gguf.file.target import gguf_target
from mlx_fusekit.gguf.file.writer import WrittenFile

pytest.importorskip("llama_cpp")

TOKENS = [(7 * i + 3) % VOCABULARY for i in range(40)]
#: In standard deviations of the logits: a token that leads by less may change places when
#: llama.cpp rounds activations to 8 bits, as it does before it multiplies them by 4-bit weights.
CLEAR_LEAD = 0.35
#: GELU is a table of float16 in llama.cpp, and the exact function in some of mlx-lm's classes.
LARGEST_ERROR = 0.01


@dataclass(frozen=True)
class Comparison:
    """Logits of both programs on the same text, ``[tokens, vocabulary]``."""

    mlx: Float32
    llamacpp: Float32

    @property
    def correlation(self) -> float:
        return float(np.corrcoef(self.mlx.ravel(), self.llamacpp.ravel())[0, 1])

    @property
    def largest_error(self) -> float:
        """In standard deviations of the logits; a wrong scale shows here only."""
        return float(np.abs(self.mlx - self.llamacpp).max() / self.mlx.std())

    @property
    def clear(self) -> Any:
        """At which positions MLX's first token leads clearly."""
        second, first = np.sort(self.mlx, axis=1)[:, -2:].T
        return first - second > CLEAR_LEAD * self.mlx.std()

    @property
    def same_choice(self) -> Any:
        return self.mlx.argmax(axis=1) == self.llamacpp.argmax(axis=1)


def export(folder: Path, path: Path, outtype: str) -> WrittenFile:
    base = open_base(folder)
    layout = lay_out(base)
    keys = gguf.GGUFWriter(None, layout.architecture)
    hyperparameters.write(layout.hyperparameters, keys)
    keys.add_tokenizer_model("none")
    return write_gguf(plan_gguf(base, layout.tensors, outtype=outtype), keys, gguf_target(path))


def compare(folder: Path, path: Path) -> Comparison:
    running = run_model(folder)
    assert running.exact
    logits = running.model(mx.array([TOKENS]))[0].astype(mx.float32)
    with LlamaCpp(path, context=512, threads=1) as model:
        return Comparison(np.array(logits), model.logits(TOKENS))


def test_every_supported_type_is_here() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_f32_matches_mlx(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "model", name)
    export(folder, tmp_path / "model.gguf", "f32")
    found = compare(folder, tmp_path / "model.gguf")
    assert found.correlation >= 0.999999
    assert found.largest_error < LARGEST_ERROR
    assert found.same_choice[found.clear].all()


@pytest.mark.parametrize("name", CONFIGS)
def test_repacked_4_bit_matches_mlx(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "model", name, bits=4)
    written = export(folder, tmp_path / "model.gguf", "auto")
    assert "Q4_1" in {tensor.ggml_type.name for tensor in written.tensors}
    found = compare(folder, tmp_path / "model.gguf")
    assert found.correlation >= 0.995
    assert found.same_choice[found.clear].all()
    assert found.clear.mean() > 0.15
