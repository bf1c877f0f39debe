"""The items of a file in mlx-lm's data formats: told from plain text, parsed and checked."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit.errors import ConfigurationError

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TABLE_SUFFIXES = (".csv", ".tsv")
_OPENS_AS_JSON = re.compile(r"\s*[\[{]")
#: An array of objects, or an object over several lines: no prose begins so.
_NO_PROSE = re.compile(r'\s*(\[\s*\{|\{\s*\n)\s*"')
_FORMATS = (
    'write {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}, '
    "one JSON object a line"
)
#: How deeply lists and objects may lie in each other; tools with their arguments have about ten.
_DEEPEST = 100


@dataclass(frozen=True, slots=True)
class Features:
    """Keys of an item's text, which mlx-lm calls features; None is a key that no item has."""

    prompt: str | None = "prompt"
    completion: str | None = "completion"
    chat: str | None = "messages"
    text: str | None = "text"

    @classmethod
    def trained_on(cls, adapter_config: Mapping[str, Any]) -> "Features":
        """Those of a local training set, which mlx-lm notes in the configuration if they differ."""
        default = cls()
        values = {
            name: adapter_config.get(f"{name}_feature", getattr(default, name))
            for name in ("prompt", "completion", "chat", "text")
        }
        return cls(**{n: value if isinstance(value, str) else None for n, value in values.items()})

    def __str__(self) -> str:
        pair = f"{json.dumps(self.prompt)} and {json.dumps(self.completion)}"
        return f"{pair}, {json.dumps(self.chat)} or {json.dumps(self.text)}"

    def find(self, item: Mapping[str | None, Any], where: str) -> dict[str, Any] | None:
        """An item under mlx-lm's default keys, None if it is in none of the formats.

        Raises:
            ConfigurationError: if what lies under a key is not of the key's type.
        """
        tools = {"tools": item.get("tools")}
        # The same order as in mlx_lm.tuner.datasets.create_dataset.
        if self.prompt in item and self.completion in item:
            prompt = _string(item, self.prompt, where)
            return {"prompt": prompt, "completion": _string(item, self.completion, where)} | tools
        if self.chat in item:
            return {"messages": _messages(item, self.chat, where)} | tools
        if self.text in item:
            return {"text": _string(item, self.text, where)}
        return None


def parse_items(text: str, file: Path, features: Sequence[Features]) -> list[dict[str, Any]] | None:
    """The items that a text is, under mlx-lm's default keys; None for plain text.

    Items are JSON objects, one a line or in an array. JSON is told by the file's name, or by the
    text: all of it is, most lines are objects, or it begins as no prose does.

    Args:
        text: what the file holds.
        file: named in errors, and ``.jsonl`` and the like are not plain text.
        features: keys to look for in every item, the first that it has.

    Raises:
        ConfigurationError: naming the line, or the item of an array, that is in none of the
            formats; for a table.
    """
    suffix = file.suffix.lower()
    named = suffix in _JSON_SUFFIXES
    opens = _OPENS_AS_JSON.match(text) is not None
    # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
    numbered = enumerate(text.split("\n") if named or opens else (), start=1)
    lines = [(at, line, _value(line)) for at, line in numbered if line.strip()]
    # One bad line does not make prose of them.
    by_line = 2 * sum(isinstance(value, dict) for *_, value in lines) >= len(lines)
    if not named and not (opens and (by_line or _is_json(text))):
        if suffix in _TABLE_SUFFIXES:
            raise ConfigurationError(f"{file}: a table, which is not read; {_FORMATS}")
        return None
    if by_line:
        placed = [
            (f"{file}:{at}", _load(line, file, at) if value is None else value)
            for at, line, value in lines
        ]
    elif isinstance(whole := _load(text, file), list):
        placed = [(f"{file}: item {at}", value) for at, value in enumerate(whole, start=1)]
    else:
        placed = [(str(file), whole)]
    return [_item(value, where, features) for where, value in placed]


def _is_json(text: str) -> bool:
    """Whether a text as a whole is an array or an object, or begins as only such do."""
    return _NO_PROSE.match(text) is not None or isinstance(_value(text), list | dict)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _load(text: str, file: Path, at: int = 1) -> Any:
    """The value of JSON text that begins in a line of the file."""
    cause: Exception
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at, reason, cause = at + error.lineno - 1, error.msg, error
    except RecursionError as error:
        reason, cause = "nested too deeply", error
    except ValueError as error:
        reason, cause = "a number of too many digits", error
    raise ConfigurationError(f"{file}:{at}: not JSON ({reason}); {_FORMATS}") from cause


def _item(value: Any, where: str, features: Sequence[Features]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where}: not a JSON object; {_FORMATS}")
    found = (keys.find(value, where) for keys in features)
    item = next((item for item in found if item is not None), None)
    if item is None:
        if Features() in features:
            raise ConfigurationError(f"{where}: none of mlx-lm's formats; {_FORMATS}")
        raise ConfigurationError(
            f"{where}: has none of the keys that the adapter's configuration names "
            f"({features[0]}); correct its features, or name the text with --calibration"
        )
    if _is_deeper(item, _DEEPEST):
        raise ConfigurationError(f"{where}: lists or objects are nested too deeply; {_FORMATS}")
    try:
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ConfigurationError(
            f"{where}: holds {half}, half of a surrogate pair, which is no text; correct it"
        ) from error
    return item


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects lie in each other more than so many deep."""
    members = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and (
        most == 0 or any(_is_deeper(member, most - 1) for member in members)
    )


def _string(item: Mapping[str | None, Any], key: str | None, where: str) -> str:
    value = item[key]
    if not isinstance(value, str):
        raise ConfigurationError(f"{where}: {json.dumps(key)} must be a string; {_FORMATS}")
    return value


def _messages(item: Mapping[str | None, Any], key: str | None, where: str) -> Any:
    messages = item[key]
    usable = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    )
    if not usable or not messages:
        raise ConfigurationError(
            f"{where}: {json.dumps(key)} must be a list of "
            '{"role": ..., "content": ...}; correct it'
        )
    return messages
