"""Parts of PEFT's adapters: merged weights as computed here, from PEFT's own definitions."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.every_class import config_of
from support.peft import Tensors, pair, product, write_peft
from support.tiny import LLAMA, QWEN3_MOE, VOCABULARY, make_model, save_adapter

from mlx_fusekit import export_lora, fuse
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.specs import LEAVES

Q, K = (f"model.layers.1.self_attn.{name}_proj" for name in "qk")
GATE = "model.layers.0.mlp.gate_proj"
EMBEDDING = "model.embed_tokens"
SIZE, KEYS, WIDTH = LLAMA["hidden_size"], 64, LLAMA["intermediate_size"]
EXPERTS, EXPERT_WIDTH = QWEN3_MOE["num_experts"], QWEN3_MOE["moe_intermediate_size"]
BLOCK = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    return make_model(folder, dtype=mx.float32, bits=None)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "quantized")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "experts"
    return make_model(folder, QWEN3_MOE, dtype=mx.float32, bits=None)


def weights(folder: Path) -> Tensors:
    return {name: np.array(a) for name, a in mx.load(str(folder / "model.safetensors")).items()}


def changed(base: Path, adapter: Path) -> Tensors:
    """The tensors of the fused model that are not the base's."""
    target = adapter.parent / "fused"
    fuse(base, adapter, target)
    before, after = weights(base), weights(target)
    assert set(before) == set(after)
    return {name: a for name, a in after.items() if not np.array_equal(a, before[name])}


def check(base: Path, adapter: Path, expected: Tensors) -> None:
    found = changed(base, adapter)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


PLAIN = pair(Q, SIZE, SIZE) | pair(K, KEYS, SIZE)
WIDER = pair(Q, SIZE, SIZE) | pair(K, KEYS, SIZE, rank=6)

#: Settings, tensors, and what multiplies B A of q_proj and of k_proj.
SCALES: dict[str, tuple[dict[str, Any], Tensors, float, float]] = {
    "alpha over r": ({}, PLAIN, 2, 2),
    "rsLoRA": ({"use_rslora": True}, PLAIN, 4, 4),
    "an alpha of none but one": ({"alpha_pattern": {"k_proj": 2}}, PLAIN, 2, 0.5),
    "a rank of its own": ({"rank_pattern": {"k_proj": 6}}, WIDER, 2, 8 / 6),
    "rsLoRA with a rank of its own": (
        {"rank_pattern": {"k_proj": 6}, "use_rslora": True},
        WIDER,
        4,
        8 / math.sqrt(6),
    ),
    "the whole path": ({"alpha_pattern": {K: 4}}, PLAIN, 2, 1),
    "an expression": ({"alpha_pattern": {r".*\.1\..*k_proj": 4}}, PLAIN, 2, 1),
    "alternatives": ({"alpha_pattern": {"self_attn.(k_proj|v_proj)": 4}}, PLAIN, 2, 1),
    "the first that fits": ({"alpha_pattern": {"self_attn.k_proj": 4, "k_proj": 2}}, PLAIN, 2, 1),
    "no end of a name": ({"alpha_pattern": {"proj": 4, "_proj": 4, "layers.0": 4}}, PLAIN, 2, 2),
    "a task that lies": ({"task_type": "SEQ_CLS"}, PLAIN, 2, 2),
    "EVA, which changes no base": ({"init_lora_weights": "eva"}, PLAIN, 2, 2),
    "a list of targets": ({"target_modules": ["k_proj", "q_proj"]}, PLAIN, 2, 2),
    "an expression of targets": ({"target_modules": r".*\.(q|k)_proj"}, PLAIN, 2, 2),
    "all linears as targets": ({"target_modules": "all-linear"}, PLAIN, 2, 2),
    "layers and exceptions": (
        {"layers_to_transform": [1], "exclude_modules": ["v_proj"], "target_modules": ["q_proj"]},
        PLAIN,
        2,
        2,
    ),
    "fan_in_fan_out, which turns the weight only": ({"fan_in_fan_out": True}, PLAIN, 2, 2),
}


