"""Write the committed corpus: seeds, and those of what fuzzing found that reach new lines.

    python tests/fuzz/seeds.py            # seeds, and the inputs that are committed already
    python tests/fuzz/seeds.py --found    # also those of build/fuzz

A corpus is as few inputs as together run every line of the package that any of them runs, with the
number of times sorted into powers of two; findings that were mended are added by hand, as
``finding-*``, and stay.
"""

import argparse
import hashlib
import json
import math
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]

import gguf  # noqa: E402
from support import tiny  # noqa: E402
from support.exercise_reports import make_bench, make_findings  # noqa: E402

from fuzz import targets  # noqa: E402
from fuzz.fuzz import BUILD, CORPUS  # noqa: E402
from mlx_fusekit import samples  # noqa: E402
from mlx_fusekit.bench.environment import Environment  # noqa: E402

PACKAGE = str(ROOT / "mlx_fusekit")
_LARGEST = 16384
#: More digits than Python reads as a number.
_DIGITS = b"1" * 5000


def main() -> None:
    """Write the corpus of every target, and print how large it is."""
    parser = argparse.ArgumentParser(description="Write the committed corpus of the fuzz targets.")
    parser.add_argument("--found", action="store_true", help="take over what fuzzing found")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = seeds(Path(scratch))
    for name in targets.TARGETS:
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        old = [path for path in folder.iterdir() if not path.name.startswith("finding-")]
        found = [*(BUILD / name / "corpus").glob("*")] if asked.found else []
        inputs = {*made[name], *(path.read_bytes() for path in (*old, *found))}
        kept = smallest_set(name, sorted(inputs, key=lambda content: (len(content), content)))
        for path in old:
            path.unlink()
        for content in kept:
            (folder / hashlib.sha256(content).hexdigest()[:12]).write_bytes(content)
        print(f"{name}: {len(kept)} of {len(inputs)} inputs, {sum(map(len, kept)):,} bytes")


def smallest_set(name: str, inputs: list[bytes]) -> list[bytes]:
    """Inputs that reach what all of them reach, each adding something; small ones come first."""
    reached: set[Any] = set()
    kept = []
    for content in inputs:
        if len(content) <= _LARGEST and (own := _reached(name, content)) - reached:
            reached |= own
            kept.append(content)
    # Once more from the largest, which reach most, so that what they made needless goes.
    reached.clear()
    result = []
    for content in reversed(kept):
        if (own := _reached(name, content)) - reached:
            reached |= own
            result.append(content)
    return result


def _reached(name: str, content: bytes) -> set[Any]:
    counts: Counter[Any] = Counter()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            counts[frame.f_code.co_filename, frame.f_lineno] += 1
        return trace

    sys.settrace(trace)
    try:
        targets.run(name, content)
    except Exception:  # noqa: BLE001  # a finding, which the test of the corpus shows
        return set()
    finally:
        sys.settrace(None)
    return {(*line, min(count.bit_length(), 3)) for line, count in counts.items()}


def seeds(scratch: Path) -> dict[str, list[bytes]]:
    """Good files, and some that are good in other ways, by target."""
    model = tiny.make_model(scratch / "model", targets.MODEL, bits=4, group_size=32)
    made = {
        "header": list(_headers(model)),
        "index": list(_indexes(model)),
        "config": list(_configs(model)),
        "adapter": list(_adapters(scratch, model)),
        "data": list(_texts()),
        "tokenizer": list(_tokenizers()),
        "sentencepiece": [_sentencepiece(kind) for kind in (1, 2)],
        "gguf": [_gguf(scratch / "model.gguf")],
        "report": list(_reports()),
    }
    for inputs in made.values():
        inputs += [
            content.replace(b": 4", b": " + _DIGITS) for content in inputs if b": 4" in content
        ]
        inputs.append(b"[" * 5000)
    return made


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _header_text(file: Path) -> bytes:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length]


