"""What a user names, base and adapters: found, opened, and bound to each other, once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_fusekit import hub
from mlx_fusekit.adapters.combination import SUM, Combination
from mlx_fusekit.adapters.combine import combine
from mlx_fusekit.adapters.ignoring import check_patterns
from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.adapters.updates import NO_ADAPTER, Adapter, AdapterFolder
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.reading import exists

#: How adapters are named: one or several folders or Hub ids, each maybe followed by ``:WEIGHT``.
AdapterNames = str | Path | Sequence[str | Path]
#: Opens a base, given the names of the tensors that will be looked for.
OpenBase = Callable[[LocalFolder, set[str]], BaseModel]


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """An adapter the user named, and the weight its update gets."""

    folder: LocalFolder
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class NamedSources:
    """Base and adapters as folders of this machine; what is in them was not looked at.

    Attributes:
        scale: of the only adapter's update, where the user says it.
        combination: how several adapters are combined.
        ignore: patterns of modules that are left out of the adapters.
    """

    model: LocalFolder
    adapters: tuple[AdapterChoice, ...]
    scale: float | None = None
    combination: Combination = SUM
    ignore: tuple[str, ...] = ()

    @classmethod
    def find(
        cls,
        model: str | Path,
        adapter_path: AdapterNames,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        weighted: bool = True,
        scale: float | None = None,
        combination: Combination = SUM,
        ignore: Sequence[str] = (),
    ) -> "NamedSources":
        """Find what the user named; what is on the Hub is downloaded.

        Args:
            model: folder or Hub id of the base.
            adapter_path: of the adapters.
            weighted: whether a name may end with ``:WEIGHT``.
            scale: of the adapter's update, taken instead of the recorded one; of one adapter only.
            combination: how several adapters are combined.
            ignore: patterns of modules to leave out, see
                :func:`~mlx_fusekit.adapters.ignoring.without_ignored`.
            revision: of the base on the Hub.
            trust_remote_code: let model code that lies in the base's folder run.

        Raises:
            HubError: with the cure, when there is no such folder or repository.
            ConfigurationError: for a scale or weight that makes no sense.
        """
        found = hub.resolve(model, revision=revision, code=trust_remote_code)
        named = [adapter_path] if isinstance(adapter_path, str | Path) else list(adapter_path)
        if not named:
            raise ConfigurationError("--adapter-path: give at least one adapter")
        if scale is not None and len(named) > 1:
            raise ConfigurationError(
                f"--scale {scale:g}: goes with one --adapter-path; of several, correct 'scale' in "
                "each adapter_config.json"
            )
        combination.check_count(len(named))
        chosen = tuple(choose_adapter(str(name), weighted=weighted) for name in named)
        return cls(found, chosen, scale, combination, tuple(ignore))

    @classmethod
    def alone(
        cls, model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> "NamedSources":
        """A base without adapters.

        Raises:
            HubError: as :meth:`find`.
        """
        return cls(hub.resolve(model, revision=revision, code=trust_remote_code), ())

    @property
    def folders(self) -> tuple[Path, ...]:
        """All that is read."""
        return (self.model.path, *(choice.folder.path for choice in self.adapters))

    def open_adapters(self) -> tuple[AdapterFolder, ...]:
        """Open the adapters alone, for what can be said of them without the base.

        Raises:
            AdapterError: naming the file or tensor that is wrong, and the cure.
            ConfigurationError: for a pattern to ignore that matches nothing.
        """
        opened = tuple(
            open_adapter(choice.folder.path, scale=self.scale, ignore=self.ignore)
            for choice in self.adapters
        )
        check_patterns(self.ignore, ((adapter.ignored, adapter.paths) for adapter in opened))
        return opened

    def open(
        self, opened: tuple[AdapterFolder, ...] | None = None, *, open_base: OpenBase | None = None
    ) -> "Sources":
        """Open all, and bind the adapters to the base.

        Args:
            opened: the adapters, where they were opened before.
            open_base: in the place of :func:`open_model`.

        Raises:
            AdapterError: when an adapter does not fit the base or the others.
            CheckpointError: naming what is wrong with the base.
        """
        opened = self.open_adapters() if opened is None else opened
        wanted = {name for adapter in opened for name in adapter.target_tensors}
        base = (open_base or open_model)(self.model, wanted)
        bound = [
            (adapter.bind(base, self.model.identity), choice.weight)
            for adapter, choice in zip(opened, self.adapters, strict=True)
        ]
        adapter = combine(bound, self.combination) if bound else NO_ADAPTER
        alone = tuple(adapter for adapter, _ in bound)
        return Sources(self.model, base, self.adapters, opened, adapter, alone, self.combination)


@dataclass(frozen=True)
class Sources:
    """A base and adapters, opened and checked against each other.

    Attributes:
        model: where the base lies.
        choices: the adapters as they were named.
        opened: the same, in the same order.
        adapter: all of them together, bound to the base.
        alone: each of them bound by itself, without its weight.
        combination: how they were combined.
    """

    model: LocalFolder
    base: BaseModel
    choices: tuple[AdapterChoice, ...]
    opened: tuple[AdapterFolder, ...]
    adapter: Adapter
    alone: tuple[Adapter, ...] = ()
    combination: Combination = SUM

    @property
    def folders(self) -> tuple[Path, ...]:
        """All that was opened."""
        return (self.model.path, *(choice.folder.path for choice in self.choices))

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Of each adapter, what may be told of it: never a path of this machine."""
        return tuple(choice.folder.public_name for choice in self.choices)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Modules that the user left out of the adapters, as their files name them."""
        return tuple(dict.fromkeys(m for adapter in self.opened for m in adapter.ignored.modules))

    @property
    def weights(self) -> tuple[float, ...]:
        """What each adapter's update is multiplied by."""
        return tuple(choice.weight for choice in self.choices)


def open_model(model: LocalFolder, wanted: set[str] | None = None) -> BaseModel:
    """Open a base by itself, as :func:`~mlx_fusekit.checkpoint.sanitized.open_base` does."""
    return open_base(model.path, trust_remote_code=model.trusted, wanted=wanted or ())


def choose_adapter(name: str, *, weighted: bool = True) -> AdapterChoice:
    """Find an adapter, as :meth:`NamedSources.find` does."""
    path, weight = _split_weight(name) if weighted else (name, 1.0)
    return AdapterChoice(hub.resolve(path, what="--adapter-path"), weight)


def _split_weight(name: str) -> tuple[str, float]:
    """``PATH:0.5`` as path and weight; a path that exists with the colon in it is left alone."""
    path, colon, weight = name.rpartition(":")
    if not colon or exists(Path(name).expanduser()):
        return name, 1.0
    try:
        number = float(weight)
    except ValueError:
        return name, 1.0
    if not math.isfinite(number):
        raise ConfigurationError(f"--adapter-path {name}: the weight must be a finite number")
    return path, number
