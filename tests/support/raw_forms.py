"""Checkpoints as Hugging Face has them: mlx-lm's, with what its classes do to them undone."""

import re
from collections.abc import Callable

import mlx.core as mx

Weights = dict[str, mx.array]
Step = Callable[[Weights], Weights]


def raw_form(name: str, weights: Weights) -> Weights:
    """The weights of a class, by its module's name, as they are before it converts them."""
    for step in UNDONE.get(name, ()):
        weights = STEPS[step](weights)
    return weights


def _renamed(pattern: str, replacement: str) -> Step:
    return lambda weights: {re.sub(pattern, replacement, n): v for n, v in weights.items()}


def _each_expert(stack: str, experts: str, **leaves: str) -> Step:
    """``PATH.stack.LEAF.weight`` as one ``PATH.experts.EXPERT.LEAF.weight`` an expert."""
    stacked = re.compile(rf"(.+\.){stack}\.({'|'.join(leaves)})\.(\w+)")

    def step(weights: Weights) -> Weights:
        raw = {}
        for name, value in weights.items():
            if parts := stacked.fullmatch(name):
                path, leaf, kind = parts.groups()
                prefix = f"{path}{experts}"
                raw |= {f"{prefix}.{e}.{leaves[leaf]}.{kind}": v for e, v in enumerate(value)}
            else:
                raw[name] = value
        return raw

    return step


def _joined(first: str, second: str, both: str) -> Step:
    """Two matrices as one, the rows of the first above those of the second."""

    def step(weights: Weights) -> Weights:
        raw = {}
        for name, value in weights.items():
            if name.endswith(first):
                path = name.removesuffix(first)
                raw[path + both] = mx.concatenate([value, weights[path + second]], axis=-2)
            elif not name.endswith(second):
                raw[name] = value
        return raw

    return step


def _transposed(pattern: str, axes: int) -> Step:
    """The last two axes exchanged, as torch stores convolutions, and GPT-2 its linears."""
    return lambda weights: {
        n: mx.contiguous(v.swapaxes(-1, -2)) if v.ndim == axes and re.search(pattern, n) else v
        for n, v in weights.items()
    }


def _lowered(pattern: str) -> Step:
    """Norms as their distance from one."""
    return lambda weights: {n: v - 1 if re.search(pattern, n) else v for n, v in weights.items()}


_GATED = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
_NUMBERED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_QWEN3_NORMS = r"(input_layernorm|post_attention_layernorm|model\.norm|q_norm|k_norm)\.weight$"

