"""From one adapter's form to another, or from several adapters to one: ``convert_adapter()``."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fusekit.adapters.combination import Combination
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.adapters.sources import AdapterNames, NamedSources, Sources
from mlx_fusekit.adapters.updates import Adapter
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.converting.files import adapter_target, stored_type
from mlx_fusekit.converting.full_rank import as_low_rank
from mlx_fusekit.converting.mlx_form import mlx_lm_files
from mlx_fusekit.converting.options import check_form, check_size
from mlx_fusekit.converting.peft_form import peft_files
from mlx_fusekit.converting.truncating import Kept, overall, truncated
from mlx_fusekit.errors import AdapterError, ConfigurationError
from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.hub import LocalFolder, hub_id
from mlx_fusekit.progress import StepProgress, of_step
from mlx_fusekit.writing.staging import staged

WRITERS = {"mlx": mlx_lm_files, "peft": peft_files}
#: More than this, relative, is no rounding to float32.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        to: the form that was written, ``mlx`` or ``peft``.
        adapters: what it was made of.
        weights: of each.
        combine: how several were combined; None of one, or of a sum.
        kind: ``lora`` or ``dora``.
        modules: how many have matrices.
        parameters: how many values were saved as a whole.
        rank: the largest.
        scale: of the updates, as it is written.
        bytes: size of the weights.
        energy: share of the squares of all updates that their ranks keep; None where none was cut.
        energies: that of each module.
        difference: largest relative difference (Frobenius) of a module's update, read back from
            disk, from what was to be written.
        warnings: one line each.
    """

    save_path: str
    to: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    combine: Mapping[str, Any] | None
    kind: str
    modules: int
    parameters: int
    rank: int
    scale: float
    bytes: int
    energy: float | None
    energies: Mapping[str, float]
    difference: float
    seconds: float
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


def convert_adapter(
    model: str | Path,
    adapter_path: AdapterNames,
    save_path: str | Path,
    to: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    combine: str = "sum",
    density: float | None = None,
    combine_seed: int = 0,
    scale: float | None = None,
    ignore: Sequence[str] = (),
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: StepProgress | None = None,
) -> ConvertReport:
    """Write an adapter in mlx-lm's or PEFT's form, or several as one.

    Args:
        model: the base, folder or Hub id; weights are read only where a module was saved whole.
        adapter_path: as for :func:`mlx_fusekit.fuse`.
        save_path: the folder to make.
        to: ``mlx`` or ``peft``.
        rank: cut each module's update to this rank at most, by its singular values.
        energy: or to the smallest one that keeps this share of its squares.
        combine: as for :func:`mlx_fusekit.fuse`; what is no sum needs ``rank`` or ``energy``.
        density: as for :func:`mlx_fusekit.fuse`.
        combine_seed: as for :func:`mlx_fusekit.fuse`.
        scale: of the only adapter's update, instead of the recorded one.
        ignore: patterns of modules to leave out, as :func:`mlx_fusekit.fuse` takes them.
        revision: of the base on the Hub.
        overwrite: replace an existing adapter's folder.
        trust_remote_code: let model code that lies in the base's folder run.
        progress: called with the step, and how much of it is done and there is in all.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure; nothing is
            written then.
    """
    start = time.perf_counter()
    how = Combination(combine, density, combine_seed)
    _check_options(to, rank, energy, how)
    named = NamedSources.find(
        model,
        adapter_path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        scale=scale,
        combination=how,
        ignore=ignore,
    )
    path = Path(save_path).expanduser()
    target = adapter_target(path, overwrite=overwrite, sources=named.folders)
    target.check()
    sources = named.open()
    _refuse_full(sources)
    adapter, common = _unscaled(sources, cut=rank is not None or energy is not None)
    kept: Mapping[str, Kept] = {}
    if rank is not None or energy is not None:
        told = of_step(progress, "cutting ranks")
        adapter, kept = truncated(adapter, rank=rank, energy=energy, progress=told)
    trained_on = public_base(sources.model, sources.opened[0].trained_on)
    files = WRITERS[to](adapter, sources.base, scale=common, trained_on=trained_on)
    with staged(target) as staging:
        nbytes = files.write(staging, stored_type(sources.opened))
        difference = written_difference(staging, sources.base, adapter, common)
    return ConvertReport(
        save_path=str(path),
        to=to,
        adapters=sources.adapter_names,
        weights=sources.weights,
        combine=how.as_json(),
        kind=sources.adapter.kind,
        modules=len(adapter.weights),
        parameters=len(adapter.parameters),
        rank=_largest_rank(adapter),
        scale=common,
        bytes=nbytes,
        energy=overall(kept),
        energies={module: one.share for module, one in kept.items()},
        difference=difference,
        seconds=time.perf_counter() - start,
        warnings=(*sources.base.warnings, *adapter.warnings, *files.notes),
    )


def written_difference(folder: Path, base: BaseModel, adapter: Adapter, scale: float) -> float:
    """How far an adapter that was written is from what it was to be.

    Args:
        folder: where it lies.
        base: what it is bound to.
        adapter: its updates without the scale.
        scale: of all of them.

    Returns:
        The largest relative difference (Frobenius) of a module's update.
    """
    written = open_adapter(folder).bind(base)
    wanted, found = as_low_rank(adapter, base, scale), as_low_rank(written, base, 1.0)
    largest = 0.0
    for module, update in wanted.updates.items():
        whole = replace(update, up=update.up * np.float32(scale))
        other = found.updates[module]
        both = LowRankUpdate(
            np.concatenate([whole.up, -other.up], axis=2),
            np.concatenate([whole.down, other.down], axis=1),
        )
        if whole.delta_norm:
            largest = max(largest, both.delta_norm / whole.delta_norm)
        same = np.array_equal(_norms(whole), _norms(other))
        if not same or (not whole.delta_norm and both.delta_norm):
            raise AssertionError(f"{module}: what was written is another update")
    if largest > _ROUNDING or wanted.parameters.keys() != found.parameters.keys():
        raise AssertionError(f"{folder}: what was written is another adapter ({largest:g})")
    return largest


def _norms(update: LowRankUpdate) -> Float32:
    return np.zeros(0, np.float32) if update.magnitude is None else update.magnitude


def public_base(model: LocalFolder, trained_on: str | None) -> str:
    """The base's name, as it may stand in a file: never a path of this machine."""
    if model.repo_id is not None:
        return model.repo_id
    if trained_on is not None and hub_id(trained_on) is not None:
        return trained_on
    return model.public_name


def _check_options(to: str, rank: int | None, energy: float | None, how: Combination) -> None:
    check_form(to)
    check_size(rank, energy)
    if not how.is_sum and rank is None and energy is None:
        raise ConfigurationError(
            f"--combine {how.method}: has no low rank by itself; say which with --rank or --energy"
        )


def _refuse_full(sources: Sources) -> None:
    for folder in sources.opened:
        if folder.kind == "full":
            raise AdapterError(
                f"{folder.folder}: is a full fine-tune, and no LoRA; fuse it with --dequantize, "
                "and `mlx-fusekit extract --rank` makes an adapter of the result"
            )


def _unscaled(sources: Sources, *, cut: bool) -> tuple[Adapter, float]:
    """The adapter to write, without its scale where the file's own numbers can stay."""
    if len(sources.opened) == 1 and sources.weights == (1.0,) and not cut:
        folder = sources.opened[0]
        return folder.bind(sources.base, sources.model.identity, scaled=False), folder.scale
    return sources.adapter, 1.0


def _largest_rank(adapter: Adapter) -> int:
    return max((update.rank or 0 for update in adapter.weights.values()), default=0)
