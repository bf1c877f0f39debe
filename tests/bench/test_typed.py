"""Values out of JSON as dataclasses."""

from dataclasses import dataclass
from typing import Any

import pytest

from mlx_fusekit.bench.typed import typed


@dataclass
class Facts:
    count: int
    ratio: float | None
    names: list[str]
    times: tuple[float, ...]
    sure: dict[str, bool]
    anything: dict[str, Any]


GOOD: dict[str, Any] = {
    "count": 1,
    "ratio": None,
    "names": ["a"],
    "times": (0.5, 1),
    "sure": {"a": True},
    "anything": {"a": [None]},
}


def test_values_of_the_types_that_are_declared() -> None:
    assert typed(Facts, GOOD) == Facts(**GOOD)
    assert typed(Facts, {**GOOD, "ratio": 1}).ratio == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", True),
        ("count", 1.0),
        ("count", 10**400),
        ("ratio", "1"),
        ("ratio", 10**400),
        ("names", "a"),
        ("names", [1]),
        ("times", [0.5, []]),
        ("times", 0.5),
        ("sure", {"a": 1}),
        ("sure", []),
        ("anything", None),
    ],
)
def test_values_of_other_types(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        typed(Facts, {**GOOD, name: value})


def test_a_field_that_is_missing_or_too_many() -> None:
    with pytest.raises(TypeError):
        typed(Facts, {name: value for name, value in GOOD.items() if name != "sure"})
    with pytest.raises(TypeError):
        typed(Facts, {**GOOD, "more": 1})
