"""PEFT's folders of strangers: refused in one line that names the cure, or fused right."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.limits import in_little
from support.peft import pair, random, write_peft
from support.tiny import LLAMA, QWEN3_MOE, make_model

from mlx_fusekit import prepare_fuse
from mlx_fusekit.errors import AdapterError

Q = "model.layers.1.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"
MLP = "model.layers.0.mlp"
HIDDEN, TOKENS = 128, 96
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
Made = Callable[[Path], Path]


def plain(**settings: Any) -> Made:
    """A good adapter but for its settings."""
    return lambda folder: write_peft(folder, pair(Q, HIDDEN, HIDDEN), **settings)


def holding(tensors: dict[str, Any], **settings: Any) -> Made:
    return lambda folder: write_peft(folder, tensors, **settings)


def beside(tensors: dict[str, Any], **settings: Any) -> Made:
    return holding(pair(Q, HIDDEN, HIDDEN) | tensors, **settings)


def without(name: str) -> Made:
    tensors = pair(Q, HIDDEN, HIDDEN)
    del tensors[name]
    return holding(tensors)


def renamed(*names: str) -> Made:
    """Only a file of another name."""

    def make(folder: Path) -> Path:
        plain()(folder)
        stored = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(pickle.dumps(1) if name.endswith(".bin") else stored)
        return folder

    return make


def with_file(content: bytes) -> Made:
    def make(folder: Path) -> Path:
        plain()(folder)
        (folder / "adapter_model.safetensors").write_bytes(content)
        return folder

    return make


def with_nan(folder: Path) -> Path:
    tensors = pair(Q, HIDDEN, HIDDEN)
    tensors[B][0, 0] = np.nan
    return write_peft(folder, tensors)


def with_settings(text: str) -> Made:
    def make(folder: Path) -> Path:
        plain()(folder)
        (folder / "adapter_config.json").write_text(text)
        return folder

    return make


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
EXPERT = f"{MLP}.experts.1.gate_proj"

#: By name, what makes it, and words of the line.
REFUSED: dict[str, tuple[Made, str]] = {
    # Kinds that are no LoRA
    "IA3": (plain(peft_type="IA3"), "no LoRA; convert it to LoRA with PEFT"),
    "VeRA": (plain(peft_type="VERA"), "no LoRA; convert"),
    "LoHa": (plain(peft_type="LOHA"), "no LoRA; convert"),
    "LoKr": (plain(peft_type="LOKR"), "no LoRA; convert"),
    "OFT": (plain(peft_type="OFT"), "no LoRA; convert"),
    "AdaLoRA": (plain(peft_type="ADALORA"), "no LoRA; convert"),
    "X-LoRA": (plain(peft_type="XLORA"), "no LoRA; convert"),
    "prompt tuning": (plain(peft_type="PROMPT_TUNING"), "changes the prompt"),
    "prefix tuning": (plain(peft_type="PREFIX_TUNING"), "changes the prompt"),
    "a kind that is a number": (plain(peft_type=5), "peft_type is 5"),
    # LoRA that changed the base, or does more than add to weights
    "PiSSA": (plain(init_lora_weights="pissa_niter_16"), "changed the base .* save it as plain"),
    "OLoRA": (plain(init_lora_weights="olora"), "changed the base"),
    "CorDA": (plain(init_lora_weights="corda"), "changed the base"),
    "LoftQ": (plain(init_lora_weights="loftq"), "changed the base"),
    "LoRA-GA": (plain(init_lora_weights="lora_ga"), "changed the base"),
    "aLoRA": (plain(alora_invocation_tokens=[1, 2]), "aLoRA"),
    "layers that were repeated": (plain(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "lora_bias by its settings": (plain(lora_bias=True), "lora_bias"),
    "lora_bias by its tensors": (beside({f"{Q}.lora_B.bias": random(HIDDEN)}), "bias of lora_B"),
    "QA-LoRA": (plain(use_qalora=True), "QA-LoRA"),
    "rows of tokens that nothing names": (
        beside({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": random(2, HIDDEN)}),
        "does not fit trainable_token_indices",
    ),
    "rows of fewer tokens than are named": (
        beside(
            {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": random(2, HIDDEN)},
            trainable_token_indices=[1, 2, 3],
        ),
        "does not fit trainable_token_indices",
    ),
    "rows of a token twice": (
        beside(
            {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": random(2, HIDDEN)},
            trainable_token_indices=[1, 1],
        ),
        "each once",
    ),
    "rows of a token that the base has not": (
        beside(
            {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": random(1, HIDDEN)},
            trainable_token_indices=[96],
        ),
        "changes token 96, and .* has 96 rows",
    ),
    "rows of another width": (
        beside(
            {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": random(1, 64)},
            trainable_token_indices={"embed_tokens": [5]},
        ),
        "has 64 columns",
    ),
    "tokens that are a text": (
        beside(
            {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": random(1, HIDDEN)},
            trainable_token_indices=["<a>"],
        ),
        "must be a list of token ids",
    ),
    # Settings
    "no rank": (plain(r=0), "r is 0"),
    "a rank that is a text": (plain(r="4"), "r is '4'"),
    "a rank of 10**400": (plain(r=10**400), "r is 1000"),
    "another rank than the file's": (plain(r=8), "has rank 4, but .* says 8"),
    "another rank by a pattern": (plain(rank_pattern={"q_proj": 2}), "has rank 4, but .* says 2"),
    "an alpha that is a text": (plain(lora_alpha="8"), "lora_alpha is '8'"),
    "an alpha of 10**400": (plain(lora_alpha=10**400), "lora_alpha is 1000"),
    "an alpha of infinity": (plain(lora_alpha=float("inf")), "lora_alpha is inf"),
    "an alpha that overflows": (plain(lora_alpha=1.7e308), "overflow|infinity|finite"),
    "patterns that are a list": (plain(alpha_pattern=["q_proj"]), "must be an object"),
    "a pattern that is none": (plain(alpha_pattern={"(q_proj": 4}), "no pattern"),
    "a pattern of a megabyte": (plain(rank_pattern={"q" * 1_000_000: 4}), "without end"),
    "a pattern that takes forever": (
        plain(alpha_pattern={r"(.*)*(.*)*(.*)*x": 4}),
        "without end",
    ),
    "a pattern of many repetitions": (plain(alpha_pattern={".*.*.*.*x": 4}), "without end"),
    "a rank of a pattern that is null": (plain(rank_pattern={"q_proj": [4]}), "rank_pattern is"),
    "settings that are a list": (with_settings("[]"), "JSON object"),
    "settings that are no JSON": (with_settings("{"), "not valid JSON"),
    # Files
    "a pickle": (renamed("adapter_model.bin"), "never opened"),
    "no weights": (renamed(), "the file is missing"),
    "weights in several files": (
        renamed("adapter_model-00001-of-00002.safetensors"),
        "several files",
    ),
    "a Git LFS pointer": (with_file(POINTER), "git lfs pull"),
    "an empty file": (with_file(b""), "download it again"),
    # Tensors
    "no tensors": (holding({}), "no LoRA tensors|no tensors"),
    "only a head": (holding({"lm_head.weight": random(TOKENS, HIDDEN)}), "fine_tune_type|LoRA"),
    "lora_A alone": (without(B), "without its pair"),
    "lora_B alone": (without(A), "not one that|without its pair|no lora_parameters"),
    "a magnitude alone": (
        beside({f"{MLP}.up_proj.lora_magnitude_vector": random(256)}),
        "without its pair",
    ),
    "NaN": (with_nan, "NaN or infinity"),
    "whole numbers": (holding({A: np.zeros((4, 128), int), B: random(HIDDEN, 4)}), "dtype"),
    "another width": (holding(pair(Q, HIDDEN, 64)), "does not fit"),
    "another height": (holding(pair(Q, 64, HIDDEN)), "does not fit"),
    "matrices that do not meet": (
        holding({A: random(4, HIDDEN), B: random(HIDDEN, 3)}),
        r"lora_A must be \[rank, columns\]",
    ),
    "a matrix of three axes": (
        holding({A: random(1, 4, HIDDEN), B: random(HIDDEN, 4)}),
        r"lora_A must be",
    ),
    "a magnitude of another size": (
        beside({f"{Q}.lora_magnitude_vector": random(64)}),
        "does not fit",
    ),
    "DoRA of an embedding": (
        beside(
            {
                f"{EMBEDDING}.lora_embedding_A": random(4, TOKENS),
                f"{EMBEDDING}.lora_embedding_B": random(HIDDEN, 4),
                f"{EMBEDDING}.lora_magnitude_vector": random(1, HIDDEN),
            },
            use_dora=True,
        ),
        "has DoRA, .* merge the adapter with PEFT",
    ),
    "matrices and a whole weight": (
        beside({f"{Q}.weight": random(HIDDEN, HIDDEN)}),
        "a whole weight beside them; merge",
    ),
    "a module that is not there": (holding(pair("model.layers.1.nothing", 4, 4)), "no module"),
    "a layer that is not there": (holding(pair(Q.replace("1", "9"), HIDDEN, HIDDEN)), "no module"),
    "a vision tower": (
        beside(pair("model.vision_tower.encoder.layers.1.self_attn.q_proj", HIDDEN, HIDDEN)),
        r"'base_model\.model\.model\.vision_tower\..*leave it out with --ignore '\*vision_tower\*'",
    ),
    "a tower for sound": (beside(pair("model.audio_tower.layers.1.fc1", 4, 4)), "images or sound"),
    "two adapters": (beside({f"{Q}.lora_A.other.weight": random(4, HIDDEN)}), "twice"),
    "one module under two names": (
        beside(pair(Q.replace("model.", "language_model.model."), HIDDEN, HIDDEN)),
        "twice",
    ),
    "a name with a line break": (holding(pair("x\n\x1b[2J", 4, 4)), "none that PEFT has"),
    "a tensor of another kind": (beside({f"{Q}.lora_E": random(4, 1)}), "none that PEFT has"),
    "a head for other tokens": (
        beside({"lm_head.weight": random(TOKENS + 3, HIDDEN)}, modules_to_save=["lm_head"]),
        "tokens 96 to 98",
    ),
    "an embedding for other tokens": (
        beside({f"{EMBEDDING}.base_layer.weight": random(TOKENS + 3, HIDDEN)}),
        "tokens 96 to 98",
    ),
    "a bias that the base has not": (beside({f"{MLP}.up_proj.bias": random(256)}), "no parameter"),
}
#: The same onto a mixture of experts.
OF_EXPERTS: dict[str, tuple[Made, str]] = {
    "an expert too many": (holding(pair(f"{MLP}.experts.9.up_proj", 64, HIDDEN)), "4 experts"),
    "an expert of another size": (
        holding(pair(EXPERT, 64, HIDDEN) | pair(f"{MLP}.experts.2.gate_proj", 32, HIDDEN)),
        "does not fit",
    ),
    "DoRA of an expert": (
        holding(pair(EXPERT, 64, HIDDEN) | {f"{EXPERT}.lora_magnitude_vector": random(64)}),
        "has DoRA, .* merge the adapter with PEFT",
    ),
    "fewer experts in a parameter": (
        holding(
            {
                f"{MLP}.experts.lora_A.weight": random(3, HIDDEN),
                f"{MLP}.experts.lora_B.weight": random(128, 3),
            }
        ),
        "4 experts",
    ),
    "a parameter of another size": (
        holding(
            {
                f"{MLP}.experts.lora_A.weight": random(16, HIDDEN),
                f"{MLP}.experts.lora_B.weight": random(100, 16),
            }
        ),
        "neither",
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    config = LLAMA | {"tie_word_embeddings": False}
    dense = make_model(folder / "dense", config, bits=None, dtype=mx.float32)
    return {"dense": dense, "mixture": make_model(folder / "mixture", QWEN3_MOE)}


CASES = [(name, "dense") for name in REFUSED] + [(name, "mixture") for name in OF_EXPERTS]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[name for name, _ in CASES])
def test_it_is_refused_in_a_line(
    name: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    make, words = (REFUSED | OF_EXPERTS)[name]
    adapter = make(tmp_path / "adapter")
    with in_little(), pytest.raises(AdapterError, match=words) as refused:
        prepare_fuse(bases[kind], adapter, tmp_path / "fused")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert list(tmp_path.iterdir()) == [adapter]


@pytest.mark.parametrize("value", [None, True, 5, -1.5, "x", [], {}, [1], {"a": 1}, 10**400])
@pytest.mark.parametrize(
    "key",
    [
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("use_dora", "init_lora_weights", "base_model_name_or_path", "target_modules", "bias"),
        *("modules_to_save", "layers_to_transform", "fan_in_fan_out", "trainable_token_indices"),
        *("lora_bias", "layer_replication", "eva_config", "loftq_config", "peft_version"),
    ],
)
def test_any_value_at_any_key(key: str, value: object, bases: dict[str, Path], tmp_path) -> None:
    adapter = plain()(tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    try:
        prepare_fuse(bases["dense"], adapter, tmp_path / "fused")
    except AdapterError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
