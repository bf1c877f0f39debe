"""What was read from JSON as a dataclass, whose fields have the types that it declares."""

import sys
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def typed(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of these values.

    Raises:
        TypeError: for a field that is missing, too many, or of another type.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _is_of(value, hints[name]):
            raise TypeError(f"{name} is {value!r}")
    return kind(**values)


def _is_of(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, one) for one in inside)
    if hint in (None, NoneType):
        return value is None
    if hint in (int, float):
        number = isinstance(value, int | float if hint is float else int)
        return number and not isinstance(value, bool) and not abs(value) > sys.float_info.max
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_is_of(one, inside[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(one, inside[1]) for one in value.values())
    return hint is Any or isinstance(value, origin or hint)
