"""Adapter folders as they lie on people's disks: other writers, older versions, other vocabularies.

Right is what mlx-lm gives with the folder, where it loads it, else what an independent merge in
float32 gives with the rule of the program that wrote the folder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from support.command import run
from support.tiny import (
    LLAMA,
    VOCABULARY,
    logits,
    make_adapter,
    make_model,
    save_adapter,
)

from mlx_fusekit import benchmark, export_lora, fuse, verify
from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.bench.arms import ArmSource, load_arm
from mlx_fusekit.errors import AdapterError, CheckpointError, ConfigurationError
from mlx_fusekit.inspecting import inspect

Q, V = (f"model.layers.{layer}.self_attn.{name}_proj" for layer, name in ((0, "q"), (1, "v")))
DIMS = LLAMA["hidden_size"]
MODULES = {Q: DIMS, V: DIMS // 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LLAMA | {"tie_word_embeddings": False}
    return make_model(
        tmp_path_factory.mktemp("models") / "base", config, bits=None, dtype=mx.float32
    )


def matrices(ranks: dict[str, int] | None = None) -> dict[str, mx.array]:
    """``lora_a`` and ``lora_b`` of two modules of different layers."""
    mx.random.seed(3)
    tensors = {}
    for module, rows in MODULES.items():
        rank = (ranks or {}).get(module, 4)
        tensors[f"{module}.lora_a"] = mx.random.normal((DIMS, rank)) * 0.1
        tensors[f"{module}.lora_b"] = mx.random.normal((rank, rows)) * 0.1
    return tensors


def write(folder: Path, tensors: dict[str, mx.array], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def stock(**more: Any) -> dict[str, Any]:
    """Settings as mlx-lm writes them today."""
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    parameters["keys"] = ["self_attn.q_proj", "self_attn.v_proj"]
    return {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, **more}


def merged(base: Path, tensors: dict[str, mx.array], scales: dict[str, float]) -> dict[str, Any]:
    """Weights that base and adapter amount to, merged in float32 by hand."""
    weights = mx.load(str(base / "model.safetensors"))
    found = {}
    for module, scale in scales.items():
        a, b = (np.array(tensors[f"{module}.lora_{leaf}"]) for leaf in "ab")
        found[module] = np.array(weights[f"{module}.weight"]) + scale * (a @ b).T
    return found


def check_merged(
    base: Path, adapter: Path, expected: dict[str, Any], **options: Any
) -> tuple[str, ...]:
    """Fuse, compare the weights with the expected ones, and return the warnings."""
    target = adapter.parent / "fused"
    report = fuse(base, adapter, target, **options)
    weights = mx.load(str(target / "model.safetensors"))
    for module, value in expected.items():
        np.testing.assert_allclose(np.array(weights[f"{module}.weight"]), value, atol=2e-6)
    return report.warnings


# -- other writers of mlx-lm's tensors


def unsloths_mlx_backend(folder: Path, **more: Any) -> Path:
    """mlx-lm's and PEFT's settings beside each other."""
    return write(
        folder,
        matrices(),
        stock(
            peft_type="LORA",
            base_model_name_or_path="unsloth/Llama-3.2-1B-Instruct",
            rank=4,
            scale=3.0,
            dropout=0.0,
            unsloth_mlx_lora_module_paths=[*MODULES],
            **more,
        ),
    )


def unsloths_mlx_backend_with_a_rank_and_scale_for_each_module(folder: Path) -> Path:
    ranks, scales = {Q: 4, V: 2}, {Q: 3.0, V: 0.5}
    config = stock(
        peft_type="LORA",
        unsloth_mlx_lora_module_ranks=ranks,
        unsloth_mlx_lora_module_scales=scales,
        unsloth_mlx_requires_unsloth_loader=True,
    )
    return write(folder, matrices(ranks), config)


def optiqs_ranks_by_sensitivity(folder: Path) -> Path:
    config = stock(
        peft_type="LORA",
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "v_proj"],
        base_model_name_or_path="base",
        optiq={
            "rank_scaling": "by_bits",
            "applied_ranks": {"layer_0.self_attn.q_proj": 8, "layer_1.self_attn.v_proj": 4},
        },
    )
    config["lora_parameters"]["keys"] = None
    return write(folder, matrices({Q: 8}), config)


def test_pefts_settings_beside_mlx_lms(base: Path, tmp_path: Path) -> None:
    adapter = unsloths_mlx_backend(tmp_path / "adapter")
    fuse(base, adapter, tmp_path / "fused")
    teacher = load_adapters(load_model(base)[0], str(adapter))
    student = load_model(tmp_path / "fused")[0]
    np.testing.assert_allclose(np.array(logits(student)), np.array(logits(teacher)), atol=2e-5)


def test_a_rank_and_scale_for_each_module(base: Path, tmp_path: Path) -> None:
    adapter = unsloths_mlx_backend_with_a_rank_and_scale_for_each_module(tmp_path / "adapter")
    expected = merged(base, matrices({V: 2}), {Q: 3.0, V: 0.5})
    check_merged(base, adapter, expected)


def test_a_gguf_adapter_of_modules_with_scales_of_their_own(base: Path, tmp_path: Path) -> None:
    import gguf

    adapter = unsloths_mlx_backend_with_a_rank_and_scale_for_each_module(tmp_path / "adapter")
    report = export_lora(base, adapter, tmp_path / "lora.gguf")
    file = gguf.GGUFReader(tmp_path / "lora.gguf")
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    a, b = (tensors[f"blk.1.attn_v.weight.lora_{leaf}"] for leaf in "ab")
    stored = matrices({V: 2})
    expected = 0.5 * np.array(stored[f"{V}.lora_a"]) @ np.array(stored[f"{V}.lora_b"])
    np.testing.assert_allclose(
        report.alpha / a.shape[0] * (b @ a), expected.T, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("of", ["unsloth_mlx_lora_module_ranks", "optiq"])
def test_recorded_ranks_that_are_not_the_matrices(base: Path, tmp_path: Path, of: str) -> None:
    recorded: Any = {V: 8}
    if of == "optiq":
        recorded = {"applied_ranks": {"layer_1.self_attn.v_proj": 8}}
    adapter = write(tmp_path / "adapter", matrices(), stock(**{of: recorded}))
    with pytest.raises(AdapterError, match=rf"{V} has rank 4, but adapter_config.json says 8"):
        fuse(base, adapter, tmp_path / "fused")


def test_ranks_by_sensitivity(base: Path, tmp_path: Path) -> None:
    adapter = optiqs_ranks_by_sensitivity(tmp_path / "adapter")
    warnings = check_merged(base, adapter, merged(base, matrices({Q: 8}), {Q: 3.0, V: 3.0}))
    assert not warnings


def test_an_alpha_of_pefts_that_says_another_scale(base: Path, tmp_path: Path) -> None:
    """mlx-lm reads its own settings; the user is told of the others."""
    adapter = write(tmp_path / "adapter", matrices(), stock(peft_type="LORA", r=4, lora_alpha=8))
    (warning,) = check_merged(base, adapter, merged(base, matrices(), {Q: 3.0, V: 3.0}))
    assert "lora_alpha / r is 2" in warning and "say --scale 2" in warning


@pytest.mark.parametrize("stated", [None, "LoRA"])
def test_a_fine_tune_type_that_mlx_lm_takes_for_lora(
    base: Path, tmp_path: Path, stated: str | None
) -> None:
    adapter = write(tmp_path / "adapter", matrices(), stock(fine_tune_type=stated))
    load_adapters(load_model(base)[0], str(adapter))
    assert open_adapter(adapter).kind == "lora"
    check_merged(base, adapter, merged(base, matrices(), {Q: 3.0, V: 3.0}))


# -- older versions of mlx-lm


def folder_of_mlx_lm_0_13(folder: Path, *, scale: float = 10.0, **more: Any) -> Path:
    config = {
        "lora_layers": 2,
        "lora_parameters": {
            "keys": ["self_attn.q_proj", "self_attn.v_proj"],
            "rank": 4,
            "alpha": 16,
            "dropout": 0.0,
            "scale": scale,
        },
        **more,
    }
    return write(folder, matrices(), config)


def folder_of_mlx_lm_0_14(folder: Path, **more: Any) -> Path:
    return folder_of_mlx_lm_0_13(folder, use_dora=False, **more)


def test_the_old_scale(base: Path, tmp_path: Path) -> None:
    """Up to 0.13 it was certainly ``scale * alpha / rank``."""
    adapter = folder_of_mlx_lm_0_13(tmp_path / "adapter")
    (warning,) = check_merged(base, adapter, merged(base, matrices(), {Q: 40.0, V: 40.0}))
    assert "scaled by scale * alpha / rank, so the update's scale is 40" in warning
    assert inspect(adapter).scale == 40.0  # type: ignore[union-attr]


def test_a_scale_of_uncertain_age(base: Path, tmp_path: Path) -> None:
    adapter = folder_of_mlx_lm_0_14(tmp_path / "adapter")
    (warning,) = check_merged(base, adapter, merged(base, matrices(), {Q: 10.0, V: 10.0}))
    assert "the update's scale is 10; if it is 40, say --scale 40" in warning


@pytest.mark.parametrize("version", ["0.13", "0.14"])
def test_both_rules_may_agree(base: Path, tmp_path: Path, version: str) -> None:
    make = {"0.13": folder_of_mlx_lm_0_13, "0.14": folder_of_mlx_lm_0_14}[version]
    adapter = make(tmp_path / "adapter", lora_layers=-1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_parameters"]["alpha"] = 4
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert not check_merged(base, adapter, merged(base, matrices(), {Q: 10.0, V: 10.0}))


@pytest.mark.parametrize("dropped", ["", "fine_tune_type"])
def test_todays_mlx_lm_ignores_alpha(base: Path, tmp_path: Path, dropped: str) -> None:
    config = stock()
    config.pop(dropped, None)
    config["lora_parameters"]["alpha"] = 16
    adapter = write(tmp_path / "adapter", matrices(), config)
    assert not check_merged(base, adapter, merged(base, matrices(), {Q: 3.0, V: 3.0}))


def test_the_users_scale_is_taken_before_all_else(base: Path, tmp_path: Path) -> None:
    adapter = folder_of_mlx_lm_0_14(tmp_path / "adapter")
    expected = merged(base, matrices(), {Q: 40.0, V: 40.0})
    assert not check_merged(base, adapter, expected, scale=40.0)
    recipe = json.loads((tmp_path / "fused" / "fusekit.json").read_text())
    assert recipe["adapters"][0]["scale"] == 40.0
    assert export_lora(base, adapter, tmp_path / "l.gguf", scale=40.0).alpha == 40.0 * 4


def test_a_scale_in_place_of_a_missing_one(base: Path, tmp_path: Path) -> None:
    config = stock()
    del config["lora_parameters"]["scale"]
    adapter = write(tmp_path / "adapter", matrices(), config)
    with pytest.raises(AdapterError, match="or give it as --scale"):
        fuse(base, adapter, tmp_path / "fused")
    check_merged(base, adapter, merged(base, matrices(), {Q: 3.0, V: 3.0}), scale=3.0)


def test_a_scale_goes_with_one_adapter(base: Path, tmp_path: Path) -> None:
    adapter = folder_of_mlx_lm_0_13(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="goes with one --adapter-path"):
        fuse(base, [adapter, adapter], tmp_path / "fused", scale=2.0)
    with pytest.raises(ConfigurationError, match="--scale inf: must be a finite number"):
        fuse(base, adapter, tmp_path / "fused", scale=float("inf"))


def test_a_scale_that_nothing_takes_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = folder_of_mlx_lm_0_14(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="--scale nan: must be a finite number"):
        inspect(adapter, scale=float("nan"))
    with pytest.raises(ConfigurationError, match=r"--scale 2: is for an adapter, and .* a model"):
        inspect(base, scale=2.0)
    with pytest.raises(ConfigurationError, match="--scale 2: goes with --adapter-path; drop it"):
        verify(None, None, base, reference=base, scale=2.0)
    with pytest.raises(ConfigurationError, match="--scale 2: goes with --adapter-path; drop it"):
        benchmark(base, None, base, scale=2.0)


def test_a_base_without_a_tokenizer_is_told_so(base: Path, tmp_path: Path) -> None:
    adapter = folder_of_mlx_lm_0_13(tmp_path / "adapter")
    fuse(base, adapter, tmp_path / "fused")
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(there is none\); download the"):
        verify(base, adapter, tmp_path / "fused")


def test_the_commands_take_a_scale(base: Path, tmp_path: Path) -> None:
    adapter = str(folder_of_mlx_lm_0_14(tmp_path / "adapter"))
    both = [run("inspect", adapter, *more, "--json") for more in ([], ["--scale", "40"])]
    facts = [json.loads(result.stdout) for result in both]
    assert [found["scale"] for found in facts] == [10.0, 40.0]
    assert ["say --scale 40" in str(found["warnings"]) for found in facts] == [True, False]


def test_the_unfused_arm_is_timed_with_the_old_scale(base: Path, tmp_path: Path) -> None:
    """Today's mlx-lm would refuse the folder, whose settings lack ``num_layers``."""
    adapter = folder_of_mlx_lm_0_13(tmp_path / "adapter")
    with pytest.raises(AttributeError):
        load_adapters(load_model(base)[0], str(adapter))
    arm = load_arm(ArmSource("base+adapter", "base", base, adapter))
    fuse(base, adapter, tmp_path / "fused")
    student = load_model(tmp_path / "fused")[0]
    np.testing.assert_allclose(np.array(logits(student)), np.array(logits(arm.model)), atol=1e-3)


