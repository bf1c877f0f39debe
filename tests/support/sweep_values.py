"""Values of a wrong kind, put in the place of every value of a JSON document, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

#: One of each kind, and the extremes; 10**400 is no float, the last is no text.
SENSELESS: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    4.5,
    1e308,
    float("nan"),
    10**400,
    2**63,
    "x",
    "",
    [],
    {},
    [[]],
    [None],
    "\ud800",
)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to every value of a document, the whole document's not among them."""
    members = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in members:
        yield (*path, key)
        yield from places(value, (*path, key))


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document that has another value in a place."""
    changed = copy.deepcopy(document)
    owner = changed
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return changed


def without(document: Any, path: tuple[Any, ...]) -> Any:
    """A copy of a document that lacks a value."""
    changed = copy.deepcopy(document)
    owner = changed
    for key in path[:-1]:
        owner = owner[key]
    del owner[path[-1]]
    return changed


def replaced(document: Any, values: tuple[Any, ...] = SENSELESS) -> Iterator[Any]:
    """The document with each of the values in each place, and without each of its own."""
    for path in places(document):
        for value in values:
            yield with_value(document, path, value)
        yield without(document, path)
