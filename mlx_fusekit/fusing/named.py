"""Under which names the models of several adapters are saved."""

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence

from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.hub import LocalFolder


def saved_names(adapters: Sequence[LocalFolder]) -> list[str]:
    """A folder name for each adapter: its own, with its parent's before it where two are alike.

    Of an adapter on the Hub, the parent is its owner.

    Raises:
        ConfigurationError: for names that no two folders can have, or none should.
    """
    own = [_own_name(adapter) for adapter in adapters]
    alike = Counter(_folded(name) for _, name in own)
    names = [f"{parent}-{name}" if alike[_folded(name)] > 1 else name for parent, name in own]
    for place, name in enumerate(names):
        if not name or name.startswith(".") or {os.sep, "\0"} & set(name):
            raise ConfigurationError(
                f"--adapter-path {adapters[place].path}: no folder of --save-path can be called "
                f"{name!r} after it; rename the adapter's folder"
            )
        if (first := [_folded(n) for n in names].index(_folded(name))) != place:
            raise ConfigurationError(
                f"--adapter-path {adapters[first].path} and {adapters[place].path}: both would be "
                f"saved as {name}; with --each, give folders of different names"
            )
    return names


def _own_name(adapter: LocalFolder) -> tuple[str, str]:
    """Names of the parent and of the adapter itself, as the user wrote them."""
    if adapter.repo_id is not None:
        owner, _, name = adapter.repo_id.rpartition("/")
        return owner, name
    path = adapter.path.resolve() if adapter.path.name in ("", "..") else adapter.path.absolute()
    return path.parent.name, path.name


def _folded(name: str) -> str:
    """What file systems that do not tell cases apart take a name for."""
    return unicodedata.normalize("NFC", name).casefold()