def _headers(model: Path) -> Iterator[bytes]:
    yield _header_text(model / "model.safetensors")
    begin, entries = 0, {}
    for dtype, size in (("F32", 4), ("BF16", 2), ("U8", 1), ("F8_E4M3", 1), ("BOOL", 1)):
        entries[dtype] = {
            "dtype": dtype,
            "shape": [2, 3],
            "data_offsets": [begin, begin + 6 * size],
        }
        begin += 6 * size
    yield _json({"__metadata__": {"format": "pt"}, **entries})
    yield targets._safetensors(_json({"a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}))
    yield b"{}"


def _indexes(model: Path) -> Iterator[bytes]:
    names = sorted(json.loads((model / "model.safetensors.index.json").read_text())["weight_map"])
    shards = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    right = {name: shards[place % 2] for place, name in enumerate(names)}
    yield _json({"metadata": {"total_size": 1}, "weight_map": right})
    yield _json({"weight_map": dict(list(right.items())[1:])})
    yield _json({"weight_map": {**right, "more": shards[0]}})
    yield _json({"weight_map": {**right, names[0]: "model-00003.safetensors"}})


def _configs(model: Path) -> Iterator[bytes]:
    config = json.loads((model / "config.json").read_text())
    config.pop("quantization_config", None)
    yield _json(config)
    yield _json({**config, "quantization": {"bits": 8, "group_size": 64}})
    own = {"model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 32, "mode": "affine"}}
    yield _json({**config, "quantization": {**config["quantization"], **own}})
    yield _json({**config, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    yield _json({**config, "rope_scaling": {"type": "linear", "factor": 2.0}})
    text = {k: v for k, v in config.items() if k != "quantization"}
    yield _json({"model_type": "gemma3", "text_config": text, "quantization": {"bits": 4}})
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32}
    yield _json({**text, "quantization_config": awq})
    for kind in ("qwen2", "qwen3", "mistral", "gemma2", "phi3", "qwen3_moe", "olmo2", "mamba"):
        yield _json({**config, "model_type": kind})


def _adapters(scratch: Path, model: Path) -> Iterator[bytes]:
    few = ["self_attn.q_proj", "mlp.down_proj"]
    for kind in ("lora", "dora"):
        folder = tiny.make_adapter(scratch / kind, model, kind=kind, keys=few, num_layers=1, rank=2)
        settings = json.loads((folder / "adapter_config.json").read_text())
        weights = _header_text(folder / "adapters.safetensors")
        yield _json(settings) + targets.DIVIDER + weights
        if kind == "lora":
            for more in _settings(settings):
                yield _json(more) + targets.DIVIDER + weights
    rows = {"model.norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}}
    yield _json({"fine_tune_type": "full"}) + targets.DIVIDER + _json(rows)
    name, shape = "model.layers.0.mlp.up_proj.weight", [64, 64]
    rows = {name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 8192]}}
    yield _json({"fine_tune_type": "full"}) + targets.DIVIDER + _json(rows)
    embedding = {
        "model.embed_tokens.lora_a": {"dtype": "F32", "shape": [100, 2], "data_offsets": [0, 800]},
        "model.embed_tokens.lora_b": {
            "dtype": "F32",
            "shape": [2, 64],
            "data_offsets": [800, 1312],
        },
    }
    parameters = {"rank": 2, "scale": 2.0, "keys": ["model.embed_tokens"]}
    yield _json({"lora_parameters": parameters}) + targets.DIVIDER + _json(embedding)
    yield from _pefts()


def _pefts() -> Iterator[bytes]:
    """Adapters in PEFT's form."""
    module, embedding = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
    shapes = [
        {f"{module}.lora_A.weight": [2, 64], f"{module}.lora_B.weight": [64, 2]},
        {f"{module}.lora_magnitude_vector": [64], "model.norm.weight": [64]},
        {
            f"{embedding}.lora_embedding_A": [2, 100],
            f"{embedding}.lora_embedding_B": [64, 2],
            f"{embedding}.base_layer.weight": [100, 64],
        },
        {f"{embedding}.token_adapter.trainable_tokens_delta": [2, 64]},
        {
            "model.layers.0.mlp.experts.1.gate_proj.lora_A.weight": [2, 64],
            "model.layers.0.mlp.experts.1.gate_proj.lora_B.weight": [64, 2],
        },
    ]
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "someone/other",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {r".*\.q_proj": 2},
        "alpha_pattern": {"q_proj": 3.5},
        "trainable_token_indices": {"embed_tokens": [3, 9]},
        "init_lora_weights": "eva",
    }
    for more in ({}, shapes[1], shapes[2], shapes[3], shapes[4]):
        rows, position = {}, 0
        for name, shape in {**shapes[0], **more}.items():
            end = position + 4 * math.prod(shape)
            offsets = [position, end]
            row = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            rows[f"base_model.model.{name}"], position = row, end
        yield _json(settings) + targets.DIVIDER + _json(rows)


def _settings(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What older versions and others write."""
    parameters = settings["lora_parameters"]
    older = {k: v for k, v in settings.items() if k not in ("fine_tune_type", "num_layers")}
    yield {**older, "lora_layers": 1, "lora_parameters": {**parameters, "alpha": 16.0}}
    yield {"rank": 2, "alpha": 4.0, "dropout": 0.0}
    module = "model.layers.0.self_attn.q_proj"
    yield {
        **settings,
        "model": "someone/other",
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "unsloth_mlx_lora_module_ranks": {module: 2},
        "unsloth_mlx_lora_module_scales": {module: 3.0},
        "optiq": {"applied_ranks": {"layer_0.self_attn.q_proj": 2}},
        "data": "/nowhere",
        "prompt_feature": "question",
    }


def _texts() -> Iterator[bytes]:
    chat = samples.evaluation_data_path().read_bytes().split(b"\n")[:2]
    yield b".jsonl\n" + b"\n".join(chat)
    yield b'.jsonl\n{"prompt": "a b", "completion": "c d"}\n{"prompt": "e", "completion": "f"}\n'
    yield b'.json\n[{"text": "one two three"}, {"text": "four five"}]'
    yield b'.json\n{\n "text": "one two three"\n}'
    yield b".txt\n" + b"Some plain text of several words.\nAnd a second line.\n"
    yield b'.txt\n{"text": "one"}\nnot json\n'
    yield b".csv\na,b\n1,2\n"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "done"},
    ]
    yield b".jsonl\n" + _json({"messages": messages, "tools": tools})


def _tokenizers() -> Iterator[bytes]:
    folder = samples.model_path()
    full = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = dict(sorted(full["model"]["vocab"].items(), key=lambda item: item[1])[:260])
    merges = [pair if isinstance(pair, str) else list(pair) for pair in full["model"]["merges"]]
    known = [
        pair
        for pair in merges
        if "".join(pair.split(" ") if isinstance(pair, str) else pair) in vocabulary
    ]
    small = {**full, "model": {**full["model"], "vocab": vocabulary, "merges": known[:5]}}
    settings = (folder / "tokenizer_config.json").read_bytes()
    generation = (folder / "generation_config.json").read_bytes()
    yield targets.DIVIDER.join((_json(small), settings, generation))
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{n:02X}>": 3 + n for n in range(256)}}
    llama = {
        "model": {"type": "BPE", "vocab": pieces, "merges": [], "byte_fallback": True},
        "normalizer": {"type": "Prepend", "prepend": "\u2581"},
        "decoder": {"type": "ByteFallback"},
        "added_tokens": [{"id": 1, "content": "<s>", "special": True}],
    }
    template = {
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'a' * 10**10 }}"
    }
    yield targets.DIVIDER.join((_json(llama), _json({**template, "bos_token": "<s>"}), b"{}"))


def _sentencepiece(kind: int) -> bytes:
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<0x0A>", 6), ("\u2581a", 1)]
    model = b""
    for text, of in pieces:
        name = text.encode()
        inner = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", -1.0)
        inner += b"\x18" + bytes([of])
        model += b"\x0a" + bytes([len(inner)]) + inner
    return model + b"\x12\x02\x18" + bytes([kind]) + b"\x1a\x05\x12\x01x\x18\x00"


def _gguf(path: Path) -> bytes:
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.5, 1.0])
    writer.add_bool("general.flag", True)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _reports() -> Iterator[bytes]:
    environment = Environment(
        "M9", 8, 16_000_000_000, "macOS 99", "gpu", None, 1, None, 0.5, "3.11", {}
    )
    yield b"bench\n" + _json(make_bench(trials=2, environment=environment).as_json())
    yield b"exercise\n" + _json(
        make_findings(make_bench(trials=2, environment=environment)).as_json()
    )
    numbers = dict.fromkeys(("kl_mean", "kl_median", "kl_p99", "top1_agreement", "recovered"), 0.5)
    verified = {
        "fused": "published",
        "reference": "someone/base",
        "adapters": ["someone/adapter"],
        "tokens": 100,
        "sequences": 2,
        "data": "text",
        "passed": True,
        "structure_ok": True,
        "structure": [{"name": "files", "ok": True, "detail": ""}],
        "max_kl": 0.1,
        "perplexity_fused": 2.0,
        "perplexity_reference": 2.0,
        **numbers,
    }
    yield b"verify\n" + _json(verified)


if __name__ == "__main__":
    main()
