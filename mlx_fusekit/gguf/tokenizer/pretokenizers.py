"""Which of llama.cpp's pre-tokenizers cuts text as a ``tokenizer.json`` does.

llama.cpp knows pre-tokenizers by name and holds their regular expressions itself
(``src/llama-vocab.cpp``). The name is found from the structure of ``tokenizer.json``: its steps,
spelled one way, must be those of an entry of :data:`KNOWN`. Several of llama.cpp's names mean the
same; only the oldest is here, which most builds know. ``tests/real/test_gguf_vocabulary.py`` runs
every entry in llama.cpp against Hugging Face's tokenizers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.tokenizer_files import Json, steps

#: Normalizers that leave almost all text alone; llama.cpp does without.
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|{_BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_CASED_END = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_END}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_END}"
)
_CASCADE = "|".join(rf"\s{{{2**power}}}(?!\S)" for power in range(9, 1, -1))
_ASCII_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_MARKED_WORDS = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = rf"{_ASCII_SIGNS}|{_MARKED_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_SPARK = rf"{_ASCII_SIGNS}|{_MARKED_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
_SEPARATORS = ".,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c"
_BLOOM = rf" ?[^(\s|[{_SEPARATORS}])]+"
_CJK_OF_DEEPSEEK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CJK_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_FREE = r"&&[^\p{Han}]]"
_KIMI = (
    rf"[\p{{Han}}]+|{_BEFORE}{_UPPER[:-1]}{_HAN_FREE}*{_LOWER[:-1]}{_HAN_FREE}+{_CONTRACTIONS}?"
    rf"|{_BEFORE}{_UPPER[:-1]}{_HAN_FREE}+{_LOWER[:-1]}{_HAN_FREE}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
)

#: Stands for the long list of letters of DeepSeek's first tokenizers, which varies in print.
_LETTERS = r"\s?[A-Za-z and other cased letters]+"
_LETTERS_AS_WRITTEN = re.compile(r"\\s\?\[A-Za-z\u00b5\u00c0-\u00d6[^\]\\]*\]\+")

#: Spellings of one thing, and the spelling used here. Possessive quantifiers after a class change
#: nothing in these expressions, and ``\s*`` already takes all but the last newline.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    ("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d"),
    (r"\p{N}{1}", r"\p{N}"),
    (r"\s*[\r\n]|", r"\s*[\r\n]+|"),
)
_POSSESSIVE = re.compile(r"(?<=\])([?+*])\+")


def _split(*expressions: str) -> tuple[str, ...]:
    return tuple(f"split {_spelled(expression)}" for expression in expressions)


def _spelled(expression: str) -> str:
    for written, here in _SPELLINGS:
        expression = expression.replace(written, here)
    return _LETTERS_AS_WRITTEN.sub(lambda _: _LETTERS, _POSSESSIVE.sub(r"\1", expression))


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers.

    Attributes:
        name: the value of ``tokenizer.ggml.pre``.
        steps: of ``tokenizer.json``, spelled as :func:`describe` does.
        ignore_merges: whether llama.cpp takes a word that is a token as it is.
        cleans_spaces: whether llama.cpp drops spaces before punctuation when it turns tokens
            back into text in one go.
        has_bos: whether llama.cpp makes up a beginning-of-sequence token where none is written.
        limits: what llama.cpp does otherwise than the steps say, measured; empty for nothing.
    """

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    cleans_spaces: bool = False
    has_bos: bool = True
    limits: str = ""


_MARKS = "llama.cpp cuts words with combining marks, as of Hindi or Tamil, into more pieces"
_BYTES = ("bytes",)
_ONE_DIGIT = ("digits one by one",)

