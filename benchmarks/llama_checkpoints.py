"""Random Llama-shaped 4-bit checkpoints and LoRA adapters for them, written in bounded memory.

The values are noise on a sane scale: what a fuse costs depends on shapes and bytes, not on what the
model knows. Layout, names and files are those that mlx-lm 0.32 writes.
"""

import json
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tensors import Tensor

BITS = 4
GROUP_SIZE = 64
RANK = 8
LORA_SCALE = 20.0
LORA_LAYERS = 16
#: As mlx-lm cuts checkpoints: ``mlx_lm.utils.MAX_FILE_SIZE_GB`` of 2**30 bytes.
LARGEST_FILE_BYTES = 5 << 30

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = tuple(key.replace("mlp.", "mlp.switch_mlp.") for key in MLP)
#: The linears each adapter touches, by the adapter's name.
ADAPTERS = {
    "all": ATTENTION + MLP,
    "qv": ("self_attn.q_proj", "self_attn.v_proj"),
}


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama model, or with experts of a Qwen3 MoE model.

    Attributes:
        feed_forward: width of the MLP, or of one expert.
        head_width: of an attention head; 0 for a share of ``hidden``.
        experts: in a layer, each token going to ``used`` of them; 0 for a plain MLP.
    """

    hidden: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    head_width: int = 0
    experts: int = 0
    used: int = 0

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.head_width or self.hidden // self.heads

    @property
    def linears(self) -> tuple[str, ...]:
        """All of a layer."""
        return ATTENTION + (EXPERTS if self.experts else MLP)

    def linear(self, key: str) -> tuple[int, ...]:
        """Logical ``(rows, columns)`` of one of a layer's linears, experts before them."""
        width, kv_width = (self.head_dim * count for count in (self.heads, self.kv_heads))
        rows_and_columns = {
            "q_proj": (width, self.hidden),
            "k_proj": (kv_width, self.hidden),
            "v_proj": (kv_width, self.hidden),
            "o_proj": (self.hidden, width),
            "gate_proj": (self.feed_forward, self.hidden),
            "up_proj": (self.feed_forward, self.hidden),
            "down_proj": (self.hidden, self.feed_forward),
        }[key.rpartition(".")[2]]
        return (self.experts, *rows_and_columns) if key in EXPERTS else rows_and_columns


SHAPES = {
    "1b": Shape(2048, 16, 8192, 32, 8, 128256, tied=True),
    "8b": Shape(4096, 32, 14336, 32, 8, 128256, tied=False),
}


def make_all(size: str, work: Path) -> None:
    """Write the checkpoint of a size and its adapters under ``work``, where they are missing."""
    shape = SHAPES[size]
    if not model_folder(work, size).exists():
        replace(model_folder(work, size), lambda folder: write_model(folder, shape))
    for name, keys in ADAPTERS.items():
        target = adapter_folder(work, size, name)
        if not target.exists():
            replace(target, lambda folder, keys=keys: write_adapter(folder, shape, keys))


def make_adapters(size: str, work: Path, name: str, count: int, rank: int) -> None:
    """Write several adapters on the same linears, where they are missing."""
    for number in range(count):
        target = numbered_folder(work, size, name, number)
        if not target.exists():
            replace(
                target,
                lambda folder, number=number: write_adapter(
                    folder, SHAPES[size], ADAPTERS[name], rank=rank, seed=str(number)
                ),
            )


def numbered_folder(work: Path, size: str, name: str, number: int) -> Path:
    """Where one of several adapters lies."""
    return work / f"llama-{size}-adapter-{name}-{number}"


def model_folder(work: Path, size: str) -> Path:
    """Where the checkpoint of a size lies."""
    return work / f"llama-{size}-4bit"


def adapter_folder(work: Path, size: str, name: str) -> Path:
    """Where an adapter of a size lies."""
    return work / f"llama-{size}-adapter-{name}"


