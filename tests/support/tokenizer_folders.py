"""Model folders with nothing but a tokenizer, and GGUF files with nothing but a vocabulary."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from mlx_fusekit.gguf.tokenizer.vocabulary import Vocabulary

SPACE = "\u2581"

Json = dict[str, Any]

#: What the tokenizers of the tests are trained on, and rows of the embedding beside them.
TEXTS = [
    "the cat and the dog",
    "a hat, a mat; 12 bats!",
    "then they sat there",
    "été à la plage",
    "whether weather",
]
ROWS = 320

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(regex: str, behavior: str = "Isolated", *, invert: bool = False) -> Json:
    """A Split step as tokenizer.json spells it."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def byte_level(*, use_regex: bool = False, add_prefix_space: bool = False) -> Json:
    """A ByteLevel step as tokenizer.json spells it."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def digits(*, individual: bool = True) -> Json:
    """A Digits step as tokenizer.json spells it."""
    return {"type": "Digits", "individual_digits": individual}


def sequence(*members: Json) -> Json:
    """A Sequence of pre-tokenizers as tokenizer.json spells it."""
    return {"type": "Sequence", "pretokenizers": list(members)}


def added(token_id: int, text: str, *, special: bool = True, **more: Any) -> Json:
    """An added token as tokenizer.json spells it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, **flags, "special": special, **more}


def bpe(vocabulary: Mapping[str, int], merges: Sequence[Any], **more: Any) -> Json:
    """A BPE model as tokenizer.json spells it."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocabulary),
        "merges": list(merges),
        **more,
    }


def tokenizer_json(model: Json, pre_tokenizer: Json | None, **more: Any) -> Json:
    """The content of a tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": model,
        **more,
    }


