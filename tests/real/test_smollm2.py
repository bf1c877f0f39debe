"""The fetched model and the trained adapter are what the other real-model tests take them for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx_lm import generate, load
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load_adapters
from support.exact_match import exact_match, load_chat_items

if TYPE_CHECKING:
    from fetch_smollm2 import ModelFolders
    from train_adapter import AdapterFolders

ENGLISH = (
    "Water boils at one hundred degrees Celsius at sea level. Higher up, the pressure of the air "
    "is lower, so that water boils at a lower temperature, and food takes longer to cook. This is "
    "why people who live in the mountains often use a pressure cooker."
)


@pytest.fixture(scope="module", params=["bf16", "four_bit"])
def tokenizer(request: pytest.FixtureRequest, smollm2: ModelFolders) -> Any:
    """The tokenizer of each folder: mlx-lm rewrites its files when it quantizes."""
    return load(str(getattr(smollm2, request.param)), lazy=True)[1]


@pytest.mark.parametrize(
    "text",
    [
        "two  spaces,\n\ttabs and lines\r\n",
        " leading and trailing ",
        "In 2024, 12345 apples cost $3.50.",
        "naïve café, Übergröße, 日本語, привет, 🎉👩‍💻",
        "<|im_start|>user\nhello<|im_end|>\n",
        "a\u0000b\u00a0c",
    ],
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_splits_digits_and_keeps_special_tokens_whole(
    tokenizer: Any,
) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("<|im_start|>at 1234don't"))
    assert tokens == ["<|im_start|>", "at", "Ġ", "1", "2", "3", "4", "don", "'t"]


def test_chat_template_ends_at_the_assistants_turn(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize(("form", "limit"), [("bf16", 25.0), ("four_bit", 45.0)])
def test_perplexity_of_english_is_sane(smollm2: ModelFolders, form: str, limit: float) -> None:
    from train_adapter import load_for_training

    model, tokenizer = load_for_training(getattr(smollm2, form))
    assert 2.0 < _perplexity(model, tokenizer.encode(ENGLISH)) < limit


def test_bf16_answers_a_question(smollm2: ModelFolders) -> None:
    from train_adapter import load_for_training

    model, tokenizer = load_for_training(smollm2.bf16)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert "Paris" in generate(model, tokenizer, prompt, max_tokens=10)


def test_4bit_is_quantized_as_community_models_are(smollm2: ModelFolders) -> None:
    config = json.loads((smollm2.four_bit / "config.json").read_text())
    model = load(str(smollm2.four_bit))[0]
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    layer = model.layers[0]
    assert isinstance(layer.mlp.down_proj, QuantizedLinear)
    assert layer.mlp.down_proj.scales.dtype == mx.bfloat16
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert mx.isfinite(model(mx.array([[1, 2]]))).all()


def test_adapter_loads_on_the_4bit_model(
    smollm2: ModelFolders, smollm2_sql_adapter: AdapterFolders
) -> None:
    model = load(str(smollm2.four_bit), adapter_path=str(smollm2_sql_adapter.adapter))[0]
    adapted = [module for _, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert len(adapted) == 16 * 7
    assert all(mx.any(module.lora_b != 0) for module in adapted)


def test_adapter_config_names_no_staging_folder(smollm2_sql_adapter: AdapterFolders) -> None:
    config = json.loads((smollm2_sql_adapter.adapter / "adapter_config.json").read_text())
    assert config["adapter_path"] == smollm2_sql_adapter.adapter.name
    assert sorted(path.name for path in smollm2_sql_adapter.adapter.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]


def test_test_items_are_unseen(smollm2_sql_adapter: AdapterFolders) -> None:
    answers = {
        split: {item["messages"][-1]["content"] for item in _items(smollm2_sql_adapter, split)}
        for split in ("train", "valid", "test")
    }
    assert len(answers["test"]) >= 60
    assert not answers["test"] & (answers["train"] | answers["valid"])


def test_adapter_taught_what_the_base_does_not_know(smollm2_sql_adapter: AdapterFolders) -> None:
    scores = smollm2_sql_adapter.evaluation()
    assert scores["base"]["exact_match"] <= 0.02
    assert scores["adapter"]["exact_match"] >= 0.97
    assert scores["adapter"]["loss"] < scores["base"]["loss"]


def test_exact_match_is_reproducible(
    smollm2: ModelFolders, smollm2_sql_adapter: AdapterFolders
) -> None:
    """The recorded score holds for the files on disk, here on a quarter of the items."""
    from train_adapter import load_for_training

    items = _items(smollm2_sql_adapter, "test")[:16]
    model, tokenizer = load_for_training(smollm2.four_bit)
    assert exact_match(model, tokenizer, items) == 0.0
    load_adapters(model, str(smollm2_sql_adapter.adapter))
    assert exact_match(model, tokenizer, items) >= 15 / 16


def _items(folders: AdapterFolders, split: str) -> Any:
    return load_chat_items(folders.data / f"{split}.jsonl")


def _perplexity(model: Any, ids: list[int]) -> float:
    tokens = mx.array([ids])
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return float(mx.exp(nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")))
