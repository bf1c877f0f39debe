"""The matrices of one module's LoRA or DoRA, fitted to the base, whatever file they are from."""

from pathlib import Path

import numpy as np

from mlx_fusekit.adapters.fitting import fit_vocabulary
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.errors import AdapterError, CheckpointError
from mlx_fusekit.formats.floats import Float32


def fitted(
    base: BaseModel,
    module: str,
    up: Float32,
    down: Float32,
    magnitude: Float32 | None,
    *,
    scale: float,
    file: Path,
    have: str,
    cure: str,
) -> tuple[LowRankUpdate, str | None]:
    """The update of a module that the base has.

    Args:
        base: what it is merged into.
        module: the module's path there.
        up: ``[experts, rows, rank]``.
        down: ``[experts, rank, columns]``.
        magnitude: of DoRA, ``[rows]``.
        scale: to multiply ``up`` with.
        file: of the adapter's weights, for messages.
        have: the matrices as the file has them, for messages.
        cure: for a scale that is too large.

    Returns:
        The update, and what the user should know of it.

    Raises:
        AdapterError: for what does not fit, or overflows.
    """
    weight, note = base.tensors[f"{module}.weight"], None
    if magnitude is None:
        up, note = fit_vocabulary(file, base, module, weight, up)
    if not _fits(base, module, weight, up, down, magnitude):
        raise AdapterError(
            f"{file}: {module} has {have}, which does not fit the base's weight "
            f"{weight.dtype} {list(weight.shape)}; fuse into the model the adapter was trained on"
        )
    with np.errstate(over="ignore"):
        up = up * np.float32(scale)
    if not np.isfinite(up).all():
        raise AdapterError(
            f"{file}: {module} overflows float32 when multiplied with scale {scale:g}; {cure}"
        )
    if _overflows(up, down):
        raise AdapterError(
            f"{file}: the update of {module} overflows float32 at scale {scale:g}; {cure}"
        )
    return LowRankUpdate(np.ascontiguousarray(up), np.ascontiguousarray(down), magnitude), note


def factor(own: float, common: float, *, scaled: bool) -> float:
    """What a module's matrices are multiplied with.

    Args:
        own: the module's scale.
        common: the adapter's.
        scaled: whether the scale is multiplied in; else what is left of it beside the common one.
    """
    if scaled:
        return own
    return 1.0 if own == common or not common else own / common


def _fits(
    base: BaseModel,
    module: str,
    weight: TensorSource,
    up: Float32,
    down: Float32,
    magnitude: Float32 | None,
) -> bool:
    experts, rows, rank = up.shape
    columns = down.shape[-1]
    expected = weight.shape[:-1] if len(weight.shape) == 3 else (1, *weight.shape[:-1])
    if (experts, rows) != expected or down.shape[:2] != (experts, rank):
        return False
    if magnitude is not None and (magnitude.shape != (rows,) or experts != 1):
        return False
    try:
        spec = base.quantization(module, columns)
    except CheckpointError:
        return False
    return spec is not None or columns == weight.shape[-1]


def _overflows(up: Float32, down: Float32) -> bool:
    largest = float(np.abs(up).max(initial=0)) * float(np.abs(down).max(initial=0)) * up.shape[-1]
    if largest < 1e38:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return not np.isfinite(up @ down).all()
