"""PEFT's adapters: what each setting and name makes of the base's weights, by NumPy."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader
from mlx_lm.utils import load_model
from support.every_class import config_of
from support.exportable import make_exportable
from support.peft import as_peft, pair, product, random, write_peft
from support.tiny import LLAMA, QWEN3_MOE, make_adapter, make_model

from mlx_fusekit import fuse, samples, verify
from mlx_fusekit.adapters.fitting import base_warnings
from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.adapters.peft_names import parsed
from mlx_fusekit.bench.arms import ArmSource, load_arm
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.gguf.lora import export_lora
from mlx_fusekit.inspecting import inspect

Q, V = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
EMBEDDING = "model.embed_tokens"
MLP = "model.layers.0.mlp"
HIDDEN, INNER, TOKENS, EXPERTS = 128, 256, 96, 4

Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("peft") / "dense", bits=None, dtype=mx.float32)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LLAMA | {"tie_word_embeddings": False}
    folder = tmp_path_factory.mktemp("peft") / "untied"
    return make_model(folder, config, bits=None, dtype=mx.float32)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("peft") / "quantized")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "mixture"
    return make_model(folder, QWEN3_MOE, bits=None, dtype=mx.float32)


def weights(folder: Path) -> Weights:
    loaded = mx.load(str(folder / "model.safetensors"))
    assert isinstance(loaded, dict)
    return {name: np.array(value) for name, value in loaded.items()}


def changed(base: Path, adapter: Path, **options: Any) -> Weights:
    """What fusing changed of each tensor."""
    target = adapter.parent / "fused"
    fuse(base, adapter, target, **options)
    before, after = weights(base), weights(target)
    assert before.keys() == after.keys()
    return {
        name: value - before[name] for name, value in after.items() if (value != before[name]).any()
    }


def assert_changed(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-7, err_msg=name)


def test_lora(dense: Path, tmp_path: Path) -> None:
    tensors = pair(Q, HIDDEN, HIDDEN) | pair(V, HIDDEN // 2, HIDDEN)
    adapter = write_peft(tmp_path / "adapter", tensors)
    expected = {f"{module}.weight": product(tensors, module, 2.0) for module in (Q, V)}
    assert_changed(changed(dense, adapter), expected)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"lora_alpha": 3}, 0.75),
        ({"alpha_pattern": {"q_proj": 20}}, 5.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 20, r".*\.1\..*q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"proj": 20, "1.self_attn.q_proj": 1}}, 0.25),
        ({"alpha_pattern": {"q_proj": 20}, "use_rslora": True}, 10.0),
        ({"r": 16, "rank_pattern": {"self_attn.q_proj": 4}}, 2.0),
        ({"r": 16, "rank_pattern": {"q_proj": 4, "1.self_attn.q_proj": 3}}, 2.0),
        ({"task_type": "FEATURE_EXTRACTION", "target_modules": "all-linear"}, 2.0),
        ({"target_modules": r".*\.k_proj", "layers_to_transform": [0]}, 2.0),
        ({"init_lora_weights": "eva", "fan_in_fan_out": True}, 2.0),
    ],
)
def test_settings_that_make_the_scale(
    dense: Path, tmp_path: Path, settings: dict[str, Any], scale: float
) -> None:
    """Patterns are matched as PEFT does: the first whose match ends the module's path."""
    tensors = pair(Q, HIDDEN, HIDDEN)
    adapter = write_peft(tmp_path / "adapter", tensors, **settings)
    assert_changed(changed(dense, adapter), {f"{Q}.weight": product(tensors, Q, scale)})


def test_a_scale_that_the_user_says(dense: Path, tmp_path: Path) -> None:
    tensors = pair(Q, HIDDEN, HIDDEN)
    adapter = write_peft(tmp_path / "adapter", tensors, alpha_pattern={"q_proj": 20})
    found = changed(dense, adapter, scale=0.125)
    assert_changed(found, {f"{Q}.weight": product(tensors, Q, 0.125)})


