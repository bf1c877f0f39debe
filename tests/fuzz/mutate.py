"""Changes of JSON that leave it JSON: bytes changed at random seldom get past the parser."""

import copy
import json
import random
from typing import Any

#: In the place of any value.
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    4.0,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    2**31,
    2**63,
    2**64,
    10**400,
    "",
    "a",
    "4",
    "a\nb",
    "\x1b[31m\x00",
    "\ud800",
    "../x",
    "x" * 300,
    [],
    {},
    [[]],
    [None],
    {"": None},
)


def mutated_json(content: bytes, seed: int) -> bytes | None:
    """JSON with some of its values changed, moved, doubled or removed; None of what is no JSON."""
    chance = random.Random(seed)
    try:
        value = json.loads(content)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            value = _changed(value, chance)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def _changed(value: Any, chance: random.Random) -> Any:
    """The value after one change, somewhere in it."""
    places = list(_places(value)) if isinstance(value, dict | list) else []
    if not places:
        return _odd(chance)
    parent, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        other, other_key = chance.choice(places)
        parent[key] = json.loads(json.dumps(other[other_key]))
    elif kind == 2 and isinstance(parent, dict):
        parent[str(_odd(chance))] = parent.pop(key)
    elif kind == 3 and isinstance(parent[key], int | float):
        parent[key] = chance.choice(
            (parent[key] * 2, parent[key] + 1, parent[key] - 1, -parent[key])
        )
    elif kind == 4:
        parent[key] = chance.choice(([parent[key]], {"a": parent[key]}, str(parent[key])))
    else:
        parent[key] = _odd(chance)
    return value


def _odd(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(ODD))  # a later change may be inside it


def _places(value: Any) -> Any:
    """Container and key of every value inside a value."""
    stack = [value]
    while stack:
        container = stack.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in keys:
            yield container, key
            if isinstance(container[key], dict | list):
                stack.append(container[key])
