"""A small random model with the sample's tokenizer, and the sample itself in float32."""

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load_tokenizer
from support.tiny import LLAMA, in_float32

from mlx_fusekit import samples


class Babbler:
    """Writes random tokens, and ends a turn or text after about twenty."""

    def __init__(self, seed):
        mx.random.seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 1024}
        self._model = Model(ModelArgs.from_dict({**LLAMA, **sizes, "num_hidden_layers": 1}))
        self.layers = self._model.layers

    def __call__(self, inputs, cache=None):
        logits = self._model(inputs, cache=cache)
        return mx.where(mx.arange(1024) == 2, 4.0, logits)


@pytest.fixture(scope="package")
def tokenizer():
    return load_tokenizer(samples.model_path())


@pytest.fixture(scope="package")
def babbler():
    return Babbler(seed=0)


@pytest.fixture(scope="package")
def other_babbler():
    return Babbler(seed=1)


@pytest.fixture(scope="package")
def sample_base():
    return in_float32(load(str(samples.model_path()))[0])


@pytest.fixture(scope="package")
def sample_teacher():
    """Base+adapter."""
    adapter = str(samples.adapter_path())
    return in_float32(load(str(samples.model_path()), adapter_path=adapter)[0])
