"""Which modules of two models differ, and how much: the public ``diff()``."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit import hub
from mlx_fusekit.adapters.sources import open_model
from mlx_fusekit.differing.pairs import ModelPair, WeightPair
from mlx_fusekit.differing.recipes import made_of
from mlx_fusekit.factoring import participation
from mlx_fusekit.progress import StepProgress, of_step


@dataclass(frozen=True)
class ModuleChange:
    """A module whose weight differs.

    Attributes:
        module: its path.
        relative: Frobenius norm of the difference by that of the first one's weight; None where
            that is zero.
        effective_rank: singular directions that take part in the difference,
            ``(sum s^2)^2 / sum s^4``; of experts, the mean of those that differ.
        shape: ``(experts, rows, columns)``.
        formats: how each model stores it.
    """

    module: str
    relative: float | None
    effective_rank: float
    shape: tuple[int, int, int]
    formats: tuple[str, str]


@dataclass(frozen=True)
class DiffReport:
    """What differs between two models.

    Attributes:
        first: name of the one.
        second: name of the other.
        modules: how many matrices they have.
        changed: those that differ, in the model's order.
        parameters: names of norms, biases and others that differ.
        recipe: what ``fusekit.json`` of the second says it was made of; None without one.
        warnings: one line each.
    """

    first: str
    second: str
    modules: int
    changed: tuple[ModuleChange, ...]
    parameters: tuple[str, ...]
    recipe: Mapping[str, Any] | None
    seconds: float
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


def diff(
    first: str | Path,
    second: str | Path,
    *,
    trust_remote_code: bool = False,
    progress: StepProgress | None = None,
) -> DiffReport:
    """Compare the weights of two models of one shape, whatever their formats.

    Args:
        first: folder or Hub id of the one, such as a base.
        second: of the other.
        trust_remote_code: let model code that lies in the folders run.
        progress: called with the step, and how much of it is done and there is in all.

    Raises:
        FusekitError: with one line that names the file or tensor, and the cure.
    """
    start = time.perf_counter()
    found = [
        hub.resolve(name, what=what, code=trust_remote_code)
        for name, what in ((first, "A"), (second, "B"))
    ]
    models = [open_model(folder) for folder in found]
    pair = ModelPair(models[0], models[1])
    pair.check((str(first), str(second)))
    pairs = list(pair.weights())
    changes, told = [], of_step(progress, "comparing")
    for place, weights in enumerate(pairs):
        if (change := _change(weights)) is not None:
            changes.append(change)
        if told is not None:
            told(place + 1, len(pairs))
    return DiffReport(
        first=found[0].public_name,
        second=found[1].public_name,
        modules=len(pairs),
        changed=tuple(changes),
        parameters=tuple(pair.changed_parameters()),
        recipe=made_of(found[1].path),
        seconds=time.perf_counter() - start,
        warnings=tuple(w for model in models for w in model.warnings),
    )


def by_kind(changed: Sequence[ModuleChange]) -> dict[str, list[ModuleChange]]:
    """Changes by what the modules are called within their layer."""
    kinds: dict[str, list[ModuleChange]] = {}
    for change in changed:
        kinds.setdefault(kind_of(change.module), []).append(change)
    return kinds


def kind_of(module: str) -> str:
    """A module's name without what leads to its layer, or the whole of it."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else module


def layer_of(module: str) -> int | None:
    """The number of a module's layer; None where it is in none."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def _change(weights: WeightPair) -> ModuleChange | None:
    energy, ranks = 0.0, []
    for expert in range(weights.shape[0]):
        matrix = weights.difference(expert)
        own = matrix.energy()
        if own:
            energy += own
            ranks.append(participation(matrix.smaller_gram()))
    if not energy:
        return None
    before = weights.energy()
    formats = [
        str(reader.spec) if reader.spec else reader.sources["weight"].dtype
        for reader in (weights.first, weights.second)
    ]
    return ModuleChange(
        module=weights.module,
        relative=math.sqrt(energy / before) if before else None,
        effective_rank=sum(ranks) / len(ranks),
        shape=weights.shape,
        formats=(formats[0], formats[1]),
    )