#: Where several entries have the same steps, the first one that fits best is taken.
KNOWN = (
    PreTokenizer("gpt-2", (*_split(_GPT2), *_BYTES), cleans_spaces=True),
    PreTokenizer("smollm", (*_ONE_DIGIT, *_split(_GPT2), *_BYTES)),
    PreTokenizer("starcoder", (*_ONE_DIGIT, *_split(_GPT2), *_BYTES), cleans_spaces=True),
    PreTokenizer(
        "falcon",
        (
            "punctuation contiguous",
            *_split(_GPT2),
            *_BYTES,
            "digits in runs",
            *_split("[0-9][0-9][0-9]"),
        ),
        cleans_spaces=True,
    ),
    PreTokenizer("llama-bpe", (*_split(_LLAMA3), *_BYTES), ignore_merges=True, cleans_spaces=True),
    PreTokenizer("smaug-bpe", (*_split(_LLAMA3), *_BYTES), cleans_spaces=True),
    PreTokenizer(
        "glm4",
        (*_split(_LLAMA3), *_BYTES),
        ignore_merges=True,
        cleans_spaces=True,
        has_bos=False,
    ),
    PreTokenizer("chatglm-bpe", (*_split(_LLAMA3), *_BYTES), cleans_spaces=True, has_bos=False),
    PreTokenizer("qwen2", (*_split(_QWEN2), *_BYTES)),
    PreTokenizer("stablelm2", (*_split(_QWEN2), *_BYTES), cleans_spaces=True),
    PreTokenizer("qwen35", (*_split(_QWEN35), *_BYTES)),
    PreTokenizer(
        "seed-coder",
        (
            *_split(
                rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
            ),
            *_BYTES,
        ),
    ),
    PreTokenizer("ufakzeka", (*_split(rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"), *_BYTES)),
    PreTokenizer(
        "minicpm5",
        (
            *_split(r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}+|{_SIGNS}|{_SPACES}"),
            *_BYTES,
        ),
        ignore_merges=True,
        cleans_spaces=True,
    ),
    PreTokenizer(
        "jais-2",
        (
            *_split(
                rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+"
                rf"|{_CASCADE}|\s{{1,2}}(?!\S)|\s{{1}}"
            ),
            *_BYTES,
        ),
        cleans_spaces=True,
    ),
    PreTokenizer(
        "exaone-moe",
        (
            *_split(
                rf"{_CONTRACTIONS}|{_BEFORE}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|{_SPACES}"
            ),
            *_BYTES,
        ),
        cleans_spaces=True,
    ),
    PreTokenizer("tekken", (*_split(_TEKKEN), *_BYTES), ignore_merges=True, limits=_MARKS),
    PreTokenizer("gpt-4o", (*_split(_GPT4O), *_BYTES), limits=_MARKS),
    PreTokenizer(
        "tiny_aya",
        (*_split(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O), *_BYTES),
        limits="llama.cpp cuts runs of spaces before numbers into more pieces",
    ),
    PreTokenizer("kimi-k2", (*_split(_KIMI), *_BYTES), limits=_MARKS),
    PreTokenizer("deepseek-v3", (*_split(r"\p{N}{1,3}", _CJK_AND_KANA, _DEEPSEEK3), *_BYTES)),
    PreTokenizer(
        "spark2_5",
        (*_split(r"\p{N}{1,3}", _CJK_AND_KANA, _SPARK), *_ONE_DIGIT, *_BYTES),
    ),
    PreTokenizer(
        "deepseek-llm",
        (
            *_split(
                r"[\r\n]",
                _LETTERS,
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                r"\s+$",
                _CJK_OF_DEEPSEEK,
            ),
            *_ONE_DIGIT,
            *_BYTES,
        ),
    ),
    PreTokenizer(
        "deepseek-coder",
        (
            *_split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_OF_DEEPSEEK),
            *_ONE_DIGIT,
            *_BYTES,
        ),
    ),
    PreTokenizer("bloom", (*_split(_BLOOM), *_BYTES), cleans_spaces=True),
    PreTokenizer("poro-chat", (*_split(_BLOOM), *_BYTES)),
    PreTokenizer("viking", (*_split(_BLOOM), *_ONE_DIGIT, *_BYTES)),
    PreTokenizer("superbpe", (*_split(r"\p{N}+", r"(?=(\d{3})+(?!\d))"), *_BYTES)),
)


def is_byte_level(tokenizer: Json) -> bool:
    """Whether a ``tokenizer.json`` spells text in bytes, as GPT-2 did."""
    return any(
        step.get("type") == "ByteLevel"
        for key, members in (("pre_tokenizer", "pretokenizers"), ("normalizer", "normalizers"))
        for step in steps(tokenizer.get(key), members)
    )


def detect(
    tokenizer: Json, file: Path, *, cleans_spaces: bool | None, has_bos: bool
) -> PreTokenizer:
    """Find the pre-tokenizer of a byte-level ``tokenizer.json``.

    Args:
        tokenizer: the file's content.
        file: its path, for messages.
        cleans_spaces: ``clean_up_tokenization_spaces`` of the settings, None where they do not say.
        has_bos: whether the model has a beginning-of-sequence token.

    Raises:
        CheckpointError: when llama.cpp has none that cuts text so; the message says what it does.
    """
    _check_normalizer(tokenizer, file)
    found = tuple(describe(tokenizer))
    fitting = [entry for entry in KNOWN if entry.steps == found]
    if not fitting:
        raise CheckpointError(
            f"{file}: llama.cpp has no pre-tokenizer that cuts text as this one does "
            f"({', then '.join(found) or 'not at all'}), and another would spoil the model's "
            "answers; this model cannot be exported until llama.cpp has it"
        )
    ignore_merges = bool((tokenizer.get("model") or {}).get("ignore_merges"))

    def misfits(entry: PreTokenizer) -> tuple[bool, bool, bool]:
        return (
            entry.ignore_merges != ignore_merges,
            entry.has_bos != has_bos,
            cleans_spaces not in (None, entry.cleans_spaces),
        )

    return min(fitting, key=misfits)


def describe(tokenizer: Json) -> Iterator[str]:
    """The steps of a pre-tokenizer, one line each; the same for all spellings of one thing."""
    for step in steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                yield "space in front"
            if step.get("use_regex", True):
                yield from _split(_GPT2)
            yield "bytes"
        elif kind == "Split":
            yield _describe_split(step)
        elif kind == "Digits":
            yield "digits one by one" if step.get("individual_digits") else "digits in runs"
        elif kind == "Punctuation":
            yield f"punctuation {str(step.get('behavior', 'Isolated')).lower()}"
        else:
            yield str(kind)


def _describe_split(step: Json) -> str:
    pattern: Any = step.get("pattern")
    if not isinstance(pattern, dict) or not isinstance(expression := pattern.get("Regex"), str):
        return f"split at the text {pattern!r}"
    behavior, spelled = step.get("behavior"), _spelled(expression)
    # Keeping only what matches is the same where everything matches.
    covers = spelled.endswith((r"|\s+", r"|\s{1}"))
    if behavior == "Isolated" or (behavior == "Removed" and step.get("invert") and covers):
        return f"split {spelled}"
    return f"split {behavior} {spelled}"


def _check_normalizer(tokenizer: Json, file: Path) -> None:
    for step in steps(tokenizer.get("normalizer"), "normalizers"):
        if step.get("type") not in UNICODE_FORMS:
            raise CheckpointError(
                f"{file}: has the normalizer {step.get('type')}, which llama.cpp has not for "
                "byte-level tokenizers; this model cannot be exported until llama.cpp has it"
            )