def begin_with(text: str, token_id: int) -> Json:
    """A post-processor that puts a token in front of every text."""
    token = {"SpecialToken": {"id": text, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [token, *({"Sequence": {"id": part, "type_id": 0}} for part in "AB")],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
    }


def write_folder(folder: Path, tokenizer: Json | None = None, **files: Any) -> Path:
    """Write a folder; a file ``a_b`` of JSON is given as the keyword ``a_b``."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        files["tokenizer"] = tokenizer
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return folder


def byte_folder(tmp_path: Path, model: Json, pre: Json | None = None, **more: Any) -> Path:
    """A folder with a byte-level tokenizer, by default of two added tokens."""
    files = {k: more.pop(k) for k in list(more) if k.endswith(("config", "map"))}
    more.setdefault("added_tokens", [added(0, "<s>"), added(300, "<|im_end|>")])
    pre = pre or byte_level(use_regex=True)
    return write_folder(tmp_path, tokenizer_json(model, pre, **more), **files)


def piece_json(merges: list[list[str]], **more: Any) -> Json:
    """A SentencePiece-like model: unknown token, bytes, letters, and what merges make."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), SPACE, *"abc"]
    texts += ["".join(merge) for merge in merges]
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return bpe(vocabulary, merges, unk_token="<unk>", byte_fallback=True, **more)


def piece_folder(folder: Path, model: Json, *more: Json) -> Path:
    """A folder with a SentencePiece-like tokenizer.json."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    extra = [added(1, "<s>"), added(2, "</s>"), *more]
    return write_folder(folder, tokenizer_json(model, None, normalizer=replace, added_tokens=extra))


def train_pieces(path: Path, **more: Any) -> Path:
    """A model file, trained by sentencepiece itself."""
    out = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 310, "byte_fallback": True, **more}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=out, minloglevel=2, **options
    )
    path.write_bytes(out.getvalue())
    return path


def kinds_of(vocabulary: Vocabulary) -> dict[str, int]:
    """The type of each token."""
    return {token.text: token.kind for token in vocabulary.tokens}


def load(folder: Path) -> Tokenizer:
    """Hugging Face's tokenizer of a folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def write_gguf(vocabulary: Vocabulary, path: Path, name: str = "a model") -> Path:
    """Write a GGUF file without weights, which llama.cpp loads for its tokenizer."""
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def read_keys(path: Path) -> Json:
    """All keys of a GGUF file and their values, some ten times as fast as ``GGUFReader`` does."""
    data = path.read_bytes()
    _, _, _, count = struct.unpack_from("<4sIQQ", data)
    keys, at = {}, struct.calcsize("<4sIQQ")
    for _ in range(count):
        name, at = _value(data, at, _TEXT)
        (kind,) = struct.unpack_from("<I", data, at)
        keys[name], at = _value(data, at + 4, kind)
    return keys


_TEXT, _ARRAY = 8, 9
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind == _TEXT:
        (length,) = struct.unpack_from("<Q", data, at)
        return data[at + 8 : at + 8 + length].decode(), at + 8 + length
    if kind == _ARRAY:
        inner, count = struct.unpack_from("<IQ", data, at)
        values, at = [], at + 12
        for _ in range(count):
            value, at = _value(data, at, inner)
            values.append(value)
        return values, at
    (number,) = struct.unpack_from(f"<{_NUMBERS[kind]}", data, at)
    return number, at + struct.calcsize(_NUMBERS[kind])


def byte_level_folder(folder: Path, gguf: Path, pre_tokenizer: Json, **more: Any) -> Path:
    """A model folder from a GGUF file's byte-level tokens and merges.

    A GGUF file does not say how its text was cut, so ``pre_tokenizer`` does.
    """
    keys = read_keys(gguf)
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    own = {t: i for i, t in enumerate(tokens) if kinds[i] == TokenType.NORMAL}
    extra = [
        added(i, text, special=kinds[i] == TokenType.CONTROL)
        for i, text in enumerate(tokens)
        if kinds[i] in (TokenType.CONTROL, TokenType.USER_DEFINED) and not _is_padding(text, i)
    ]
    # A token's own id is only kept where no id before it is missing, as in Hugging Face's files.
    vocabulary = own | {entry["content"]: entry["id"] for entry in extra}
    model = bpe(vocabulary, keys["tokenizer.ggml.merges"], **more.pop("model", {}))
    content = tokenizer_json(model, pre_tokenizer, added_tokens=extra, **more)
    return write_folder(folder, content, tokenizer_config=_roles(keys))


def sentencepiece_folder(folder: Path, gguf: Path, *, prepend: bool, by_id: bool = False) -> Path:
    """A model folder from a GGUF file's SentencePiece pieces, as transformers converts them.

    The merges are those that make a piece of two others, the pieces with the best score first; or
    those with the lowest id, where the file's scores say nothing (Gemma's runs of spaces).
    """
    keys = read_keys(gguf)
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    scores = keys["tokenizer.ggml.scores"]
    spaces = {i: t.replace(" ", SPACE) for i, t in enumerate(tokens) if not t.strip(" ")}
    vocabulary = {spaces.get(i, t): i for i, t in enumerate(tokens) if not _is_padding(t, i)}
    extra = [
        added(i, text, special=kinds[i] == TokenType.CONTROL)
        for text, i in vocabulary.items()
        if kinds[i] in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    order = {
        text: -i if by_id else scores[i]
        for text, i in vocabulary.items()
        if kinds[i] != TokenType.CONTROL
    }
    model = bpe(
        vocabulary,
        _merges_of(vocabulary, order),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = [{"type": "Prepend", "prepend": SPACE}] if prepend else []
    normalizer = {"type": "Sequence", "normalizers": [*first, replace]}
    content = tokenizer_json(
        model,
        None,
        added_tokens=extra,
        normalizer=normalizer,
        post_processor=begin_with(_roles(keys)["bos_token"], keys["tokenizer.ggml.bos_token_id"]),
    )
    return write_folder(folder, content, tokenizer_config=_roles(keys))


def _merges_of(vocabulary: Mapping[str, int], order: Mapping[str, float]) -> list[list[str]]:
    merges = []
    for text, score in order.items():
        local = [
            (left, right, score)
            for cut in range(1, len(text))
            if (left := text[:cut]) in vocabulary and (right := text[cut:]) in vocabulary
        ]
        merges += sorted(local, key=lambda m: (vocabulary[m[0]], vocabulary[m[1]]))
    merges.sort(key=lambda m: (m[2], len(m[0]), len(m[1])), reverse=True)
    return [[left, right] for left, right, _ in merges]


def _is_padding(text: str, token_id: int) -> bool:
    return text in (f"[PAD{token_id}]", f"<dummy{token_id:05d}>")


def _roles(keys: Json) -> Json:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens = keys["tokenizer.ggml.tokens"]
    return {
        f"{role}_token": tokens[keys[key]]
        for role, name in names.items()
        if (key := f"tokenizer.ggml.{name}_token_id") in keys
    }