def test_dora(dense: Path, tmp_path: Path) -> None:
    tensors = pair(Q, HIDDEN, HIDDEN)
    magnitude = 1 + np.abs(random(HIDDEN))
    for place, name in enumerate(("", ".weight", ".default.weight")):
        stored = tensors | {f"{Q}.lora_magnitude_vector{name}": magnitude}
        adapter = write_peft(tmp_path / str(place) / "adapter", stored, use_dora=True)
        before = weights(dense)[f"{Q}.weight"]
        whole = before + product(tensors, Q, 2.0)
        after = magnitude[:, None] * whole / np.linalg.norm(whole, axis=1)[:, None]
        assert_changed(changed(dense, adapter), {f"{Q}.weight": after - before})


def test_embeddings(dense: Path, tmp_path: Path) -> None:
    a, b = random(4, TOKENS), random(HIDDEN, 4)
    tensors = {
        f"{EMBEDDING}.lora_embedding_A": a,
        f"{EMBEDDING}.lora_embedding_B": b,
        # PEFT saves it beside them, unchanged.
        f"{EMBEDDING}.base_layer.weight": weights(dense)[f"{EMBEDDING}.weight"],
    }
    adapter = write_peft(tmp_path / "adapter", tensors)
    assert_changed(changed(dense, adapter), {f"{EMBEDDING}.weight": 2.0 * (b @ a).T})


