"""JSON that a stranger wrote, read within limits.

What is parsed takes up to a hundred times the room of its text (``[],[],[]``), and a file may be
many megabytes; so its values are counted before they are made.
"""

import json
import re
from collections import Counter
from typing import Any

#: Of a file in which every value is about one tensor or one setting.
MOST_VALUES = 2_000_000
LARGEST_TEXT = 40_000_000
#: The same of a tokenizer: of some 260,000 tokens, with a merge for each, there are 35 MB and
#: 2 million.
MOST_OF_A_TOKENIZER, LARGEST_TOKENIZER = 10_000_000, 200_000_000
_SHOWN = 200
_HALF_OF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(content: bytes, most_values: int = MOST_VALUES, *, unique: bool = False) -> Any:
    """The value that a text in UTF-8 stands for.

    Args:
        content: the text.
        most_values: how many values it may hold, in all.
        unique: whether an object that gives a key twice is refused; JSON leaves open which counts.

    Raises:
        ValueError: in one line, for what is no JSON, has more values, is nested too deeply, holds a
            number of more than 4,300 digits, or half of a surrogate pair, which no text can hold.
    """
    # Every value but the first of a list or object has a comma before it. Those in texts count too.
    values = sum(content.count(sign) for sign in (b",", b"[", b"{"))
    if values > most_values:
        raise ValueError(f"it holds more than {most_values:,} values")
    text = content.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles if unique else None)
        if _HALF_OF_A_PAIR.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except (json.JSONDecodeError, _DoubleError):
        raise
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text in it holds half of a surrogate pair") from error
    except ValueError as error:  # Python's limit; such a number may take minutes
        raise ValueError("a number in it has more than 4,300 digits") from error
    return value


class _DoubleError(ValueError):
    pass


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        times = Counter(key for key, _ in pairs)
        double = next(key for key in times if times[key] > 1)
        raise _DoubleError(f"it names {shown(double)} twice")
    return result


def shown(value: object) -> str:
    """A value as Python writes it, cut to what fits in a line."""
    return cut(repr(value))


def cut(text: str) -> str:
    """A text from a file, cut to what fits in a line."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
