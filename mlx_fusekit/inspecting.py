"""The facts of a model folder or an adapter."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fusekit import hub
from mlx_fusekit.adapters.ignoring import check_patterns
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.adapters.sources import open_model
from mlx_fusekit.adapters.updates import AdapterFolder, Update
from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.checkpoint.belongings import ADAPTER_CONFIG_NAME
from mlx_fusekit.checkpoint.folder import Checkpoint, optional_json
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.formats import codebooks
from mlx_fusekit.formats.floats import FLOAT_DTYPES, Float32, to_float32
from mlx_fusekit.formats.quantization import parts_of
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.merging.arithmetic import merge
from mlx_fusekit.merging.blocks import WeightReader, row_blocks, weight_sources
from mlx_fusekit.reading import exists


@dataclass(frozen=True)
class ModelFacts:
    """What a model folder holds.

    Attributes:
        architecture: mlx-lm's model type.
        parameters: logical ones: a packed weight counts as the numbers it stands for.
        bits_per_weight: bytes of all tensors in bits, by ``parameters``.
        formats: number of weight matrices by their format.
        exceptions: quantized modules whose format is not the most common one.
        fused: the recipe of a model that was fused by mlx-fusekit.
    """

    path: str
    architecture: str
    parameters: int
    layers: int | None
    tensors: int
    files: int
    bytes: int
    bits_per_weight: float
    formats: dict[str, int]
    exceptions: dict[str, str]
    fused: dict[str, Any] | None
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The facts as a JSON object."""
        return {"kind": "model", **asdict(self)}


@dataclass(frozen=True)
class DeltaFacts:
    """How large an adapter's update of one module is.

    Attributes:
        delta_rms: root mean square of the weights' change.
        step_rms: root mean square of the quantization step (the scale) of the base, None for a
            dense weight.
        delta_steps: their quotient: below about 1/2, rounding to nearest drowns the update.
    """

    module: str
    format: str
    rank: int | None
    delta_rms: float
    step_rms: float | None
    delta_steps: float | None


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter folder holds.

    Attributes:
        targets: number of modules by their last name part.
        deltas: per module, when a base was given.
    """

    path: str
    fine_tune_type: str
    trained_on: str | None
    rank: int | None
    scale: float | None
    num_layers: int | None
    modules: int
    targets: dict[str, int]
    parameters: int
    bytes: int
    deltas: tuple[DeltaFacts, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The facts as a JSON object."""
        return {"kind": "adapter", **asdict(self)}


