"""What a user names, base and adapters, opened and checked against each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_fusekit import hub
from mlx_fusekit.adapters import Adapter, AdapterFolder
from mlx_fusekit.adapters.combine import combine
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.sanitized import open_base
from mlx_fusekit.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """An adapter the user named, and the weight its update gets."""

    folder: hub.LocalFolder
    weight: float = 1.0


def adapter_choices(
    adapter_path: str | Path | Sequence[str | Path],
) -> tuple[AdapterChoice, ...]:
    """The adapters that a user named; those on the Hub are downloaded."""
    named = [adapter_path] if isinstance(adapter_path, str | Path) else list(adapter_path)
    if not named:
        raise ConfigurationError("--adapter-path: give at least one adapter")
    choices = []
    for name in named:
        path, weight = _split_weight(str(name))
        choices.append(AdapterChoice(hub.resolve(path, what="--adapter-path"), weight))
    return tuple(choices)


def _split_weight(name: str) -> tuple[str, float]:
    """``PATH:0.5`` as path and weight; a path that exists with the colon in it is left alone."""
    path, colon, weight = name.rpartition(":")
    if not colon or Path(name).expanduser().exists():
        return name, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return name, 1.0


def open_bound(
    base_folder: Path,
    adapters: Sequence[tuple[AdapterFolder, float]],
    *,
    base_id: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[BaseModel, Adapter]:
    """Open a base, and bind adapters to it.

    Args:
        base_folder: of the base.
        adapters: each with the weight of its update; LoRA adapters add up.
        base_id: as for :meth:`AdapterFolder.bind`.
        trust_remote_code: let model code that lies in the base's folder run.

    Raises:
        AdapterError: when an adapter does not fit the base or the others.
        CheckpointError: naming what is wrong with the base.
    """
    wanted = {name for adapter, _ in adapters for name in adapter.target_tensors}
    base = open_base(base_folder, trust_remote_code=trust_remote_code, wanted=wanted)
    return base, combine([(adapter.bind(base, base_id), weight) for adapter, weight in adapters])
