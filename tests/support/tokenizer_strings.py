# ruff: noqa: RUF001 - characters that look like others are what this is about
"""Strings that tokenizers disagree about, and random mixtures of their pieces."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

SCRIPTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Zażółć gęślą jaźń",
    "Жълтата дюля беше щастлива",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "דג סקרן שט בים מאוכזב",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "मैं हिन्दी में लिख रहा हूँ।",
    "আমার সোনার বাংলা",
    "தமிழ் மொழி இனிது",
    "తెలుగు భాష",
    "ಕನ್ನಡ ನಾಡು",
    "ഈ വാക്യം മലയാളത്തിലാണ്",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "ພາສາລາວ",
    "မြန်မာဘာသာ",
    "ភាសាខ្មែរ",
    "ქართული ენა",
    "Հայոց լեզու",
    "አማርኛ ቋንቋ",
    "天地玄黃，宇宙洪荒。",
    "简体中文与繁體中文混排",
    "いろはにほへとちりぬるを",
    "カタカナとひらがなと漢字",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "Tiếng Việt có nhiều dấu thanh",
    "Türkçe: İstanbul'da ılık bir gün, ISPARTA'nın gülü",
    "Ελληνικά, ΚΕΦΑΛΑΊΑ and lowerΜixed",
    "ß ẞ ſ K Å ﬁ ﬂ Ǆ ǅ ǆ",
    "Ⅷ ⅷ ½ ¾ ² ³ ₄ ①②③",
    "𝕳𝖊𝖑𝖑𝖔 𝒲𝑜𝓇𝓁𝒹 𐐀𐐨",
]
CODE = [
    "def f(x: int) -> int:\n    return x * 2  # twice\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "\tif err != nil {\n\t\treturn nil, err\n\t}\n",
    "SELECT name, COUNT(*) FROM t WHERE a >= 10 GROUP BY name;",
    "const f = async () => await fetch(`https://x.y/${id}?q=1&r=2`);",
    "#include <stdio.h>\r\nint main(void)\r\n{\r\n\treturn 0;\r\n}\r\n",
    "<div class=\"a b\" id='c'>&nbsp;</div><!-- note -->",
    '{"key": [1, 2.5, -3e10, null, true], "k2": "\\u00e9"}',
    "regex = r'^\\s*(\\w+)\\s*=\\s*(.*?)$'",
    "ls -la | grep '^d' && echo \"$HOME\" > /dev/null 2>&1",
    "\\frac{1}{2} \\sum_{i=0}^{n} x_i^2",
    "lambda x:x**2//3%5<<1>>2&0xFF|~y^z",
    "camelCase snake_case SCREAMING_CASE kebab-case PascalCase HTTPServer2Go",
    '-- comment\nlocal t = {a=1; ["b"]=2}',
    "a->b::c.d()[0]{1}!=e===f",
    "@decorator\nclass A(B, metaclass=C): ...",
    "print('it''s', \"don't\", `x`)",
    "x = '''triple''' + \"\"\"quotes\"\"\"",
    "https://example.com/a/b?c=d#e user@example.org C:\\Windows\\System32",
    "/* multi\n * line\n */",
]
NUMBERS = [
    "0",
    "7 77 777 7777 77777 777777 7777777 77777777",
    "3.14159 1,234,567.89 -42 +1e-10 0x1F 0b1010 1_000_000",
    "2024-02-29T23:59:59.999Z",
    "192.168.0.1:8080",
    "1st 2nd 3rd 4th v1.2.3-rc4",
    "١٢٣٤٥٦٧٨٩٠ ۱۲۳ १२३ ๑๒๓ 一二三",
    "a1b22c333d4444",
    "100% $5.00 €10 £3 ¥1000 #1",
    " 1  22   333",
    "12'34\"",
    "½¾ 1½ ²³ x²",
]
SPACES = [
    " ",
    "  ",
    "   ",
    "    ",
    " " * 7,
    " " * 16,
    " " * 31,
    " " * 32,
    " " * 33,
    " " * 70,
    "\n",
    "\n\n",
    "\n\n\n",
    "\n" * 10,
    "\n" * 33,
    "\t",
    "\t\t",
    "\t\t\t\t",
    "\r",
    "\r\n",
    "\r\n\r\n",
    " \n",
    "\n ",
    " \n ",
    "  \n  \n  ",
    "\t\n",
    "\n\t",
    "a  b",
    "a   b",
    "a \n b",
    "a\n\nb",
    "a \t b",
    " a",
    "  a",
    "   a",
    "a ",
    "a  ",
    "a\n",
    "a\r\nb",
    "x\u00a0y",
    "x\u3000y",
    "x\u2003y\u2009z",
    "x\u200by",
    "x\u2028y\u2029z",
    "x\x0by\x0cz",
    "x\x85y",
    "end of sentence.  Next one.   And another.",
    "    indented\n        more\n    less\n",
    "trailing spaces   \nnext",
    "\n\nleading lines",
    " .",
    " , a",
    "  !",
    "a .b",
]
EMOJI = [
    "😀",
    "😀😃😄",
    " 😀 ",
    "👨‍👩‍👧‍👦",
    "👍🏽 👍🏿",
    "🇩🇪🇫🇷",
    "❤️ ❤",
    "🏳️‍🌈",
    "text😀text",
    "✅ done ❌ not",
    "1️⃣ 2️⃣",
    "☃ ☂ ♞ ♫",
    "→ ← ⇒ ∀x∈ℝ ∃y ≤ ∞ √2 ≈ 1.41",
    "┌─┬─┐│ │└─┴─┘",
    "🦙.cpp & 🤗",
    "🧑🏻‍💻 codes",
]
MARKS = [
    "don't I'm we're they've he'll she'd it's",
    "DON'T I'M WE'RE THEY'VE HE'LL SHE'D IT'S",
    "'s 't 're 've 'm 'll 'd",
    "'S 'T 'Re 'vE",
    "' s 'a ''s s's",
    "don’t “quoted” ‘single’ — dash – en … dots",
    "...!!!???,,,;;;:::",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "(a)[b]{c}<d>",
    "hello,world!how?are;you:fine",
    'Mr. O\'Neill said: "Hi!" (twice).',
    "well-known re-use e-mail",
    "a/b\\c|d",
    "**bold** _it_ ~~no~~ `code` # Head\n- item\n1. one\n",
    "¿Qué? ¡Sí! «guillemets» „unten“",
    "。、！？「」『』（）【】",
    "$x$ $$y$$ \\(z\\)",
    "= == === => <= >= != += -= *= /= &&  || ++ --",
    "~!~ -- --- ----- ====== ______ ######",
    "a\"b'c`d",
    "x.\ny,\nz;\n\nw!\n\n\n",
    "/\n//\n///",
]
UNICODE_FORMS = [
    "e\u0301 a\u0308 n\u0303",
    "\u1100\u1161\u11a8",
    "q\u0307\u0323",
    "\u0301 alone",
    "A\u030a = \u00c5 = \u212b",
    "क़ = क\u093c",
    "\u202eright to left\u202c",
    "zero\u200dwidth\u200cjoin\ufeff",
    "\u00ad soft\u00adhyphen",
    "\ue000\uf8ff private",
    "\U000e0001\U000e0020 tags",
    "\ufffd replaced",
]
CONTROLS = [
    "\x01\x02\x03",
    "a\x07b\x08c",
    "\x1b[31mred\x1b[0m",
    "\x7f\x80\x9f",
    "tab\tand\vvertical\ffeed",
]
WORDS = [
    "a",
    "A",
    "z",
    "é",
    "the",
    " the",
    "The",
    "hello",
    " Hello",
    "HELLO",
    "antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abababababababab",
    "xqzjkvwbp",
    "ÀÉÎÕÜ",
    "Wörterbuchs",
    "don't",
    "",
    "iPhone15ProMax",
    "ABCdefGHI",
]

FIXED = [
    *WORDS,
    *SCRIPTS,
    *CODE,
    *NUMBERS,
    *SPACES,
    *EMOJI,
    *MARKS,
    *UNICODE_FORMS,
    *CONTROLS,
]


def mixtures(count: int, pieces: Sequence[str] = (), seed: int = 5) -> list[str]:
    """Random strings: pieces of the fixed ones, and of ``pieces``, in any order."""
    generator = random.Random(seed)
    groups = [WORDS, SCRIPTS, CODE, NUMBERS, SPACES, EMOJI, MARKS, UNICODE_FORMS, CONTROLS]
    if pieces:
        groups.append(list(pieces))
    strings = []
    for _ in range(count):
        parts = []
        for _ in range(generator.randint(1, 6)):
            text = generator.choice(generator.choice(groups))
            start = generator.randrange(len(text) + 1) if text not in pieces else 0
            parts.append(text[start : start + generator.randint(1, 20)] if start else text[:40])
        strings.append(generator.choice(["", " ", "\n"]).join(parts))
    return strings


def all_strings(pieces: Sequence[str] = ()) -> list[str]:
    """More than 500 strings; ``pieces`` are a tokenizer's own special tokens."""
    with_pieces = [f"a{piece}b {piece} c\n{piece}{piece}" for piece in pieces]
    return [*FIXED, *with_pieces, *mixtures(300, pieces)]


def is_composed(text: str) -> bool:
    """Whether Unicode's form NFC leaves a text as it is."""
    return unicodedata.is_normalized("NFC", text)
