"""Pre-tokenizers as the ``tokenizer.json`` files of model families spell them.

By the name that llama.cpp gives the family. Written down from the files themselves and from
llama.cpp's notes of them, independently of the package's own table.
"""

from __future__ import annotations

import unicodedata

from support.tokenizer_folders import GPT2, LLAMA3, QWEN2, Json, byte_level, digits, sequence, split

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}{_CASED_END}"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    rf"|\p{{N}}{{1,3}}{_CASED_END}"
)
KIMI = (
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SEED = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}"
    "| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
JAIS2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)"
    r"|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
)
_SIGN_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
DEEPSEEK3 = (
    f"{_SIGN_WORD}|[^\r\n\\p{{L}}\\p{{P}}\\p{{S}}]?[\\p{{L}}\\p{{M}}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
SPARK = (
    f"{_SIGN_WORD}|[^\r\n\\p{{L}}\\p{{P}}\\p{{S}}]?[\\p{{L}}\\p{{M}}]+"
    "| ?[\\p{P}\\p{S}]+|[\r\n]|\\s+(?!\\S)|\\s+"
)
KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
FULL_WIDTH_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


def _deepseek_letters() -> str:
    """DeepSeek's list of cased letters, which leaves out small Armenian and mathematical ones."""
    runs: list[list[int]] = []
    for code in range(0x1D400):
        if unicodedata.category(chr(code)) not in ("Lu", "Ll", "Lt") or 0x560 <= code <= 0x588:
            continue
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    ranges = (chr(a) if a == b else f"{chr(a)}-{chr(b)}" for a, b in runs)
    return f"\\s?[{''.join(ranges)}]+"


def _single(regex: str, behavior: str = "Isolated", *, invert: bool = False) -> Json:
    return sequence(split(regex, behavior, invert=invert), byte_level())


#: The pre-tokenizers, by llama.cpp's name.
FAMILIES: dict[str, Json] = {
    "gpt-2": byte_level(use_regex=True),
    "smollm": sequence(digits(), byte_level(use_regex=True)),
    "falcon": sequence(
        {"type": "Punctuation", "behavior": "Contiguous"},
        byte_level(use_regex=True),
        digits(individual=False),
        split("[0-9][0-9][0-9]"),
    ),
    "smaug-bpe": _single(LLAMA3),
    "qwen2": _single(QWEN2),
    "qwen35": _single(QWEN35),
    "seed-coder": _single(SEED),
    "ufakzeka": _single(QWEN2.partition("|'d)|")[2]),
    "minicpm5": sequence(
        split(r"\p{N}{1,3}"), split(QWEN2.replace(r"|\p{N}|", r"|\p{N}+|")), byte_level()
    ),
    "jais-2": _single(JAIS2),
    "exaone-moe": _single(EXAONE_MOE),
    "tekken": _single(TEKKEN),
    "gpt-4o": _single(GPT4O),
    "tiny_aya": sequence(split(r"\d{1,3}(?=(?:\d{3})*\b)"), split(GPT4O), byte_level()),
    "kimi-k2": _single(KIMI),
    "deepseek-v3": sequence(split(r"\p{N}{1,3}"), split(KANA), split(DEEPSEEK3), byte_level()),
    "spark2_5": sequence(split(r"\p{N}{1,3}"), split(KANA), split(SPARK), digits(), byte_level()),
    "deepseek-llm": sequence(
        split("[\r\n]"),
        split(_deepseek_letters()),
        split(FULL_WIDTH_SIGNS),
        split("\\s+$"),
        split(CJK),
        digits(),
        byte_level(),
    ),
    "deepseek-coder": sequence(
        split("[\r\n]"),
        split("\\s?\\p{L}+"),
        split("\\s?\\p{P}+"),
        split(CJK),
        digits(),
        byte_level(),
    ),
    "bloom": _single(BLOOM),
    "viking": sequence(split(BLOOM), digits(), byte_level()),
    "superbpe": sequence(split(r"\p{N}+"), split(r"(?=(\d{3})+(?!\d))"), byte_level()),
}

#: Other spellings of the same.
SPELLINGS: list[tuple[str, Json]] = [
    ("gpt-2", sequence(byte_level(use_regex=True))),
    ("gpt-2", _single(GPT2)),
    ("gpt-2", sequence(sequence(split(GPT2)), byte_level())),
    ("smaug-bpe", _single(LLAMA3, "Removed", invert=True)),
    ("smaug-bpe", _single(LLAMA3, invert=True)),
    ("qwen2", _single(BAILING)),
    (
        "qwen2",
        _single(
            QWEN2.replace(
                "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
                "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
            )
        ),
    ),
]