STEPS: dict[str, Step] = {
    "experts one by one": _each_expert("switch_mlp", "experts", **_GATED),
    "experts one by one (in experts)": _each_expert("experts", "experts", **_GATED),
    "experts w1, w2, w3": _each_expert("switch_mlp", "experts", **_NUMBERED),
    "experts w1, w2, w3 under block_sparse_moe": lambda weights: _renamed(
        r"\.mlp\.(experts\.\d+\.w\d)", r".block_sparse_moe.\1"
    )(STEPS["experts w1, w2, w3"](weights)),
    "experts under block_sparse_moe": lambda weights: _renamed(
        r"\.mlp\.(experts|gate|e_score|shared_experts)", r".block_sparse_moe.\1"
    )(STEPS["experts w1, w2, w3"](weights)),
    "experts fc1, fc2": _each_expert("switch_mlp", "experts", fc1="up_proj", fc2="down_proj"),
    "experts mlp.N.fc": _each_expert("switch_mlp", "mlp", fc1="fc1", fc2="fc2"),
    "gate_up_proj of all experts": lambda weights: _renamed(
        r"switch_mlp\.down_proj\.weight", "experts.down_proj"
    )(
        _joined("switch_mlp.gate_proj.weight", "switch_mlp.up_proj.weight", "experts.gate_up_proj")(
            weights
        )
    ),
    "gate_up_proj of all experts, transposed": lambda weights: _transposed(
        r"experts\.(down_proj|gate_up_proj)$", axes=3
    )(STEPS["gate_up_proj of all experts"](weights)),
    "gate_up_proj in switch_glu": lambda weights: _renamed(
        r"switch_glu\.down_proj\.weight", "down_proj"
    )(_joined("switch_glu.gate_proj.weight", "switch_glu.up_proj.weight", "gate_up_proj")(weights)),
    "gate_up_proj in experts": lambda weights: _renamed(r"(experts\.down_proj)\.weight", r"\1")(
        _joined("experts.gate_proj.weight", "experts.up_proj.weight", "experts.gate_up_proj")(
            weights
        )
    ),
    "input_linear, output_linear": lambda weights: _renamed(
        r"switch_mlp\.down_proj", "output_linear"
    )(
        _joined("switch_mlp.gate_proj.weight", "switch_mlp.up_proj.weight", "input_linear.weight")(
            weights
        )
    ),
    "router": _renamed(r"\.gate\.gate_proj\.", ".gate."),
    "moe": lambda weights: _renamed(r"\.mlp\.gate\.gate\.", ".moe.gate.")(
        _renamed(r"\.mlp\.gate\.router_bias", ".moe.router_bias")(
            _renamed(r"\.mlp\.switch_mlp", ".moe")(
                _renamed(r"\.mlp\.share_expert", ".share_expert")(weights)
            )
        )
    ),
    "convolutions": _transposed(r"conv.*\.weight$", axes=3),
    "convolutions named conv1d": _renamed(r"([qkv]_conv)\.conv\.", r"\g<1>1d."),
    "linears of GPT-2": _transposed(r"(c_attn|c_proj|c_fc)\.weight", axes=2),
    "no model.": _renamed(r"^model\.", ""),
    "no language_model.": _renamed(r"^language_model\.", ""),
    "model.language_model.": lambda weights: _renamed(r"^language_model\.lm_head", "lm_head")(
        _renamed(r"^language_model\.model", "model.language_model")(weights)
    ),
    "model.language_model. of the text": _renamed(r"^model\.", "model.language_model."),
    "transformer.": _renamed(r"^model\.", "transformer."),
    "gpt_neox.": _renamed(r"^model\.h", "gpt_neox.layers"),
    "norms less one": _lowered(r"norm[^.]*\.weight$"),
    "some norms less one": _lowered(_QWEN3_NORMS),
    "experts.mlp": lambda weights: _dbrx(weights),
    "interleaved gate_up_proj": lambda weights: _gpt_oss(weights),
    "kv_b_proj": lambda weights: _latent(weights),
}


