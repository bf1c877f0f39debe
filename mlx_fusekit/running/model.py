"""A model in memory, and how its modules change places."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.nn as nn

from mlx_fusekit.errors import AdapterError
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running.tokenizers import tokenizer_of
from mlx_fusekit.texts.tokens import token_rows


@dataclass(frozen=True, eq=False)
class Place:
    """Where a module or parameter lies: ``owner[key]``."""

    owner: Any
    key: Any

    @property
    def value(self) -> Any:
        """What lies there now."""
        return self.owner[self.key]

    def put(self, value: Any) -> None:
        """Put something else there."""
        self.owner[self.key] = value

    def is_same(self, other: "Place") -> bool:
        """Whether it is the very same place."""
        return self.owner is other.owner and bool(self.key == other.key)


def place(model: nn.Module, path: str) -> Place:
    """The place of a module or parameter.

    Raises:
        AdapterError: when the model has no such place.
    """
    *parents, last = path.split(".")
    owner: Any = model
    try:
        for part in parents:
            owner = owner[int(part)] if isinstance(owner, list) else owner[part]
        found = Place(owner, int(last) if isinstance(owner, list) else last)
        _ = found.value
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise AdapterError(
            f"{path}: no module of mlx-lm's model; fuse into the model the adapter was trained on"
        ) from error
    return found


@contextlib.contextmanager
def swapped(values: Iterable[tuple[Place, Any]]) -> Iterator[None]:
    """While it lasts, other values lie in these places."""
    before: list[tuple[Place, Any]] = []
    try:
        for where, value in values:
            before.append((where, where.value))
            where.put(value)
        yield
    finally:
        for where, value in reversed(before):
            where.put(value)


@dataclass(frozen=True, eq=False)
class RunningModel:
    """A model in memory, in eval mode.

    Attributes:
        model: mlx-lm's; call it with token ids ``[batch, tokens]`` for logits
            ``[batch, tokens, vocabulary]``.
        source: where it came from.
        config: its ``config.json``.
        exact: whether its weights are float32 throughout, the exact values of what is stored.
        bare_values: what lies without its adapter in the places that the adapter changed.
    """

    model: nn.Module
    source: LocalFolder
    config: Mapping[str, Any]
    exact: bool
    bare_values: list[tuple[Place, Any]] = field(default_factory=list)

    @cached_property
    def tokenizer(self) -> Any:
        """mlx-lm's ``TokenizerWrapper``, loaded on first use.

        Raises:
            CheckpointError: when the folder holds none that transformers can read, or that of
                another model.
        """
        return tokenizer_of(self.source, self.config, token_rows(self.model, self.config))

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[nn.Module]:
        """The same model without its adapter, which returns when the block ends.

        The unchanged weights are the same arrays, so base and teacher need the memory of one.
        """
        with swapped(self.bare_values):
            yield self.model

    def bare(self, path: str) -> nn.Module:
        """The module of a path as the base has it, without an adapter's layer around it."""
        found = place(self.model, path)
        kept = (value for where, value in self.bare_values if where.is_same(found))
        module = next(kept, found.value)
        assert isinstance(module, nn.Module), "a module's place holds modules"
        return module
