"""A folder with Hugging Face's names, in bfloat16, from a GGUF file of a Llama or a Qwen2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGUFReader, TokenType, get_tensor_name_map
from gguf.constants import MODEL_ARCH
from gguf.quants import dequantize
from packages import Json, write_json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

#: How Qwen2 cuts text, as its tokenizer.json spells it.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Architecture:
    """What differs between the families.

    Attributes:
        pairs_side_by_side: whether llama.cpp orders rows of queries and keys in its own way.
    """

    architecture: MODEL_ARCH
    config: Json
    pairs_side_by_side: bool
    pre_tokenizers: Sequence[Any]
    normalizer: Any = None


_OWN = {
    "llama": _Architecture(
        MODEL_ARCH.LLAMA,
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
        },
        pairs_side_by_side=True,
        pre_tokenizers=[
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ],
    ),
    "qwen2": _Architecture(
        MODEL_ARCH.QWEN2,
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        pairs_side_by_side=False,
        pre_tokenizers=[
            pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        normalizer=normalizers.NFC(),
    ),
}


def architecture(reader: GGUFReader) -> str:
    """llama.cpp's name of the model's family."""
    field = reader.get_field("general.architecture")
    return str(field.contents()) if field is not None else ""


def write_folder(reader: GGUFReader, folder: Path) -> None:
    """Write the model with its tokenizer into an existing, empty folder."""
    config = _model_config(reader)
    mx.save_safetensors(
        str(folder / "model.safetensors"), _weights(reader, config), metadata={"format": "mlx"}
    )
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", _special_ids(reader))
    _tokenizer(reader).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(reader))


def _field(reader: GGUFReader, key: str) -> Any:
    """One metadata value; the keys of its architecture are meant when ``key`` starts with a dot."""
    name = f"{architecture(reader)}{key}" if key.startswith(".") else key
    field = reader.get_field(name)
    if field is None:
        raise RuntimeError(f"the GGUF file has no {name}")
    return field.contents()


def _float(reader: GGUFReader, key: str) -> float:
    # GGUF holds float32; the shortest decimal that gives the same float32 is what was meant.
    return float(str(np.float32(_field(reader, key))))


def _special_ids(reader: GGUFReader) -> Json:
    return {
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _model_config(reader: GGUFReader) -> Json:
    own = _OWN[architecture(reader)]
    heads, width = _field(reader, ".attention.head_count"), _field(reader, ".embedding_length")
    return {
        **own.config,
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": _field(reader, ".feed_forward_length"),
        "num_hidden_layers": _field(reader, ".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, ".attention.head_count_kv"),
        "head_dim": width // heads,
        "max_position_embeddings": _field(reader, ".context_length"),
        "rms_norm_eps": _float(reader, ".attention.layer_norm_rms_epsilon"),
        "rope_theta": _float(reader, ".rope.freq_base"),
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "torch_dtype": "bfloat16",
        **_special_ids(reader),
    }


def hf_modules(num_layers: int) -> Iterator[str]:
    """Module paths of a Llama or Qwen2, as Hugging Face names them."""
    yield from ("model.embed_tokens", "model.norm", "lm_head")
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        yield from (f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm")
        yield from (f"{prefix}.self_attn.{name}_proj" for name in "qkvo")
        yield from (f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down"))


def _weights(reader: GGUFReader, config: Json) -> dict[str, mx.array]:
    """All tensors in bfloat16 under their Hugging Face names.

    Raises:
        RuntimeError: if the file holds a tensor that no module of the model takes.
    """
    own = _OWN[architecture(reader)]
    name_map = get_tensor_name_map(own.architecture, config["num_hidden_layers"])
    unread = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for module in hf_modules(config["num_hidden_layers"]):
        for leaf in ("weight", "bias"):
            tensor = unread.pop(f"{name_map.get_name(module)}.{leaf}", None)
            if tensor is None:
                continue
            values = dequantize(tensor.data, tensor.tensor_type)
            if own.pairs_side_by_side and module.endswith("q_proj"):
                values = unpermute(values, config["num_attention_heads"])
            elif own.pairs_side_by_side and module.endswith("k_proj"):
                values = unpermute(values, config["num_key_value_heads"])
            weights[f"{module}.{leaf}"] = mx.array(values).astype(mx.bfloat16)
    if unread:
        raise RuntimeError(f"the GGUF file has unexpected tensors: {sorted(unread)}")
    return weights


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Give a query or key projection its original row order.

    Rotary embedding turns pairs of rows. llama.cpp keeps the two of a pair side by side, Hugging
    Face keeps all first members of a head before all second ones.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """The family's byte-level BPE."""
    own = _OWN[architecture(reader)]
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if own.normalizer is not None:
        tokenizer.normalizer = own.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(own.pre_tokenizers)
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    special = [
        token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL
    ]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer


def _tokenizer_config(reader: GGUFReader) -> Json:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in names.items()}
    special = {
        f"{name}_token": tokens[_field(reader, key)]
        for name, key in keys.items()
        if reader.get_field(key) is not None
    }
    return {
        # The class that takes tokenizer.json as it is. Those that the originals name would put
        # pre-tokenizers of their own in its place.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _field(reader, ".context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
        **special,
    }