@pytest.mark.parametrize("bits", [None, 4])
def test_rows_of_single_tokens(tmp_path: Path, bits: int | None) -> None:
    base = make_model(tmp_path / "base", bits=bits, dtype=mx.float32)
    new = random(2, HIDDEN)
    tensors = pair(Q, HIDDEN, HIDDEN) | {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": new}
    adapter = write_peft(tmp_path / "adapter", tensors, trainable_token_indices=[70, 3])
    dense = {"dequantize": True, "dtype": "float32"} if bits else {}
    fuse(base, adapter, tmp_path / "fused", **dense)
    before, after = (
        np.array(load_model(folder)[0].model.embed_tokens(mx.arange(TOKENS)))
        for folder in (base, tmp_path / "fused")
    )
    before[[70, 3]] = new
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_what_the_base_has_in_several_matrices(dense: Path, tmp_path: Path) -> None:
    fused = f"{MLP}.gate_up_proj"
    tensors = pair(fused, 2 * INNER, HIDDEN)
    both = product(tensors, fused, 2.0)
    expected = {f"{MLP}.gate_proj.weight": both[:INNER], f"{MLP}.up_proj.weight": both[INNER:]}
    assert_changed(changed(dense, write_peft(tmp_path / "adapter", tensors)), expected)


def test_a_head_that_is_the_embedding(dense: Path, tmp_path: Path) -> None:
    """PEFT saves both; the base has but one."""
    value = random(TOKENS, HIDDEN)
    tensors = pair(Q, HIDDEN, HIDDEN) | {f"{EMBEDDING}.weight": value, "lm_head.weight": value}
    adapter = write_peft(tmp_path / "one" / "adapter", tensors)
    found = changed(dense, adapter)
    before = weights(dense)[f"{EMBEDDING}.weight"]
    assert_changed(
        found, {f"{Q}.weight": product(tensors, Q, 2.0), f"{EMBEDDING}.weight": value - before}
    )
    tensors["lm_head.weight"] = value + 1
    with pytest.raises(AdapterError, match=r"a head of its own, .* merge the adapter with PEFT"):
        changed(dense, write_peft(tmp_path / "two" / "adapter", tensors))
    with pytest.raises(AdapterError, match="changes lm_head, and the base has none"):
        changed(dense, write_peft(tmp_path / "three/adapter", pair("lm_head", TOKENS, HIDDEN)))


def test_what_was_saved_as_a_whole(untied: Path, tmp_path: Path) -> None:
    head, norm = random(TOKENS, HIDDEN), random(HIDDEN)
    tensors = pair(Q, HIDDEN, HIDDEN) | {
        "lm_head.weight": head,
        "model.norm.modules_to_save.default.weight": norm,
    }
    found = changed(untied, write_peft(tmp_path / "adapter", tensors, modules_to_save=["lm_head"]))
    before = weights(untied)
    expected = {
        f"{Q}.weight": product(tensors, Q, 2.0),
        "lm_head.weight": head - before["lm_head.weight"],
        "model.norm.weight": norm - before["model.norm.weight"],
    }
    assert_changed(found, expected)


def test_biases(dense: Path, tmp_path: Path) -> None:
    ours, other = random(HIDDEN), random(HIDDEN // 2)
    tensors = pair(Q, HIDDEN, HIDDEN) | {f"{Q}.base_layer.bias": ours, f"{V}.bias": other}
    found = changed(dense, write_peft(tmp_path / "adapter", tensors, bias="all"))
    before = weights(dense)
    expected = {
        f"{Q}.weight": product(tensors, Q, 2.0),
        f"{Q}.bias": ours - before[f"{Q}.bias"],
        f"{V}.bias": other - before[f"{V}.bias"],
    }
    assert_changed(found, expected)


def test_experts_of_their_own(mixture: Path, tmp_path: Path) -> None:
    """Those without an update stay as they are; Mixtral's names are known too."""
    inner = 64
    gate, w2 = f"{MLP}.experts.2.gate_proj", f"{MLP}.experts.0.w2"
    tensors = pair(gate, inner, HIDDEN) | pair(w2, HIDDEN, inner, rank=2, seed=5)
    adapter = write_peft(tmp_path / "adapter", tensors, rank_pattern={"w2": 2})
    found = changed(mixture, adapter)
    up = np.zeros((EXPERTS, inner, HIDDEN))
    up[2] = product(tensors, gate, 2.0)
    down = np.zeros((EXPERTS, HIDDEN, inner))
    down[0] = product(tensors, w2, 4.0)
    expected = {
        f"{MLP}.switch_mlp.gate_proj.weight": up,
        f"{MLP}.switch_mlp.down_proj.weight": down,
    }
    assert_changed(found, expected)


def in_parameters(place: str, both: Any, down: Any) -> dict[str, np.ndarray]:
    """``lora_A`` and ``lora_B`` of all experts' two parameters."""
    names = (f"{place}.{name}.weight" for name in ("lora_A", "lora_B"))
    inner = (f"{place}.base_layer.{name}.weight" for name in ("lora_A", "lora_B"))
    return dict(zip((*inner, *names), (*both, *down), strict=True))


def of_each(first: np.ndarray, second: np.ndarray, experts: int = EXPERTS) -> np.ndarray:
    """``B A`` of each expert: in A the expert is slowest, in B fastest."""
    parts = first.reshape(experts, len(first) // experts, -1)
    return np.stack([second[:, e::experts] @ parts[e] for e in range(experts)])


@pytest.mark.parametrize("turned", [False, True])
def test_experts_of_one_parameter(mixture: Path, tmp_path: Path, turned: bool) -> None:
    """As ``target_parameters`` has them; before PEFT 0.19, lora_A is of the outputs."""
    rank, inner = 3, 64
    sizes = [(HIDDEN, 2 * inner), (inner, HIDDEN)]
    pairs = [
        (random(EXPERTS * rank, i), random(o, rank * EXPERTS))
        for i, o in (size[::-1] if turned else size for size in sizes)
    ]
    adapter = write_peft(
        tmp_path / "adapter",
        in_parameters(f"{MLP}.experts", *pairs),
        r=rank,
        alpha_pattern={"experts.down_proj": 6},
        lora_alpha=3,
    )
    both, down = (of_each(*matrices) for matrices in pairs)
    if turned:
        both, down = both.swapaxes(1, 2), down.swapaxes(1, 2)
    switch = f"{MLP}.switch_mlp"
    expected = {
        f"{switch}.gate_proj.weight": both[:, :inner],
        f"{switch}.up_proj.weight": both[:, inner:],
        f"{switch}.down_proj.weight": 2.0 * down,
    }
    assert_changed(changed(mixture, adapter), expected)


def test_rows_of_gate_and_up_by_turns(tmp_path: Path) -> None:
    """As GPT-OSS has them in transformers, whose parameters are ``[experts, in, out]``."""
    base = make_model(tmp_path / "base", config_of("gpt_oss"), bits=None, dtype=mx.float32)
    place = "model.layers.1.mlp.experts"
    experts, inner, hidden = weights(base)[f"{place}.gate_proj.weight"].shape
    gate_up = random(experts * 3, hidden), random(2 * inner, 3 * experts)
    down = random(experts * 3, inner), random(hidden, 3 * experts)
    adapter = write_peft(tmp_path / "adapter", in_parameters(place, gate_up, down), r=3)
    both = 8 / 3 * of_each(*gate_up, experts)
    expected = {
        f"{place}.gate_proj.weight": both[:, ::2],
        f"{place}.up_proj.weight": both[:, 1::2],
        f"{place}.down_proj.weight": 8 / 3 * of_each(*down, experts),
    }
    assert_changed(changed(base, adapter), expected)


@pytest.mark.parametrize(
    ("prefix", "module"),
    [
        ("base_model.model.", Q),
        ("", Q),
        ("base_model.model.", Q.replace("model.", "model.language_model.", 1)),
        ("base_model.model.", Q.replace("model.", "language_model.model.", 1)),
        ("base_model.model.", Q.replace("model.", "", 1)),
    ],
)
def test_trees_of_models(dense: Path, tmp_path: Path, prefix: str, module: str) -> None:
    tensors = pair(module, HIDDEN, HIDDEN)
    adapter = write_peft(tmp_path / "adapter", tensors, prefix=prefix)
    assert_changed(changed(dense, adapter), {f"{Q}.weight": product(tensors, module, 2.0)})


def test_names_with_the_adapters_own() -> None:
    for name, module, leaf in (
        (f"base_model.model.{Q}.lora_A.weight", Q, "lora_A"),
        (f"base_model.model.{Q}.lora_B.default.weight", Q, "lora_B"),
        (f"{EMBEDDING}.lora_embedding_A.default", EMBEDDING, "embedding_A"),
        (f"{EMBEDDING}.lora_embedding_B", EMBEDDING, "embedding_B"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head", "weight"),
        (f"{Q}.lora_magnitude_vector.default", Q, "magnitude"),
        (f"{Q}.lora_B.bias", Q, "lora_B.bias"),
        (f"base_model.model._orig_mod.{Q}.lora_A.weight", Q, "lora_A"),
    ):
        found = parsed(name)
        assert found is not None
        assert (found.module, found.leaf) == (module, leaf)
    assert parsed("something") is None


def in_mlx_lms_form(folder: Path, tensors: Weights, scale: float) -> Path:
    """The same adapter as mlx-lm saves it."""
    folder.mkdir()
    leaves = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
    arrays = {}
    for name, value in tensors.items():
        for theirs, ours in leaves.items():
            if name.endswith(theirs):
                arrays[name.replace(theirs, ours)] = mx.array(np.ascontiguousarray(value.T))
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": scale, "dropout": 0.0},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_both_formats_give_the_same_bytes(quantized: Path, tmp_path: Path) -> None:
    tensors = pair(Q, HIDDEN, HIDDEN) | pair(UP, INNER, HIDDEN) | pair(DOWN, HIDDEN, INNER)
    theirs = write_peft(tmp_path / "peft", tensors)
    ours = in_mlx_lms_form(tmp_path / "mlx", tensors, 2.0)
    for adapter in (theirs, ours):
        fuse(quantized, adapter, tmp_path / f"fused-{adapter.name}", requantize="nearest")
    for name in ("model.safetensors", "config.json"):
        files = [(tmp_path / f"fused-{kind}" / name).read_bytes() for kind in ("peft", "mlx")]
        assert files[0] == files[1]
    assert files[0] != b""


def test_a_saved_weight_is_quantized_as_the_bases(quantized: Path, tmp_path: Path) -> None:
    value = random(HIDDEN, HIDDEN)
    tensors = pair(V, HIDDEN // 2, HIDDEN) | {f"{Q}.weight": value}
    fuse(quantized, write_peft(tmp_path / "adapter", tensors), tmp_path / "fused")
    layer = load_model(tmp_path / "fused")[0].model.layers[1].self_attn.q_proj
    found = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=4)
    step = np.repeat(np.abs(np.array(layer.scales.astype(mx.float32))), 64, axis=1)
    assert (np.abs(np.array(found.astype(mx.float32)) - value) <= 1.1 * step).all()


def test_what_else_takes_adapters(quantized: Path, dense: Path, tmp_path: Path) -> None:
    tensors = pair(Q, HIDDEN, HIDDEN)
    adapter = write_peft(tmp_path / "adapter", tensors)
    facts = inspect(adapter, model=quantized).as_json()
    assert (facts["rank"], facts["scale"], facts["modules"]) == (4, 2.0, 1)
    assert facts["deltas"][0]["module"] == Q
    assert facts["trained_on"] == "base"
    fuse(dense, adapter, tmp_path / "fused")
    before = weights(dense)
    np.testing.assert_allclose(
        weights(tmp_path / "fused")[f"{Q}.weight"],
        before[f"{Q}.weight"] + product(tensors, Q, 2.0),
        atol=2e-7,
    )


def test_it_runs_as_mlx_lms_does(tmp_path: Path) -> None:
    """Beside the base in ``bench``, and as the teacher of ``verify`` and of calibration."""
    base, ours = samples.model_path(), samples.adapter_path()
    theirs = as_peft(ours, tmp_path / "peft")
    tokens = mx.array([[5, 6, 7, 8, 9, 10]])
    logits = [
        load_arm(ArmSource("base+adapter", "base", base, adapter)).model(tokens)
        for adapter in (ours, theirs)
    ]
    assert mx.array_equal(*logits)
    bare = load_arm(ArmSource("base", "base", base)).model(tokens)
    assert not mx.allclose(logits[0], bare, atol=0.1)
    data, few = samples.evaluation_data_path(), 300
    fuse(base, ours, tmp_path / "fused", requantize="nearest")
    reports = [
        verify(base, adapter, tmp_path / "fused", data=data, max_tokens=few)
        for adapter in (ours, theirs)
    ]
    assert reports[0].kl_mean == reports[1].kl_mean > 0


def test_it_goes_to_llama_cpp_as_mlx_lms_does(tmp_path: Path) -> None:
    base, ours = make_exportable(tmp_path / "base"), tmp_path / "mlx"
    make_adapter(ours, base)
    theirs = as_peft(ours, tmp_path / "peft")
    files = []
    for adapter in (ours, theirs):
        export_lora(base, adapter, tmp_path / f"{adapter.name}.gguf")
        reader = GGUFReader(tmp_path / f"{adapter.name}.gguf")
        alpha = reader.fields["adapter.lora.alpha"].contents()
        files.append((alpha, {t.name: t.data.tobytes() for t in reader.tensors}))
    assert files[0] == files[1]
    assert files[0][1]


@pytest.mark.parametrize(
    ("trained_on", "base", "told"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "mlx-community/Llama-3.2-1B-Instruct-4bit", "rounded"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "mlx-community/Qwen3-8B-4bit", "rounded"),
        ("me/Model-bf16", "me/model-MXFP4", "rounded"),
        ("me/model-4bit", "you/model-4bit", None),
        ("me/Model-1B", "me/Model-3B-4bit", "if they differ in more than the name"),
        (None, "me/model", None),
    ],
)
def test_a_base_that_is_rounded_in_another_way(
    trained_on: str | None, base: str, told: str | None
) -> None:
    found = " ".join(base_warnings(trained_on, base))
    assert (told in found) if told else found == ""


def test_several_add_up(dense: Path, tmp_path: Path) -> None:
    """Of both formats."""
    first, second = pair(Q, HIDDEN, HIDDEN), pair(Q, HIDDEN, HIDDEN, seed=7)
    theirs = write_peft(tmp_path / "peft", first)
    ours = in_mlx_lms_form(tmp_path / "mlx", second, 2.0)
    before = weights(dense)
    fuse(dense, [theirs, f"{ours}:-0.5"], tmp_path / "fused")
    found = weights(tmp_path / "fused")[f"{Q}.weight"] - before[f"{Q}.weight"]
    expected = product(first, Q, 2.0) - product(second, Q, 1.0)
    np.testing.assert_allclose(found, expected, atol=2e-7)


def test_what_is_whole_cannot_be_weighted(untied: Path, tmp_path: Path) -> None:
    tensors = pair(Q, HIDDEN, HIDDEN) | {"lm_head.weight": random(TOKENS, HIDDEN)}
    adapter = write_peft(tmp_path / "adapter", tensors)
    with pytest.raises(AdapterError, match=r"lm_head.* saved as a whole cannot be weighted"):
        fuse(untied, f"{adapter}:0.5", tmp_path / "fused")


def test_the_kind_is_what_the_file_holds(tmp_path: Path) -> None:
    tensors = pair(Q, HIDDEN, HIDDEN)
    assert open_adapter(write_peft(tmp_path / "a", tensors, use_dora=True)).kind == "lora"
    magnitude = {f"{Q}.lora_magnitude_vector": random(HIDDEN)}
    assert open_adapter(write_peft(tmp_path / "b", tensors | magnitude)).kind == "dora"
