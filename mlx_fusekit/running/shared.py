"""A base in memory that runs with one adapter after the other."""

import contextlib
from collections.abc import Iterator
from functools import cached_property

from mlx_fusekit.adapters.updates import Adapter, FullUpdate
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running.adapted import put_on
from mlx_fusekit.running.loading import run_model
from mlx_fusekit.running.model import Place, RunningModel, place
from mlx_fusekit.texts.calibration import Written


class RunningBase:
    """A base that is loaded when it is first run, and what it wrote.

    Args:
        source: its folder.

    Attributes:
        written: text that it wrote as itself.
    """

    def __init__(self, source: LocalFolder) -> None:
        self._source = source
        self.written: Written = {}

    @cached_property
    def _bare(self) -> RunningModel:
        return run_model(self._source)

    @contextlib.contextmanager
    def adapted(self, adapter: Adapter) -> Iterator[RunningModel]:
        """While it lasts, the base runs with an adapter that was bound to it.

        Raises:
            AdapterError: when mlx-lm has no adapter layer for a module.
            CheckpointError: naming what is wrong with the base.
        """
        before = [(where, where.value) for where in _places(self._bare, adapter)]
        try:
            yield put_on(self._bare, adapter)
        finally:
            for where, value in before:
                where.put(value)

    def let_go(self) -> None:
        """Free its memory; it is loaded again when it is next run."""
        self.__dict__.pop("_bare", None)


def _places(running: RunningModel, adapter: Adapter) -> Iterator[Place]:
    """Where an adapter changes a model: modules, their weights, and other parameters."""
    for path, update in adapter.weights.items():
        yield (where := place(running.model, path))
        if isinstance(update, FullUpdate):
            yield Place(where.value, "weight")
    for name in adapter.parameters:
        yield place(running.model, name)
