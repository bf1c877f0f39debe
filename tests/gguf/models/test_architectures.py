"""What a GGUF file of each architecture holds, as far as it can be told without llama.cpp."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from support.tiny_architectures import CONFIGS, LLAMA3, LONGROPE, YARN, make_changed, make_model

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.sanitized import ArrayTensor, open_base
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.models import hyperparameters
from mlx_fusekit.gguf.models.architectures import Layout, lay_out, supported
from mlx_fusekit.gguf.models.families import FAMILIES
from mlx_fusekit.gguf.models.naming import in_file_order, leaf, needs_float32
from mlx_fusekit.gguf.models.requirements import softmax_scale
from mlx_fusekit.gguf.models.settings import Settings
from mlx_fusekit.gguf.models.tensors import GgufTensor

Changes = dict[str, Any]


@pytest.fixture(scope="module", params=CONFIGS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A quantized model of each configuration."""
    return open_base(make_model(tmp_path_factory.mktemp("model"), request.param, bits=4))


@pytest.fixture(scope="module")
def layout(base: BaseModel) -> Layout:
    """What its file holds."""
    return lay_out(base)


def all_keys() -> set[str]:
    """The keys that gguf knows, without the architecture."""
    groups = (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.SSM)
    names = {
        str(value) for group in (*groups, gguf.Keys.ShortConv) for value in vars(group).values()
    }
    return {name.removeprefix("{arch}.") for name in names if name.startswith("{arch}.")}


def named(layout: Layout, name: str) -> GgufTensor:
    (tensor,) = (tensor for tensor in layout.tensors if tensor.name == name)
    return tensor


def logical_shape(base: BaseModel, name: str) -> tuple[int, ...]:
    """Of a stored tensor, as if it were not quantized."""
    *rows, columns = base.tensors[name].shape
    spec = base.quantization(name.removesuffix(".weight"))
    return (*rows, columns if spec is None else spec.columns(columns))