def inspect(
    path: str | Path,
    *,
    model: str | Path | None = None,
    scale: float | None = None,
    ignore: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelFacts | AdapterFacts:
    """Read the facts of a model or an adapter.

    Args:
        path: folder or Hub id.
        model: an adapter's base, to compare its update with the base's quantization step.
        scale: of an adapter's update, taken instead of the recorded one.
        ignore: patterns of modules to leave out of an adapter, as :func:`mlx_fusekit.fuse` takes
            them.
        revision: of a Hub id.
        trust_remote_code: let model code that lies in the base's folder run.

    Raises:
        FusekitError: when the folder is no valid model or adapter, or they do not fit.
    """
    own_revision = revision if model is None else None
    folder = hub.resolve(path, revision=own_revision, what="PATH").path
    if exists(folder / ADAPTER_CONFIG_NAME):
        adapter, base = open_adapter(folder, scale=scale, ignore=ignore), None
        check_patterns(ignore, [(adapter.ignored, adapter.paths)])
        if model is not None:
            base = open_model(hub.resolve(model, revision=revision, code=trust_remote_code))
        return _adapter_facts(str(path), adapter, base, str(model))
    if not exists(folder / "config.json"):
        raise CheckpointError(
            f"{path}: neither a model (config.json) nor an adapter ({ADAPTER_CONFIG_NAME})"
        )
    flags = [f"--scale {scale:g}"] if scale is not None else []
    flags += [f"--ignore {pattern!r}" for pattern in ignore]
    if flags:
        raise ConfigurationError(f"{flags[0]}: is for an adapter, and {path} is a model")
    checkpoint = Checkpoint.open(folder, trust_remote_code=trust_remote_code)
    return _model_facts(str(path), checkpoint)


def _model_facts(path: str, checkpoint: Checkpoint) -> ModelFacts:
    specs = {m: _spec_or_none(checkpoint, m) for m in checkpoint.quantized_modules}
    leaves = parts_of(checkpoint.tensors, specs)
    parameters, formats = 0, Counter[str]()
    for name, tensor in checkpoint.tensors.items():
        if name in leaves:
            continue
        spec = specs.get(name.removesuffix(".weight"))
        parameters += _logical_size(tensor, spec)
        if len(tensor.shape) > 1:
            formats[str(spec) if spec else tensor.dtype] += 1
    common = Counter(str(spec) for spec in specs.values()).most_common(1)
    exceptions = {m: str(s) for m, s in specs.items() if common and str(s) != common[0][0]}
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return ModelFacts(
        path=path,
        architecture=str(checkpoint.config.get("model_type", "unknown")),
        parameters=parameters,
        layers=checkpoint.layer_count,
        tensors=len(checkpoint.tensors),
        files=len(checkpoint.headers),
        bytes=nbytes,
        bits_per_weight=8 * nbytes / max(parameters, 1),
        formats=dict(formats.most_common()),
        exceptions=exceptions,
        fused=optional_json(checkpoint.folder, RECIPE_NAME),
        warnings=checkpoint.warnings,
    )


def _spec_or_none(checkpoint: Checkpoint, module: str) -> QuantSpec | None:
    """The module's quantization; None where shapes leave it open, which is a fact too."""
    try:
        return checkpoint.quantization(module)
    except CheckpointError:
        return None


def _logical_size(tensor: TensorSource, spec: QuantSpec | None) -> int:
    size = math.prod(tensor.shape)
    return size // tensor.shape[-1] * spec.columns(tensor.shape[-1]) if spec else size


def _adapter_facts(
    path: str, adapter: AdapterFolder, base: BaseModel | None, base_id: str
) -> AdapterFacts:
    full, modules = adapter.kind == "full", adapter.paths
    bound = adapter.bind(base, base_id) if base is not None else None
    deltas = []
    if base is not None and bound is not None:
        deltas = [_delta_facts(base, module, update) for module, update in bound.weights.items()]
    return AdapterFacts(
        path=path,
        fine_tune_type=adapter.kind,
        trained_on=adapter.trained_on,
        rank=adapter.rank,
        scale=None if full else adapter.scale,
        num_layers=adapter.num_layers,
        modules=len(modules),
        targets=dict(Counter(module.rpartition(".")[2] for module in modules).most_common()),
        parameters=sum(math.prod(t.shape) for t in adapter.tensors.values()),
        bytes=sum(tensor.nbytes for tensor in adapter.tensors.values()),
        deltas=tuple(deltas),
        warnings=bound.warnings if bound else adapter.notes,
    )


def _delta_facts(base: BaseModel, module: str, update: Update) -> DeltaFacts:
    spec = base.quantization(module, update.columns)
    reader = WeightReader.open(weight_sources(base, module, spec), spec)
    delta_rms = _delta_norm(reader, update) / math.sqrt(math.prod(reader.shape))
    step_rms = _step_rms(reader.sources["scales"], spec) if spec else None
    return DeltaFacts(
        module=module,
        format=str(spec) if spec else reader.sources["weight"].dtype,
        rank=update.rank,
        delta_rms=delta_rms,
        step_rms=step_rms,
        delta_steps=delta_rms / step_rms if step_rms else None,
    )


def _delta_norm(reader: WeightReader, update: Update) -> float:
    """Frobenius norm of what the update changes in a weight."""
    if isinstance(update, LowRankUpdate) and update.magnitude is None:
        return update.delta_norm
    total = 0.0
    for rows in row_blocks(reader.shape):
        base = reader.read(rows)[1]
        change = merge(base, update, rows) - base.values
        total += float(np.square(change, dtype=np.float64).sum())
    return math.sqrt(total)


def _step_rms(scales: TensorSource, spec: QuantSpec) -> float:
    """Root mean square of the scales: an affine format's step, a codebook's step around one."""
    stored = scales.read_rows(0, math.prod(scales.shape[:-1]))
    if scales.dtype in FLOAT_DTYPES:
        values: Float32 = to_float32(stored, scales.dtype)
    else:
        values = (codebooks.E4M3 if spec.mode == "nvfp4" else codebooks.E8M0)[stored]
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
