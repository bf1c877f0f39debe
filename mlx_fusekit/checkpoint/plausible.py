"""Counts of a configuration, bounded before anything is made of them.

mlx-lm's classes make as many layers, experts and heads as a configuration says, long before they
look at a weight, and each class has its own names for them. So two nets: numbers of layers may not
exceed what the weights hold; and while a class builds a model, what it does is counted, whatever
made it do so.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mlx_fusekit.checkpoint.json_text import shown
from mlx_fusekit.errors import CheckpointError

#: Settings that say how often something is made, in classes that do so at one stroke, where nothing
#: can be counted: as ``["full_attention"] * num_hidden_layers``.
_MULTIPLIED = re.compile(r"(^|_)(layers?|hc_mult)$")
#: More layers than any model has. Some settings speak of layers that a small model does not have,
#: as ``max_window_layers``.
_MANY_LAYERS = 1000
#: Calls of functions while a model is built. The largest models take some 30,000.
_MOST_CALLS = 150_000


def check_layers(config: Mapping[str, Any], tensors: int, path: Path) -> None:
    """Refuse a number of layers, under any key, that the weights cannot hold.

    Args:
        config: of the model, as read from ``path``.
        tensors: how many its weights are.
        path: for messages.

    Raises:
        CheckpointError: naming the setting.
    """
    most = max(tensors, _MANY_LAYERS)
    for key, number in _numbers(config):
        if _MULTIPLIED.search(key) and number > most:
            raise CheckpointError(
                f"{path}: {shown(key)} is {shown(number)}, and the weights are only {tensors} "
                "tensors; correct it, or download the model again"
            )


@contextmanager
def limited_building(config: Mapping[str, Any], path: Path | None = None) -> Iterator[None]:
    """A context in which a model class of mlx-lm's builds a model of ``config``.

    Raises:
        CheckpointError: as soon as it has done several times what any model takes.
    """
    calls = 0
    before = sys.getprofile()

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        if event == "call":
            calls += 1
            if calls > _MOST_CALLS:
                sys.setprofile(before)
                raise _too_much(config, path)

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


def _too_much(config: Mapping[str, Any], path: Path | None) -> CheckpointError:
    key, number = max(_numbers(config), key=lambda found: found[1], default=("", 0))
    largest = f" (its largest number is {shown(key)}, {shown(number)})" if key else ""
    return CheckpointError(
        f"{path or 'config.json'}: makes mlx-lm build more parts than any model has{largest}; "
        "correct what counts layers or experts, or download the model again"
    )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration, by its own key."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:  # not by recursion, since it may be nested as deeply as Python allows
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((key, member) for member in value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value