@pytest.mark.parametrize("case", SCALES)
def test_scale(base: Path, tmp_path: Path, case: str) -> None:
    settings, tensors, of_q, of_k = SCALES[case]
    before = weights(base)
    expected = {
        f"{module}.weight": before[f"{module}.weight"] + factor * product(tensors, module)
        for module, factor in ((Q, of_q), (K, of_k))
    }
    check(base, write_peft(tmp_path / "adapter", tensors, **settings), expected)


NAMES = {
    "an adapter's name": lambda n: n.replace(".lora_A.", ".lora_A.default.").replace(
        ".lora_B.", ".lora_B.default."
    ),
    "a vision model's tree": lambda n: n.replace("model.", "model.language_model.", 1),
    "an old vision model's tree": lambda n: f"language_model.{n}",
    "compiled": lambda n: n.replace(".self_attn", "._orig_mod.self_attn"),
    "no model before": lambda n: n.removeprefix("model."),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(base: Path, tmp_path: Path, case: str) -> None:
    renamed = {NAMES[case](name): value for name, value in PLAIN.items()}
    before = weights(base)
    expected = {
        f"{module}.weight": before[f"{module}.weight"] + 2 * product(PLAIN, module)
        for module in (Q, K)
    }
    check(base, write_peft(tmp_path / "adapter", renamed), expected)


def test_the_same_adapter_in_both_formats_fuses_to_the_same_bytes(
    quantized: Path, tmp_path: Path
) -> None:
    theirs = write_peft(tmp_path / "peft", PLAIN)
    ours = save_adapter(
        tmp_path / "mlx",
        {
            name.removesuffix(".weight").replace("lora_A", "lora_a").replace("lora_B", "lora_b"): (
                mx.array(np.ascontiguousarray(value.T))
            )
            for name, value in PLAIN.items()
        },
        keys=["self_attn.q_proj", "self_attn.k_proj"],
    )
    for adapter in (theirs, ours):
        fuse(quantized, adapter, tmp_path / f"fused-{adapter.name}", requantize="nearest")
    first, second = (
        (tmp_path / f"fused-{name}" / "model.safetensors").read_bytes() for name in ("peft", "mlx")
    )
    assert first == second
    assert first != (quantized / "model.safetensors").read_bytes()


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_dora(base: Path, tmp_path: Path, suffix: str) -> None:
    magnitude = np.linspace(0.5, 2, SIZE, dtype=np.float32)
    tensors = pair(Q, SIZE, SIZE) | {f"{Q}.lora_magnitude_vector{suffix}": magnitude}
    merged = weights(base)[f"{Q}.weight"] + 2 * product(tensors, Q)
    merged *= (magnitude / np.linalg.norm(merged, axis=1))[:, None]
    adapter = write_peft(tmp_path / "adapter", tensors, use_dora=True)
    check(base, adapter, {f"{Q}.weight": merged})


def embedding_pair(rows: int = VOCABULARY) -> Tensors:
    draw = np.random.default_rng(5)
    return {
        f"{EMBEDDING}.lora_embedding_A": draw.normal(0, 0.1, (4, rows)).astype(np.float32),
        f"{EMBEDDING}.lora_embedding_B": draw.normal(0, 0.1, (SIZE, 4)).astype(np.float32),
    }


def test_embedding(base: Path, tmp_path: Path) -> None:
    tensors = embedding_pair()
    a, b = tensors.values()
    before = weights(base)[f"{EMBEDDING}.weight"]
    beside = {f"{EMBEDDING}.base_layer.weight": before + 1}
    adapter = write_peft(tmp_path / "adapter", tensors | beside)
    check(base, adapter, {f"{EMBEDDING}.weight": before + 2 * (b @ a).T})
    notes = NamedSources.find(base, adapter).open().adapter.warnings
    assert any("is left out: it is the embedding" in note for note in notes)
    assert any("is also the base's head" in note for note in notes)


@pytest.mark.parametrize(
    ("model", "saved", "tied"),
    [
        ("lfm2", "model.embedding_norm", False),
        ("lfm2", "model.embed_tokens", True),
        ("gpt_neox", "gpt_neox.embed_in", False),
        ("internlm2", "model.tok_embeddings", False),
        ("llama", "model.embed_tokens", False),
    ],
)
def test_what_is_also_the_head(tmp_path: Path, model: str, saved: str, tied: bool) -> None:
    """A norm is not, whatever it is called, and no embedding of a model with a head."""
    base = make_model(tmp_path / "base", config_of(model), bits=None, dtype=mx.float32)
    tensors = weights(base)
    values = tensors[f"{saved.replace('gpt_neox', 'model')}.weight"] + 1
    layer = next(name for name, a in tensors.items() if a.ndim == 2 and ".0." in name)
    trained = pair(layer.removesuffix(".weight"), *tensors[layer].shape)
    adapter = write_peft(tmp_path / "adapter", trained | {f"{saved}.weight": values})
    notes = NamedSources.find(base, adapter).open().adapter.warnings
    assert any("is also the base's head" in note for note in notes) == tied


def test_single_tokens(base: Path, tmp_path: Path) -> None:
    new = np.random.default_rng(6).normal(0, 1, (2, SIZE)).astype(np.float32)
    name = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
    adapter = write_peft(
        tmp_path / "adapter", PLAIN | {name: new}, trainable_token_indices={"embed_tokens": [7, 3]}
    )
    before = weights(base)
    rows = before[f"{EMBEDDING}.weight"].copy()
    rows[[7, 3]] = new
    expected = {f"{m}.weight": before[f"{m}.weight"] + 2 * product(PLAIN, m) for m in (Q, K)}
    check(base, adapter, expected | {f"{EMBEDDING}.weight": rows})


def test_single_tokens_of_a_quantized_embedding(quantized: Path, tmp_path: Path) -> None:
    new = np.random.default_rng(6).normal(0, 0.1, (1, SIZE)).astype(np.float32)
    name = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
    adapter = write_peft(tmp_path / "adapter", {name: new}, trainable_token_indices=[9])
    found = changed_words(quantized, adapter)
    assert found == {f"{EMBEDDING}.weight": [9]}
    fused = {n: mx.array(a) for n, a in mx.load(str(tmp_path / "fused/model.safetensors")).items()}
    row = mx.dequantize(
        *(fused[f"{EMBEDDING}.{leaf}"][9:10] for leaf in ("weight", "scales", "biases"))
    )
    np.testing.assert_allclose(np.array(row.astype(mx.float32)), new, atol=0.05)


def changed_words(base: Path, adapter: Path) -> dict[str, list[int]]:
    """Rows of each packed weight that are not the base's."""
    fuse(base, adapter, adapter.parent / "fused", requantize="nearest")
    before, after = (
        mx.load(str(folder / "model.safetensors")) for folder in (base, adapter.parent / "fused")
    )
    rows = {}
    for name, words in before.items():
        if words.dtype == mx.uint32 and not mx.array_equal(words, after[name]):
            rows[name] = np.flatnonzero(np.array((words != after[name]).any(axis=1))).tolist()
    return rows


MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "all there": ({"target_modules": ["q_proj", "self_attn.k_proj", Q]}, ""),
    "one not": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "names 'v_proj', and"),
    "many not": (
        {"target_modules": ["mlp.up_proj", "v_proj", "o_proj", "down_proj", GATE, "k_proj"]},
        f"names 'down_proj', 'mlp.up_proj', '{GATE}' and 2 more, and",
    ),
    "a part of a name": ({"target_modules": ["q_proj", "v", "attn.v_proj"]}, ""),
    "what the base has not": ({"target_modules": ["q_proj", "qkv_proj", "fc1", "lm_head"]}, ""),
    "an expression": ({"target_modules": ".*v_proj"}, ""),
    "all linears": ({"target_modules": "all-linear"}, ""),
    "excluded": ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, ""),
    "excluded in a layer": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["1.self_attn.v_proj"]},
        "names 'v_proj', and",
    ),
    "excluded by a pattern": ({"target_modules": ["v_proj"], "exclude_modules": ".*"}, ""),
    "saved as a whole": ({"target_modules": ["v_proj"], "modules_to_save": ["v_proj"]}, ""),
    "of a layer": (
        {"target_modules": ["0.mlp.up_proj", "v_proj"], "layers_to_transform": [1]},
        "names 'v_proj', and",
    ),
    "nonsense": (
        {"target_modules": [1, {}], "layers_to_transform": [{}], "exclude_modules": 3},
        "",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_targets_that_the_file_has_nothing_of(base: Path, tmp_path: Path, case: str) -> None:
    settings, words = MISSING[case]
    adapter = write_peft(tmp_path / "adapter", PLAIN, **settings)
    warnings = NamedSources.find(base, adapter).open().adapter.warnings
    told = [line for line in warnings if "may not have been saved whole" in line]
    assert len(told) == bool(words)
    assert words in "".join(told)


SAVED = {
    "now": "model.norm.weight",
    "before": "model.norm.modules_to_save.weight",
    "with the adapter's name": "model.norm.modules_to_save.default.weight",
}


@pytest.mark.parametrize("case", SAVED)
def test_modules_to_save(base: Path, tmp_path: Path, case: str) -> None:
    norm = np.linspace(0, 1, SIZE, dtype=np.float32)
    tensors = pair(Q, SIZE, SIZE) | {SAVED[case]: norm}
    adapter = write_peft(tmp_path / "adapter", tensors, modules_to_save=["norm"])
    merged = weights(base)[f"{Q}.weight"] + 2 * product(tensors, Q)
    check(base, adapter, {"model.norm.weight": norm, f"{Q}.weight": merged})


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases(base: Path, tmp_path: Path, bias: str) -> None:
    values = np.linspace(-1, 1, SIZE, dtype=np.float32)
    tensors = pair(Q, SIZE, SIZE) | {f"{Q}.base_layer.bias": values}
    adapter = write_peft(tmp_path / "adapter", tensors, bias=bias)
    merged = weights(base)[f"{Q}.weight"] + 2 * product(tensors, Q)
    check(base, adapter, {f"{Q}.bias": values, f"{Q}.weight": merged})


def test_a_whole_embedding_onto_a_quantized_one(quantized: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(8).normal(0, 0.1, (VOCABULARY, SIZE)).astype(np.float32)
    tensors = pair(Q, SIZE, SIZE) | {f"{EMBEDDING}.weight": values, "lm_head.weight": values}
    adapter = write_peft(tmp_path / "adapter", tensors, modules_to_save=["embed_tokens", "lm_head"])
    found = changed_words(quantized, adapter)
    assert set(found) == {f"{Q}.weight", f"{EMBEDDING}.weight"}
    fused = mx.load(str(tmp_path / "fused/model.safetensors"))
    rows = mx.dequantize(*(fused[f"{EMBEDDING}.{leaf}"] for leaf in LEAVES[:3]))
    np.testing.assert_allclose(np.array(rows.astype(mx.float32)), values, atol=0.05)


def test_single_experts(experts: Path, tmp_path: Path) -> None:
    one, other = f"{BLOCK}.experts.1.gate_proj", f"{BLOCK}.experts.3.gate_proj"
    tensors = pair(one, EXPERT_WIDTH, SIZE) | pair(other, EXPERT_WIDTH, SIZE, rank=2)
    stack = f"{BLOCK}.switch_mlp.gate_proj.weight"
    expected = weights(experts)[stack].copy()
    expected[1] += 2 * product(tensors, one)
    expected[3] += 4 * product(tensors, other)
    adapter = write_peft(tmp_path / "adapter", tensors, rank_pattern={"experts.3.gate_proj": 2})
    check(experts, adapter, {stack: expected})


def all_experts(name: str, rows: int, columns: int) -> tuple[Tensors, np.ndarray]:
    """Factors of all experts at once, and the update of each as PEFT computes it."""
    draw = np.random.default_rng(len(name))
    a = draw.normal(0, 0.1, (EXPERTS * 4, columns)).astype(np.float32)
    b = draw.normal(0, 0.1, (rows, 4 * EXPERTS)).astype(np.float32)
    delta = np.einsum("ore,eri->eoi", b.reshape(rows, -1, EXPERTS), a.reshape(EXPERTS, -1, columns))
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, delta


def test_all_experts_at_once(experts: Path, tmp_path: Path) -> None:
    down, of_down = all_experts(f"{BLOCK}.experts", SIZE, EXPERT_WIDTH)
    gate_up, of_gate_up = all_experts(f"{BLOCK}.experts.base_layer", 2 * EXPERT_WIDTH, SIZE)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = write_peft(tmp_path / "adapter", down | gate_up, target_parameters=parameters)
    before = weights(experts)
    stacks = {leaf: f"{BLOCK}.switch_mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")}
    updates = {
        "gate": of_gate_up[:, :EXPERT_WIDTH],
        "up": of_gate_up[:, EXPERT_WIDTH:],
        "down": of_down,
    }
    expected = {stacks[leaf]: before[stacks[leaf]] + 2 * updates[leaf] for leaf in stacks}
    check(experts, adapter, expected)


def test_a_scale_that_the_user_says(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "adapter", PLAIN, lora_alpha=None)
    update = NamedSources.find(base, adapter, scale=3.0).open().adapter.weights[Q]
    np.testing.assert_allclose(update.up[0] @ update.down[0], 3 * product(PLAIN, Q), atol=1e-6)


def test_mlx_lms_tensors_beside_pefts_settings_stay_mlx_lms(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(
        tmp_path / "adapter",
        {f"{Q}.lora_a": mx.ones((SIZE, 4)), f"{Q}.lora_b": mx.ones((4, SIZE))},
        peft_type="LORA",
        r=4,
        lora_alpha=8,
    )
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
    check(base, adapter, {f"{Q}.weight": weights(base)[f"{Q}.weight"] + 8})


TRAINED_TOKENS: dict[str, tuple[Any, str]] = {
    "one that the base lacks": ([3, 500], "changes token 500, and .* has 96 rows"),
    "one twice": ([3, 3], "each once"),
    "too few": ([3], "does not fit trainable_token_indices"),
    "no numbers": (["a", "b"], "must be a list of token ids"),
    "one below zero": ([-1, 3], "must be a list of token ids"),
    "of another module": ({"lm_head": [1, 2]}, "does not fit trainable_token_indices"),
}


@pytest.mark.parametrize("case", TRAINED_TOKENS)
def test_tokens_that_do_not_fit(base: Path, tmp_path: Path, case: str) -> None:
    tokens, match = TRAINED_TOKENS[case]
    name = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
    tensors = {name: np.ones((2, SIZE), np.float32)}
    adapter = write_peft(tmp_path / "adapter", tensors, trainable_token_indices=tokens)
    with pytest.raises(AdapterError, match=match):
        fuse(base, adapter, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_a_head_of_its_own_on_a_base_that_has_none(base: Path, tmp_path: Path) -> None:
    rows = np.ones((VOCABULARY, SIZE), np.float32)
    tensors = PLAIN | {f"{EMBEDDING}.weight": rows, "lm_head.weight": 2 * rows}
    with pytest.raises(AdapterError, match=r"a head of its own.*merge the adapter with PEFT"):
        fuse(base, write_peft(tmp_path / "adapter", tensors), tmp_path / "fused")


def test_a_gguf_adapter_leaves_out_nothing_that_was_trained(base: Path, tmp_path: Path) -> None:
    tensors = PLAIN | {"model.norm.weight": np.ones(SIZE, np.float32)}
    adapter = write_peft(tmp_path / "adapter", tensors, modules_to_save=["norm"])
    with pytest.raises(AdapterError, match=r"saves model\.norm\.weight as a whole"):
        export_lora(base, adapter, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
