"""Values that take the place of the base's: full fine-tunes, and what PEFT saves beside LoRA."""

from pathlib import Path

from mlx_fusekit.adapters.fitting import closest, refuse_vocabulary
from mlx_fusekit.adapters.towers import why_not_run
from mlx_fusekit.adapters.updates import FullUpdate, Update
from mlx_fusekit.adapters.values import check_finite
from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.checkpoint.json_text import shown
from mlx_fusekit.errors import AdapterError, CheckpointError
from mlx_fusekit.formats.floats import FLOAT_DTYPES


def put_whole(
    base: BaseModel,
    name: str,
    tensor: TensorRef,
    file: Path,
    weights: dict[str, Update],
    parameters: dict[str, FullUpdate],
    converted: TensorSource | None = None,
) -> None:
    """Note a value among the weights that are quantized in the base, or the other parameters.

    Args:
        base: what it is merged into.
        name: of the base's tensor.
        tensor: the value, unquantized.
        file: of the adapter's weights, for messages.
        weights: by module path.
        parameters: by tensor name.
        converted: the value in MLX's form, where the tensor has it in another.

    Raises:
        AdapterError: for a value that does not fit, or is not finite.
    """
    target, module = base.tensors.get(name), name.removesuffix(".weight")
    if target is None:
        if why := why_not_run(tensor.name, module):
            raise AdapterError(f"{file}: {why}")
        raise AdapterError(
            f"{file}: {shown(tensor.name)} is no parameter of the base model"
            f"{closest(name, base)}; fuse into the model it was trained from"
        )
    check_finite(tensor)
    value = converted or tensor
    if value.shape == target.shape and target.dtype in FLOAT_DTYPES:
        parameters[name] = FullUpdate(value)
    elif name.endswith(".weight") and _fits_quantized(base, module, value):
        weights[module] = FullUpdate(value)
    else:
        if len(value.shape) == 2:
            refuse_vocabulary(file, base, module, target, value.shape[0])
        raise AdapterError(
            f"{file}: {shown(tensor.name)} is {tensor.dtype} {list(tensor.shape)}, which does not "
            f"fit the base's {target.dtype} {list(target.shape)}; fuse into the model it was "
            "trained from"
        )


def _fits_quantized(base: BaseModel, module: str, tensor: TensorSource) -> bool:
    target = base.tensors[f"{module}.weight"]
    if tensor.shape[:-1] != target.shape[:-1] or tensor.dtype not in FLOAT_DTYPES:
        return False
    try:
        return base.quantization(module, tensor.shape[-1]) is not None
    except CheckpointError:
        return False