def old_dora(folder: Path, base: Path) -> Path:
    """``use_dora`` instead of ``fine_tune_type``."""
    make_adapter(folder, base, kind="dora", keys=["self_attn.q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["fine_tune_type"]
    config["lora_layers"] = config.pop("num_layers")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    return folder


def test_use_dora(base: Path, tmp_path: Path) -> None:
    today = make_adapter(tmp_path / "today", base, kind="dora", keys=["self_attn.q_proj"])
    old = old_dora(tmp_path / "old", base)
    assert open_adapter(old).kind == "dora"
    for name, adapter in (("a", today), ("b", old)):
        fuse(base, adapter, tmp_path / name)
    one, other = (mx.load(str(tmp_path / name / "model.safetensors")) for name in "ab")
    assert all(mx.array_equal(one[name], other[name]) for name in one)


# -- relatives


def mlx_vlms_old_layers(folder: Path) -> Path:
    tensors = matrices()
    renamed = {name.replace("lora_a", "A").replace("lora_b", "B"): t for name, t in tensors.items()}
    return write(folder, renamed, {"rank": 4, "alpha": 0.1, "dropout": 0.1})


def test_mlx_vlms_old_layers(base: Path, tmp_path: Path) -> None:
    """They scaled by alpha itself."""
    adapter = mlx_vlms_old_layers(tmp_path / "adapter")
    assert not check_merged(base, adapter, merged(base, matrices(), {Q: 0.1, V: 0.1}))


def adapter_of_a_fused_projection(folder: Path) -> Path:
    tensors = {f"model.layers.0.self_attn.qkv_proj.lora_{leaf}.{part}": mx.zeros((4, 4))
               for leaf in "ab" for part in range(3)}  # fmt: skip
    return write(folder, tensors, stock())


def test_an_adapter_of_a_fused_projection(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of_a_fused_projection(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="which mlx-lm trains but does not load again"):
        fuse(base, adapter, tmp_path / "fused")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gpt2", "attn.c_attn"),
        ("gpt_neox", "attention.query_key_value"),
        ("exaone", "attn.attention.q_proj"),
        ("dbrx", "norm_attn_norm.attn.Wqkv"),
    ],
)
def test_layers_that_are_not_called_layers(tmp_path: Path, name: str, key: str) -> None:
    config = ELSEWHERE[name]
    base = make_model(tmp_path / "base", config, bits=None, dtype=mx.float32)
    adapter = make_adapter(tmp_path / "adapter", base, keys=[key], num_layers=1)
    fuse(base, adapter, tmp_path / "fused")
    teacher = load_adapters(load_model(base)[0], str(adapter))
    student = load_model(tmp_path / "fused")[0]
    np.testing.assert_allclose(np.array(logits(student)), np.array(logits(teacher)), atol=1e-4)


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_layer": 2,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_norm_epsilon": 1e-5,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "gpt2": _SIZES
    | {"model_type": "gpt2", "n_ctx": 64, "n_embd": 64, "n_head": 4, "n_positions": 64},
    "gpt_neox": _SIZES
    | {
        "model_type": "gpt_neox",
        "max_position_embeddings": 64,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.5,
    },
    "exaone": _SIZES
    | {"model_type": "exaone", "rope_theta": 10000.0, "max_position_embeddings": 64},
    "dbrx": {
        "model_type": "dbrx",
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
}


# -- vocabularies


def adapter_with_tokens(folder: Path, tokens: int, *, changed: int | None = None) -> Path:
    """LoRA on the head of a model with so many tokens, all changed or the first few."""
    mx.random.seed(5)
    b = mx.random.normal((4, tokens)) * 0.1
    if changed is not None:
        b = mx.where(mx.arange(tokens)[None] < changed, b, 0)
    tensors = {"lm_head.lora_a": mx.random.normal((DIMS, 4)) * 0.1, "lm_head.lora_b": b}
    return save_adapter(folder, tensors, keys=["lm_head"])


def test_tokens_that_only_the_base_has_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    adapter = adapter_with_tokens(tmp_path / "adapter", 90)
    report = fuse(base, adapter, tmp_path / "fused")
    assert "tokens 90 to 95 stay as they are in the base" in report.warnings[0]
    before, after = (
        np.array(mx.load(str(folder / "model.safetensors"))["lm_head.weight"])
        for folder in (base, tmp_path / "fused")
    )
    np.testing.assert_array_equal(before[90:], after[90:])
    a, b = (
        np.array(mx.load(str(adapter / "adapters.safetensors"))[f"lm_head.lora_{x}"]) for x in "ab"
    )
    np.testing.assert_allclose(after[:90], before[:90] + 2.0 * (a @ b).T, atol=2e-6)


def test_tokens_that_the_base_lacks_are_named(base: Path, tmp_path: Path) -> None:
    adapter = adapter_with_tokens(tmp_path / "adapter", 98)
    added = [{"id": 96 + i, "content": name} for i, name in enumerate(["<think>", "</think>"])]
    (adapter / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    with pytest.raises(AdapterError, match=r"tokens 96 to 97 \('<think>', '</think>'\)"):
        fuse(base, adapter, tmp_path / "fused")


def test_tokens_that_the_base_lacks_and_nothing_changes(base: Path, tmp_path: Path) -> None:
    adapter = adapter_with_tokens(tmp_path / "adapter", 98, changed=96)
    report = fuse(base, adapter, tmp_path / "fused")
    assert "tokens 96 to 97 are not in the base" in report.warnings[0]


@pytest.mark.parametrize(("tokens", "said"), [(98, "tokens 96 to 97"), (90, "has 90 tokens")])
def test_a_full_fine_tune_with_other_tokens(
    base: Path, tmp_path: Path, tokens: int, said: str
) -> None:
    weights = {"lm_head.weight": mx.zeros((tokens, DIMS))}
    adapter = save_adapter(tmp_path / "adapter", weights, kind="full")
    with pytest.raises(AdapterError, match=f"lm_head (has )?{said}"):
        fuse(base, adapter, tmp_path / "fused")


# -- twice


def test_the_same_adapter_twice(base: Path, tmp_path: Path) -> None:
    first, second = (
        make_adapter(tmp_path / name, base, seed=seed) for name, seed in (("a", 1), ("b", 2))
    )
    copied = shutil.copytree(first, tmp_path / "copy")
    fuse(base, first, tmp_path / "one")
    with pytest.raises(ConfigurationError, match=r"holds this adapter already.*say --again"):
        fuse(tmp_path / "one", copied, tmp_path / "two")
    fuse(tmp_path / "one", second, tmp_path / "two")
    with pytest.raises(ConfigurationError, match="holds this adapter already"):
        fuse(tmp_path / "two", first, tmp_path / "three")
    fuse(tmp_path / "two", first, tmp_path / "three", again=True)
    recipe = json.loads((tmp_path / "three" / "fusekit.json").read_text())
    assert len(recipe["earlier_adapters"]) == 2
    assert recipe["earlier_adapters"][0].keys() == recipe["adapters"][0].keys()


OTHERS = json.dumps({"adapters": [{"id": "a", "path": "/home/someone/a"}]})


@pytest.mark.parametrize(
    "content", ["[]", '{"adapters": 3}', '{"adapters": [{"sha256": 1}]}', "{", OTHERS]
)
def test_a_recipe_that_is_not_ours(base: Path, tmp_path: Path, content: str) -> None:
    other = shutil.copytree(base, tmp_path / "base")
    (other / "fusekit.json").write_text(content)
    adapter = make_adapter(tmp_path / "adapter", base)
    fuse(other, adapter, tmp_path / "fused")
    assert "/home" not in (tmp_path / "fused" / "fusekit.json").read_text()


def test_a_weight_that_is_no_number(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(
        ConfigurationError, match=r"adapter:nan: the weight must be a finite number"
    ):
        fuse(base, f"{adapter}:nan", tmp_path / "fused")
