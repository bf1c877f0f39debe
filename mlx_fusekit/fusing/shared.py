"""What several fuses of one base have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mlx_fusekit.adapters.sources import open_model
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.hub import LocalFolder

if TYPE_CHECKING:
    from mlx_fusekit.running.shared import RunningBase


@dataclass
class OpenedBase:
    """A base that is opened once, unless an adapter looks for what the first form does not have.

    An :data:`~mlx_fusekit.adapters.sources.OpenBase`; each adapter gets what it would get alone.
    """

    _plain: BaseModel | None = None
    _other: BaseModel | None = None

    def __call__(self, model: LocalFolder, wanted: set[str]) -> BaseModel:
        """The base, given the names of the tensors that will be looked for."""
        if self._plain is None:
            self._plain = open_model(model)
        if self._plain.converted or wanted <= self._plain.tensors.keys():
            return self._plain
        if self._other is None:
            self._other = open_model(model, wanted)
        return self._other


@dataclass(frozen=True)
class Shared:
    """A base that several fuses run and name.

    Attributes:
        model: its folder.
        digests: gives the digests of its files, by name.
    """

    model: LocalFolder
    digests: Callable[[], dict[str, str]]

    @cached_property
    def base(self) -> "RunningBase":
        """In memory; loaded when it is first run."""
        from mlx_fusekit.running.shared import RunningBase

        return RunningBase(self.model)