class TestEveryArchitecture:
    def test_has_keys_and_tensors_that_gguf_knows(self, base: BaseModel, layout: Layout) -> None:
        family = FAMILIES[base.config["model_type"]]
        architecture = gguf.MODEL_ARCH[family.gguf]
        assert layout.architecture == gguf.MODEL_ARCH_NAMES[architecture]
        for key in layout.hyperparameters:
            assert key.removeprefix(f"{layout.architecture}.") in all_keys()
        patterns = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture]}
        patterns |= {"rope_factors_long", "rope_factors_short"}  # llama.cpp reads them in more
        for tensor in layout.tensors:
            stem = tensor.name.removesuffix(".weight").removesuffix(".bias")
            parts = stem.split(".")
            if parts[0] == "blk":
                stem = ".".join(["blk", "{bid}", *parts[2:]])
            assert stem in patterns

    def test_uses_every_stored_tensor(self, base: BaseModel, layout: Layout) -> None:
        used = {tensor.source for tensor in layout.tensors} - {""}
        for module in base.quantized_modules:
            assert f"{module}.weight" in used
            used |= {f"{module}.scales", f"{module}.biases"}
        assert used == set(base.tensors)

    def test_has_each_value_once(self, base: BaseModel, layout: Layout) -> None:
        sizes: dict[str, int] = {}
        for tensor in layout.tensors:
            if tensor.name != "output.weight" or named(layout, "token_embd.weight").source != (
                tensor.source
            ):
                sizes[tensor.source] = sizes.get(tensor.source, 0) + math.prod(tensor.shape)
            if tensor.rows is not None:
                assert len(set(tensor.rows)) == len(tensor.rows)
                columns = logical_shape(base, tensor.source)[-1]
                assert len(tensor.rows) * columns == math.prod(tensor.shape)
        for name, size in sizes.items():
            if name != "":
                assert size == math.prod(logical_shape(base, name))

    def test_norms_biases_and_routers_are_float32(self, layout: Layout) -> None:
        for tensor in layout.tensors:
            name = leaf(tensor.name)
            exact = ("norm", "bias", "gate_inp", "conv.w", "conv1d", "rope", "sinks")
            assert tensor.float32 == (any(part in name for part in exact) or name == "ssm_a")

    def test_keys_can_be_written(self, layout: Layout) -> None:
        writer = gguf.GGUFWriter(None, layout.architecture)
        hyperparameters.write(layout.hyperparameters, writer)
        written = writer.kv_data[0]
        for key, (value, kind) in layout.hyperparameters.items():
            assert written[key].type is kind
            assert written[key].value == value


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "changes", "said"),
        [
            ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
            ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
            (
                "llama",
                {"vocab_size": 97},
                r"embed_tokens.weight has shape \[96, 128\], .* \[97, 128\]",
            ),
            (
                "llama",
                {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
                "sliding_attention",
            ),
            (
                "llama/yarn",
                {"rope_scaling": {**YARN, "beta_fast": 16}},
                "beta_fast 32 only, not 16",
            ),
            (
                "llama/yarn",
                {"rope_scaling": {**YARN, "attention_factor": 1.0}},
                "attention_factor",
            ),
            (
                "llama/yarn",
                {"rope_scaling": {"type": "yarn", "factor": 4.0}},
                "no original_max_position_embeddings",
            ),
            (
                "llama/longrope",
                {"rope_scaling": {**LONGROPE, "short_factor": [1.0]}},
                r"short_factor .* has shape \[1\], not \[16\]",
            ),
            ("qwen3", {"rope_scaling": LLAMA3}, "'llama3'"),
            ("qwen2", {"rope_traditional": True}, "rope_traditional is true"),
            ("glm4", {"rope_traditional": False}, "rope_traditional is false"),
            ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
            ("olmo2", {"head_dim": 64}, "4 heads of width 64 are not the hidden size of 128"),
            ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob is True"),
            ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
            ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar is 32"),
            ("gemma3", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar is 32"),
            ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "no_rope_layers"),
            (
                "cohere",
                {"use_qk_norm": True, "tie_word_embeddings": True},
                "use_qk_norm is True with 2 layers",
            ),
            ("exaone4", {"sliding_window_pattern": "LG"}, "with 2 layers"),
            ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
            (
                "deepseek_v3",
                {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
                "not 1 and 0.5",
            ),
            (
                "phi",
                {"rope_parameters": {"partial_rotary_factor": 0.25}},
                "partial_rotary_factor is 0.25 in rope_parameters, but mlx-lm runs 0.5",
            ),
            ("lfm2_moe", {"routed_scaling_factor": 2.0}, "routed_scaling_factor is 2.0"),
            ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
        ],
    )
    def test_what_llama_cpp_cannot_run(
        self, tmp_path: Path, name: str, changes: Changes, said: str
    ) -> None:
        changed_base = make_changed(tmp_path, name, changes)
        with pytest.raises(CheckpointError, match=said) as error:
            lay_out(changed_base)
        assert str(tmp_path) in str(error.value)

    def test_scale_of_the_largest_gemma(self) -> None:
        used = {
            "num_hidden_layers": 46,
            "hidden_size": 4608,
            "num_attention_heads": 32,
            "head_dim": 128,
        }
        check = softmax_scale(46)
        check(Settings(Path("config.json"), {}, {**used, "query_pre_attn_scalar": 144}))
        with pytest.raises(CheckpointError, match=r"128, but llama\.cpp takes 144"):
            check(Settings(Path("config.json"), {}, {**used, "query_pre_attn_scalar": 128}))

    def test_unknown_type_lists_the_known_ones(self, tmp_path: Path) -> None:
        make_model(tmp_path, "llama")
        config = {"model_type": "mamba"}
        unknown = SimpleNamespace(folder=tmp_path, config=config, tensors={})
        with pytest.raises(CheckpointError, match=r"'mamba' cannot .* can: cohere, ") as error:
            lay_out(unknown)
        assert all(name in str(error.value) for name in FAMILIES)

    def test_tensor_that_llama_cpp_does_not_know(self, tmp_path: Path) -> None:
        found = open_base(make_model(tmp_path, "qwen3"))
        extra = ArrayTensor("model.extra.weight", "F32", (4,), np.zeros(4, np.float32))
        tensors = {**found.tensors, extra.name: extra}
        with pytest.raises(CheckpointError, match=r"model\.extra\.weight is none"):
            lay_out(with_tensors(found, tensors))

    def test_bias_that_llama_cpp_leaves_out(self, tmp_path: Path) -> None:
        found = open_base(make_model(tmp_path, "qwen2"))
        name = "model.layers.1.self_attn.o_proj.bias"
        extra = ArrayTensor(name, "F32", (128,), np.zeros(128, np.float32))
        with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.bias is a bias"):
            lay_out(with_tensors(found, {**found.tensors, name: extra}))

    def test_two_tensors_of_one_name(self, tmp_path: Path) -> None:
        found = open_base(make_model(tmp_path, "qwen3"))
        tensors = (
            {**found.tensors, "transformer.wte.weight": found.tensors["lm_head.weight"]}
            if ("lm_head.weight" in found.tensors)
            else {**found.tensors, "transformer.wte.weight": found.tensors["model.norm.weight"]}
        )
        with pytest.raises(CheckpointError, match="same GGUF name as another"):
            lay_out(with_tensors(found, tensors))

    def test_projection_of_the_wrong_height(self, tmp_path: Path) -> None:
        found = open_base(make_model(tmp_path, "mistral"))
        name = "model.layers.0.self_attn.q_proj.weight"
        short = ArrayTensor(name, "F32", (128, 128), np.zeros((128, 128), np.float32))
        with pytest.raises(
            CheckpointError, match=r"q_proj\.weight has shape \[128, 128\], .* \[256, 128\]"
        ):
            lay_out(with_tensors(found, {**found.tensors, name: short}))

    @pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
    def test_missing_tensor(self, tmp_path: Path, name: str) -> None:
        found = open_base(make_model(tmp_path, "qwen3"))
        tensors = {stored: source for stored, source in found.tensors.items() if stored != name}
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            lay_out(with_tensors(found, tensors))

    def test_layers_that_are_not_stored(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="seems to lack layer 2 of 3"):
            make_changed(tmp_path, "qwen3", {"num_hidden_layers": 3})
        with pytest.raises(CheckpointError, match=r"layers\.2\..* is missing"):
            lay_out(Checkpoint.open(tmp_path))

    def test_configuration_that_mlx_lm_cannot_use(self, tmp_path: Path) -> None:
        broken = make_changed(tmp_path, "qwen3", {}, head_dim=None)
        with pytest.raises(CheckpointError, match=r"config\.json: mlx-lm cannot use it"):
            lay_out(broken)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"hidden_size": [128]}, "hidden_size must be a number"),
            ({"num_attention_heads": {"a": 1}}, "num_attention_heads must be a number"),
            ({"num_key_value_heads": "\x1b"}, "makes no sense"),
            ({"rope_scaling": 3}, "mlx-lm makes no model of it"),
            ({"hidden_size": 0}, "mlx-lm makes no model of it"),
            ({"num_attention_heads": 0}, "makes no sense"),
            ({"num_hidden_layers": math.inf}, "mlx-lm cannot use it"),
            ({"intermediate_size": -1}, "intermediate_size cannot be -1"),
            ({"intermediate_size": 2**32}, "intermediate_size cannot be 4294967296"),
            ({"rms_norm_eps": 1e300}, r"rms_norm_eps cannot be 1e\+300"),
            ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
            ({"model_type": ["llama"]}, r"type \['llama'\]"),
            # As many factors as half a head is wide would be made of it.
            (
                {"hidden_size": 2**30, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
                "but config.json makes it",
            ),
        ],
    )
    def test_settings_of_any_type_and_size(
        self, tmp_path: Path, changes: Changes, said: str
    ) -> None:
        base = open_base(make_model(tmp_path, "llama"))
        broken = replace(base, config={**base.config, **changes})
        with pytest.raises(CheckpointError, match=said) as error:
            lay_out(broken)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("part", [0, -0.5, 1.5, 1e9])
    def test_part_of_a_head_that_is_none(self, tmp_path: Path, part: float) -> None:
        base = open_base(make_model(tmp_path, "phi"))
        broken = replace(base, config={**base.config, "partial_rotary_factor": part})
        with pytest.raises(CheckpointError, match=r"partial_rotary_factor is .*; correct it"):
            lay_out(broken)

    def test_gguf_package_that_is_too_old(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        family = replace(FAMILIES["qwen3"], gguf="NEWER_THAN_THIS")
        monkeypatch.setitem(FAMILIES, "qwen3", family)
        found = open_base(make_model(tmp_path, "qwen3"))
        with pytest.raises(CheckpointError, match="upgrade it: pip install -U gguf"):
            lay_out(found)
        assert "qwen3" not in {row.model_type for row in supported()}


def with_tensors(found: BaseModel, tensors: dict[str, Any]) -> Any:
    return SimpleNamespace(
        folder=found.folder,
        config=found.config,
        tensors=tensors,
        converted=found.converted,
        beside=found.beside,
        quantized_modules=found.quantized_modules,
        quantization=found.quantization,
    )


class TestLayout:
    def test_sections_and_deepstack_layers_of_qwen3_vl(self, tmp_path: Path) -> None:
        file = make_model(tmp_path, "qwen3_vl") / "config.json"
        vision = {"vision_config": {"deepstack_visual_indexes": [0]}}  # mlx-lm does not save it
        file.write_text(json.dumps(json.loads(file.read_text()) | vision))
        keys = lay_out(open_base(tmp_path)).hyperparameters
        values = {name.removeprefix("qwen3vl."): value for name, (value, *_) in keys.items()}
        assert values["rope.dimension_sections"] == [6, 5, 5, 0]
        assert values["n_deepstack_layers"] == 1

    def test_tied_embedding_is_written_where_there_is_no_fallback(self, tmp_path: Path) -> None:
        for name, written in (("olmo2", True), ("qwen2", False), ("gemma", False)):
            layout = lay_out(open_base(make_model(tmp_path / name, name)))
            heads = [t.source for t in layout.tensors if t.name == "output.weight"]
            assert heads == (["model.embed_tokens.weight"] if written else [])

    @pytest.mark.parametrize("name", ["llama", "deepseek_v3", "qwen3_next"])
    def test_is_the_same_when_the_model_is_quantized(self, tmp_path: Path, name: str) -> None:
        dense = lay_out(open_base(make_model(tmp_path / "dense", name)))
        quantized = lay_out(open_base(make_model(tmp_path / "quantized", name, bits=4)))
        assert dense.hyperparameters == quantized.hyperparameters
        for one, other in zip(dense.tensors, quantized.tensors, strict=True):
            assert (one.name, one.shape) == (other.name, other.shape)

    def test_tensors_of_a_module(self, tmp_path: Path) -> None:
        layout = lay_out(open_base(make_model(tmp_path, "qwen3_next")))
        (one,) = layout.tensors_of("model.layers.1.self_attn.q_proj")
        assert (one.name, one.rows) == ("blk.1.attn_q.weight", None)
        split = layout.tensors_of("model.layers.0.linear_attn.in_proj_qkvz")
        assert [t.name for t in split] == ["blk.0.attn_gate.weight", "blk.0.attn_qkv.weight"]
        assert layout.tensors_of("model.nothing") == ()

    def test_groups_of_experts_only_where_some_are_left_out(self, tmp_path: Path) -> None:
        some = lay_out(open_base(make_model(tmp_path / "some", "glm4_moe"))).hyperparameters
        everything = make_changed(tmp_path / "all", "glm4_moe", {"topk_group": 2})
        assert some["glm4moe.expert_group_count"][0] == 2
        assert "glm4moe.expert_group_count" not in lay_out(everything).hyperparameters

    def test_usual_patterns_of_windows_are_left_to_llama_cpp(self, tmp_path: Path) -> None:
        key = "gemma3.attention.sliding_window_pattern"
        odd = lay_out(open_base(make_model(tmp_path / "odd", "gemma3_text"))).hyperparameters
        usual = lay_out(open_base(make_model(tmp_path / "usual", "gemma3"))).hyperparameters
        assert odd[key][0] == [True, True, False, True]
        assert key not in usual

    def test_missing_context_is_noted(self, tmp_path: Path) -> None:
        found = make_changed(tmp_path, "mistral", {}, max_position_embeddings=None)
        layout = lay_out(found)
        assert layout.hyperparameters["llama.context_length"][0] == 2048
        assert any("max_position_embeddings" in note for note in layout.notes)

    def test_order_of_the_file(self) -> None:
        names = ["output.weight", "blk.10.a", "blk.2.b", "blk.2.a", "token_embd.weight"]
        assert in_file_order(names) == [
            "token_embd.weight",
            "blk.2.a",
            "blk.2.b",
            "blk.10.a",
            "output.weight",
        ]

    def test_matrices_are_not_float32(self) -> None:
        assert not needs_float32("blk.0.attn_q.weight", (4, 4))
        assert needs_float32("blk.0.ffn_gate_inp.weight", (4, 4))
        assert needs_float32("blk.0.ffn_up_exps.bias", (4, 4))

    def test_table_of_supported_types(self) -> None:
        rows = supported()
        assert [row.model_type for row in rows] == sorted(FAMILIES)
        assert ("qwen2_moe", "qwen2moe") in {(row.model_type, row.architecture) for row in rows}

    def test_the_configuration_is_left_alone(self, tmp_path: Path) -> None:
        found = open_base(make_model(tmp_path, "qwen3_5"))
        before = copy.deepcopy(dict(found.config))
        lay_out(found)
        assert found.config == before
