"""Models in memory from folders, as the commands run them."""

from pathlib import Path
from typing import Any

from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running import adapted, loading
from mlx_fusekit.running.model import RunningModel


def run_model(folder: Path, *, trusted: bool = False, **how: Any) -> RunningModel:
    """A model folder, loaded."""
    return loading.run_model(LocalFolder(folder, trusted=trusted), **how)


def run_teacher(base: Path, *adapters: Path | str, **how: Any) -> RunningModel:
    """A base with adapters as mlx-lm runs them; each may be followed by ``:WEIGHT``."""
    sources = NamedSources.find(base, adapters).open()
    return adapted.run_adapted(sources.model, sources.adapter, **how)
