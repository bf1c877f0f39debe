"""From a base and a model that was made of it to an adapter: the public ``extract()``."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlx_fusekit import hub
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.sources import open_model
from mlx_fusekit.adapters.updates import Adapter, FullUpdate, Update
from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.checkpoint.mlx_lm import adaptable_modules
from mlx_fusekit.converting.convert import WRITERS, public_base, written_difference
from mlx_fusekit.converting.files import adapter_target
from mlx_fusekit.converting.options import check_form, check_size
from mlx_fusekit.converting.truncating import Kept, overall, stacked
from mlx_fusekit.differing.pairs import ModelPair, WeightPair
from mlx_fusekit.differing.recipes import made_of
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.factoring import factor
from mlx_fusekit.formats.floats import FLOAT_DTYPES
from mlx_fusekit.progress import StepProgress, of_step
from mlx_fusekit.writing.staging import staged


@dataclass(frozen=True)
class ModuleExtract:
    """What became of a module's difference.

    Attributes:
        module: its path.
        rank: of its matrices, the largest of experts.
        energy: share of the squares of its difference that they keep.
    """

    module: str
    rank: int
    energy: float


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did.

    Attributes:
        to: the form that was written, ``mlx`` or ``peft``.
        base: name of the base.
        fused: name of the model that was made of it.
        modules: those that differ, with what is kept of each.
        parameters: names of norms, biases and others that differ, saved as a whole.
        rank: the largest.
        energy: share of all squares that the adapter keeps.
        bytes: size of the weights.
        recipe: what ``fusekit.json`` beside the model says went into it; None without one.
        warnings: one line each.
    """

    save_path: str
    to: str
    base: str
    fused: str
    modules: tuple[ModuleExtract, ...]
    parameters: tuple[str, ...]
    rank: int
    energy: float
    bytes: int
    recipe: Mapping[str, Any] | None
    seconds: float
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


def extract(
    model: str | Path,
    fused: str | Path,
    save_path: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    to: str = "mlx",
    seed: int = 0,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: StepProgress | None = None,
) -> ExtractReport:
    """Make the best adapter of a rank of the difference between a base and a model made of it.

    Args:
        model: the base, folder or Hub id.
        fused: a fused or fine-tuned model of the same shape, of any format.
        save_path: the folder to make.
        rank: of each module, at most.
        energy: or the share of the squares of each difference to keep, at its smallest rank.
        to: the form to write, ``mlx`` or ``peft``.
        seed: of the sketch by which large matrices are factored.
        revision: of the base on the Hub.
        overwrite: replace an existing adapter's folder.
        trust_remote_code: let model code that lies in the folders run.
        progress: called with the step, and how much of it is done and there is in all.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure; nothing is
            written then.
    """
    start = time.perf_counter()
    check_form(to)
    check_size(rank, energy)
    if rank is None and energy is None:
        raise ConfigurationError(
            "--rank: give the rank of the adapter, or the share to keep as --energy 0.99"
        )
    found = hub.resolve(model, revision=revision, code=trust_remote_code)
    other = hub.resolve(fused, what="--fused", code=trust_remote_code)
    path = Path(save_path).expanduser()
    target = adapter_target(path, overwrite=overwrite, sources=(found.path, other.path))
    target.check()
    pair = ModelPair(open_model(found), open_model(other))
    pair.check((f"--model {model}", f"--fused {fused}"))
    adapter, kept = _extracted(pair, rank, energy, seed, progress)
    if not adapter.weights:
        raise ConfigurationError(
            f"--fused {fused}: no matrix of it differs from those of {model}; there is nothing to "
            "extract"
        )
    files = WRITERS[to](adapter, pair.first, scale=1.0, trained_on=public_base(found, None))
    with staged(target) as staging:
        nbytes = files.write(staging)
        written_difference(staging, pair.first, adapter, 1.0)
    return ExtractReport(
        save_path=str(path),
        to=to,
        base=found.public_name,
        fused=other.public_name,
        modules=tuple(
            ModuleExtract(module, update.rank or 0, kept[module].share)
            for module, update in adapter.weights.items()
        ),
        parameters=tuple(adapter.parameters),
        rank=max(update.rank or 0 for update in adapter.weights.values()),
        energy=overall(kept) or 0.0,
        bytes=nbytes,
        recipe=made_of(other.path),
        seconds=time.perf_counter() - start,
        warnings=(*pair.first.warnings, *pair.second.warnings, *files.notes),
    )


def _extracted(
    pair: ModelPair,
    rank: int | None,
    energy: float | None,
    seed: int,
    progress: StepProgress | None,
) -> tuple[Adapter, dict[str, Kept]]:
    """The adapter, and what it keeps of each module."""
    adaptable = adaptable_modules(pair.first.config)
    pairs, told = list(pair.weights()), of_step(progress, "factoring")
    updates: dict[str, Update] = {}
    parameters = {name: _whole(pair, name) for name in pair.changed_parameters()}
    kept: dict[str, Kept] = {}
    for place, weights in enumerate(pairs):
        if adaptable is None or weights.module in adaptable:
            update, own = _factored(weights, rank, energy, seed)
            if own.energy:
                updates[weights.module], kept[weights.module] = update, own
        elif any(weights.difference(e).energy() for e in range(weights.shape[0])):
            parameters[f"{weights.module}.weight"] = _whole(pair, f"{weights.module}.weight")
        if told is not None:
            told(place + 1, len(pairs))
    frozen = MappingProxyType(updates), MappingProxyType(parameters)
    return Adapter("lora", *frozen), kept


def _factored(
    weights: WeightPair, rank: int | None, energy: float | None, seed: int
) -> tuple[LowRankUpdate, Kept]:
    experts = range(weights.shape[0])
    return stacked(
        [factor(weights.difference(e), rank=rank, energy=energy, seed=seed) for e in experts]
    )


def _whole(pair: ModelPair, name: str) -> FullUpdate:
    """The second model's value of what no matrices of an adapter can change."""
    tensor = pair.second.tensors[name]
    if not isinstance(tensor, TensorRef) or tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{pair.second.folder}: {name} differs, and no adapter can hold it as it is stored "
            "there; bring the model into MLX's form with mlx_lm.convert, unquantized"
        )
    return FullUpdate(tensor)