def replace(target: Path, write: Any) -> None:
    """Fill a folder under another name first, so that a folder that exists is complete."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(target)


def write_model(folder: Path, shape: Shape) -> None:
    """Write a checkpoint into a folder that is there; no more than a tensor's piece is held."""
    tensors = list(_model_tensors(shape))
    random.Random(0).shuffle(tensors)  # MLX writes a file in the order of a hash table
    files = _cut_into_files(tensors)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(files, start=1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with open(folder / name, "xb") as file:
            _write_safetensors(file, group, {"format": "mlx"})
        weight_map |= {tensor.name: name for tensor in group}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", _config(shape))
    _write_tokenizer(folder)


def _model_tensors(shape: Shape) -> Iterator[Tensor]:
    yield from _quantized("model.embed_tokens", shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for key in shape.linears:
            yield from _quantized(f"{prefix}.{key}", *shape.linear(key))
        if shape.experts:
            yield Tensor(f"{prefix}.mlp.gate.weight", "BF16", (shape.experts, shape.hidden))
            for norm in ("q_norm", "k_norm"):
                yield Tensor(f"{prefix}.self_attn.{norm}.weight", "BF16", (shape.head_dim,))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Tensor(f"{prefix}.{norm}.weight", "BF16", (shape.hidden,))
    yield Tensor("model.norm.weight", "BF16", (shape.hidden,))
    if not shape.tied:
        yield from _quantized("lm_head", shape.vocabulary, shape.hidden)


def _quantized(module: str, *shape: int) -> Iterator[Tensor]:
    *rows, columns = shape
    yield Tensor(f"{module}.weight", "U32", (*rows, columns * BITS // 32))
    yield Tensor(f"{module}.scales", "BF16", (*rows, columns // GROUP_SIZE))
    yield Tensor(f"{module}.biases", "BF16", (*rows, columns // GROUP_SIZE))


def _cut_into_files(tensors: list[Tensor]) -> list[list[Tensor]]:
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > LARGEST_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    return files


def _write_safetensors(file: BinaryIO, tensors: list[Tensor], metadata: dict[str, str]) -> None:
    # Imported late: who only runs the benchmark must stay small (see processes._run).
    from random_tensors import values

    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    file.write(struct.pack("<Q", len(header)) + header)
    for tensor in tensors:
        file.writelines(values(tensor))


def _config(shape: Shape) -> dict[str, Any]:
    quantization = {"group_size": GROUP_SIZE, "bits": BITS, "mode": "affine"}
    kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if shape.experts:
        kind = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.used,
            "moe_intermediate_size": shape.feed_forward,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    return {
        **kind,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
        "eos_token_id": 0,
        "quantization": quantization,
        "quantization_config": quantization,
    }


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of one merge, without which llama.cpp takes none: 256 bytes and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([end, *alphabet, "th"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([end])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end},
    )


def write_adapter(
    folder: Path,
    shape: Shape,
    keys: tuple[str, ...],
    *,
    layers: int = LORA_LAYERS,
    rank: int = RANK,
    seed: str = "",
) -> None:
    """Write an adapter on some linears of the last layers into a folder that is there."""
    tensors = []
    for layer in range(shape.layers - layers, shape.layers):
        for key in keys:
            *experts, rows, columns = shape.linear(key)
            prefix = f"model.layers.{layer}.{key}"
            a, b = (columns, rank), (rank, rows)
            if experts:
                a, b = (*experts, *a[::-1]), (*experts, *b[::-1])
            tensors.append(Tensor(f"{prefix}.lora_a", "F32", a, seed))
            tensors.append(Tensor(f"{prefix}.lora_b", "F32", b, seed))
    with open(folder / "adapters.safetensors", "xb") as file:
        _write_safetensors(file, tensors, {})
    config = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {
            "rank": rank,
            "scale": LORA_SCALE,
            "dropout": 0.0,
            "keys": list(keys),
        },
    }
    _write_json(folder / "adapter_config.json", config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=4) + "\n", "utf-8")