def _latent(weights: Weights) -> Weights:
    """The two halves of latent attention's ``kv_b_proj`` in one matrix."""
    raw = {}
    for name, value in weights.items():
        if name.endswith("embed_q.weight"):
            path = name.removesuffix("embed_q.weight")
            out = weights[f"{path}unembed_out.weight"]
            both = mx.concatenate([value.swapaxes(-1, -2), out], axis=1)
            raw[f"{path}kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])
        elif not name.endswith("unembed_out.weight"):
            raw[name] = value
    return raw


def _dbrx(weights: Weights) -> Weights:
    """All experts in one matrix, the second of theirs transposed."""
    raw: dict[str, list[mx.array]] = {}
    for name, value in weights.items():
        path, experts, leaf = name.partition(".experts.")
        which = leaf.removesuffix(".weight").partition(".")[2]
        if experts:
            raw.setdefault(f"{path}.experts.mlp.{which}", []).append(
                value.T if which == "w2" else value
            )
        else:
            raw[name] = [value]
    return {name: mx.concatenate(values) for name, values in raw.items()}


def _gpt_oss(weights: Weights) -> Weights:
    """Rows of the gate and of the up projection by turns."""
    raw = {}
    for name, value in weights.items():
        path, gate, leaf = name.partition("gate_proj.")
        if gate:
            other, axis = weights[f"{path}up_proj.{leaf}"], 1
            both = mx.stack([value, other], axis=axis + 1).flatten(axis, axis + 1)
            raw[f"{path}gate_up_proj" + ("_bias" if leaf == "bias" else ".weight")] = both
        elif "experts.down_proj." in name:
            raw[name.replace(".bias", "_bias")] = value
        elif "up_proj." not in name:
            raw[name] = value
    return raw


UNDONE: dict[str, tuple[str, ...]] = {
    "Klear": ("experts one by one (in experts)",),
    "afmoe": ("experts one by one (in experts)",),
    "bailing_hybrid": ("experts one by one", "router", "kv_b_proj"),
    "bailing_moe": ("experts one by one", "router"),
    "bailing_moe_linear": ("experts one by one", "router"),
    "bailing_moe_v3": ("experts one by one", "convolutions", "kv_b_proj"),
    "dbrx": ("experts.mlp",),
    "deepseek": ("experts one by one",),
    "deepseek_v2": ("experts one by one",),
    "deepseek_v3": ("experts one by one", "kv_b_proj"),
    "deepseek_v32": ("experts one by one", "kv_b_proj"),
    "dots1": ("experts one by one (in experts)",),
    "ernie4_5_moe": ("experts one by one",),
    "exaone_moe": ("experts one by one",),
    "falcon_h1": ("convolutions",),
    "gemma4": ("gate_up_proj in switch_glu", "model.language_model."),
    "gemma4_text": ("gate_up_proj in switch_glu",),
    "glm4_moe": ("experts one by one",),
    "glm4_moe_lite": ("experts one by one", "kv_b_proj"),
    "glm_moe_dsa": ("experts one by one", "kv_b_proj"),
    "gpt2": ("linears of GPT-2", "no model."),
    "gpt_neox": ("gpt_neox.",),
    "gpt_oss": ("interleaved gate_up_proj",),
    "gptj": ("transformer.",),
    "granitemoe": ("input_linear, output_linear",),
    "granitemoehybrid": ("input_linear, output_linear", "convolutions"),
    "hunyuan": ("experts one by one",),
    "jamba": ("experts one by one", "convolutions"),
    "kimi_k25": ("experts one by one", "kv_b_proj"),
    "kimi_k3": ("experts w1, w2, w3 under block_sparse_moe", "no language_model.", "kv_b_proj"),
    "kimi_linear": (
        "experts w1, w2, w3 under block_sparse_moe",
        "kv_b_proj",
        "convolutions",
        "convolutions named conv1d",
    ),
    "kimi_vl": ("experts one by one",),
    "laguna": ("experts one by one",),
    "lfm2": ("convolutions",),
    "lfm2_moe": ("experts one by one", "convolutions"),
    "llama4": ("gate_up_proj in experts", "gate_up_proj of all experts, transposed"),
    "longcat_flash": ("experts one by one", "kv_b_proj"),
    "longcat_flash_ngram": ("experts one by one", "kv_b_proj"),
    "mamba": ("convolutions",),
    "mamba2": ("convolutions",),
    "mellum": ("experts one by one",),
    "mimo_v2_flash": ("experts one by one",),
    "minimax": ("experts w1, w2, w3",),
    "minimax_m3_vl": ("experts w1, w2, w3", "experts under block_sparse_moe"),
    "mistral3": ("no language_model.", "model.language_model. of the text"),
    "mistral4": ("experts one by one", "kv_b_proj"),
    "mixtral": ("experts w1, w2, w3",),
    "muse_glimmer": ("model.language_model. of the text",),
    "nemotron_h": ("experts fc1, fc2", "convolutions"),
    "olmo_hybrid": ("convolutions",),
    "olmoe": ("experts one by one",),
    "phimoe": ("experts w1, w2, w3",),
    "phixtral": ("experts mlp.N.fc",),
    "plamo2": ("convolutions",),
    "qwen2_moe": ("experts one by one",),
    "qwen2_vl": ("no language_model.", "model.language_model. of the text"),
    "qwen3_5": (
        "no language_model.",
        "model.language_model. of the text",
        "convolutions",
        "some norms less one",
    ),
    "qwen3_5_moe": (
        "gate_up_proj of all experts",
        "no language_model.",
        "model.language_model. of the text",
        "convolutions",
        "some norms less one",
    ),
    "qwen3_moe": ("experts one by one",),
    "qwen3_next": ("experts one by one", "some norms less one", "convolutions"),
    "qwen3_vl": ("no language_model.", "model.language_model. of the text"),
    "qwen3_vl_moe": ("gate_up_proj of all experts, transposed", "model.language_model."),
    "recurrent_gemma": ("convolutions",),
    "solar_open": ("experts one by one",),
    "step3p5": ("moe", "norms less one"),
}
