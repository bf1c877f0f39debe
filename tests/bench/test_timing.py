"""One timed generation does what mlx-lm does."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_adapters, load_model
from support.tiny import LLAMA, QWEN3_MOE, VOCABULARY, make_adapter, make_model

from mlx_fusekit.bench.arms import ArmSource, load_arm, weight_facts
from mlx_fusekit.bench.timing import time_generation
from mlx_fusekit.bench.workload import Shape, random_prompts
from mlx_fusekit.checkpoint.folder import Checkpoint

PROMPTS = random_prompts(Shape(12, 8, 3), VOCABULARY, (), seed=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


def test_the_tokens_are_mlx_lms(base: Path) -> None:
    model = load_arm(ArmSource("base", "base", base)).model
    found = time_generation(model, PROMPTS[:1], 8)
    expected = [token for token, _ in generate_step(mx.array(PROMPTS[0]), model, max_tokens=8)]
    assert list(found.tokens[0]) == expected
    assert len(found.itl_seconds) == 7
    assert found.ttft_seconds > 0
    assert min(found.itl_seconds) > 0


def test_a_batch_generates_what_its_sequences_do_alone(base: Path) -> None:
    model = load_arm(ArmSource("base", "base", base)).model
    together = time_generation(model, PROMPTS, 8)
    alone = [time_generation(model, [prompt], 8).tokens[0] for prompt in PROMPTS]
    assert list(together.tokens) == alone
    assert len(together.itl_seconds) == 7


@pytest.mark.parametrize("batch", [1, 2])
def test_a_single_token_has_no_gaps(base: Path, batch: int) -> None:
    model = load_arm(ArmSource("base", "base", base)).model
    found = time_generation(model, PROMPTS[:batch], 1)
    assert found.itl_seconds == ()
    assert [len(tokens) for tokens in found.tokens] == [1] * batch


def test_an_arm_runs_its_adapter_as_mlx_lm_does(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    arm = load_arm(ArmSource("base+adapter", "base", base, adapter))
    model = load_model(base)[0]
    load_adapters(model, str(adapter)).eval()
    tokens = mx.array([PROMPTS[0]])
    assert mx.array_equal(arm.model(tokens), model(tokens))
    assert not mx.array_equal(arm.model(tokens), load_model(base)[0](tokens))
    assert arm.adapter_load_seconds is not None
    assert 0 < arm.adapter_load_seconds < arm.load_seconds


def test_weights_are_counted_as_stored(base: Path) -> None:
    arm = load_arm(ArmSource("base", "base", base))
    facts = weight_facts(arm.model, arm.running.config)
    stored = sum(tensor.nbytes for tensor in Checkpoint.open(base).tensors.values())
    # The embedding is the head too, so all of it is read for every token.
    assert facts.weight_bytes == facts.read_bytes_per_token == stored
    assert 4.5 < facts.bits_per_weight < 4.6


def test_an_embedding_that_is_not_the_head_is_read_a_row_at_a_time(tmp_path: Path) -> None:
    config = LLAMA | {"tie_word_embeddings": False}
    arm = load_arm(ArmSource("base", "base", make_model(tmp_path / "m", config, bits=None)))
    facts = weight_facts(arm.model, arm.running.config)
    rows, columns = arm.model.model.embed_tokens.weight.shape
    assert facts.weight_bytes - facts.read_bytes_per_token == (rows - 1) * columns * 2
    assert facts.bits_per_weight == 16


def test_of_experts_only_the_active_are_read(tmp_path: Path) -> None:
    arm = load_arm(ArmSource("base", "base", make_model(tmp_path / "m", QWEN3_MOE)))
    facts = weight_facts(arm.model, arm.running.config)
    experts = sum(
        tensor.nbytes
        for name, tensor in Checkpoint.open(tmp_path / "m").tensors.items()
        if ".switch_mlp." in name
    )
    embedding = arm.model.model.embed_tokens
    table = sum(embedding[key].nbytes for key in ("weight", "scales", "biases"))
    unread = experts // 2 + table - table // VOCABULARY
    assert facts.weight_bytes - facts.read_bytes_per_token == pytest.approx(unread, abs=16)


def test_an_adapter_costs_bytes_a_token(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    plain = load_arm(ArmSource("base", "base", base))
    adapted = load_arm(ArmSource("base+adapter", "base", base, adapter))
    facts = [weight_facts(arm.model, arm.running.config) for arm in (plain, adapted)]
    added = mx.load(str(adapter / "adapters.safetensors")).values()
    assert facts[1].read_bytes_per_token - facts[0].read_bytes_per_token == sum(
        tensor.nbytes for tensor in added
    )
