"""Stored types that mlx-lm does not read as the numbers they stand for.

``mx.load`` gives float8 as the integers of its bytes. Some model classes convert these; others
would compute with the integers, and say nothing.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_fusekit.checkpoint.decoded import has_scales
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.checkpoint.mlx_lm import model_classes
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.floats import FLOAT_DTYPES

if TYPE_CHECKING:
    import mlx.core as mx

_CURE = "use the model's 16-bit original, or one that mlx_lm.convert made of it"
#: A float8's bits above this one are negative.
_NEGATIVE_ZERO = 0x80
#: What names keep when mlx-lm's classes put other prefixes before them.
_LAYER = re.compile(r"(?:^|\.)(layers\.\d+\..+)")


def odd_weight(checkpoint: Checkpoint) -> TensorRef | None:
    """The first weight that is no float as MLX has them, nor packed as MLX packs; None without."""
    return next(_odd_weights(checkpoint), None)


def not_converted(tensor: TensorRef, config: Mapping[str, Any], words: str) -> CheckpointError:
    """The error for a model that mlx-lm refuses and that has such a weight.

    Args:
        tensor: the weight.
        config: of the model.
        words: mlx-lm's.
    """
    words = words.rstrip(":")
    return CheckpointError(
        f"{_described(tensor)}, which mlx-lm does not convert for the model type "
        f"{config.get('model_type')} ({words}); {_CURE}"
    )


def classes_of_floats(
    checkpoint: Checkpoint,
) -> Callable[[dict[str, Any]], tuple[type, type]]:
    """mlx-lm's classes for a configuration, of which the model's takes no integers for floats.

    Float8 without scales is decoded, what else is no float is refused.

    Returns:
        What ``mlx_lm.utils.load_model`` takes as ``get_model_classes``.
    """

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, arguments_class = model_classes(config)

        class OfFloats(model_class):  # type: ignore[misc,valid-type]
            def load_weights(self, weights: Any, strict: bool = True) -> Any:
                found = _decoded(checkpoint, self, dict(weights))
                _check_floats(checkpoint, self, found)
                self.__class__ = model_class  # from here on it is mlx-lm's own
                return self.load_weights(list(found.items()), strict)

        return OfFloats, arguments_class

    return classes


def plain_float8(checkpoint: Checkpoint) -> tuple[TensorRef, ...]:
    """Weights that are float8 and nothing else, so that each byte stands for one number."""
    if has_scales(checkpoint.tensors):
        return ()
    return tuple(tensor for tensor in _odd_weights(checkpoint) if tensor.dtype == "F8_E4M3")


def _decoded(
    checkpoint: Checkpoint, model: Any, weights: "Mapping[str, mx.array]"
) -> "dict[str, mx.array]":
    """The weights, of which float8 without scales is in the type of the others."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    plain = {tensor.name for tensor in plain_float8(checkpoint)}
    found = dict(weights)
    if not plain:
        return found
    floats = (a.dtype for a in weights.values() if mx.issubdtype(a.dtype, mx.floating))
    dtype = next(floats, mx.bfloat16)
    for name, place in tree_flatten(model.parameters()):
        array = found.get(name)
        if array is None or array.dtype != mx.uint8 or array.shape != place.shape:
            continue
        stored = _stored(checkpoint, name)
        if stored is not None and stored.name in plain:
            found[name] = mx.from_fp8(array, dtype=dtype)
    return found


def _check_floats(checkpoint: Checkpoint, model: Any, weights: "Mapping[str, mx.array]") -> None:
    """Refuse integers where the model, its layers quantized by now, has floats."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    places = dict(tree_flatten(model.parameters()))
    if not weights.keys() <= places.keys():
        return  # which mlx-lm will refuse
    for name, place in places.items():
        given = weights.get(name, place)
        floats = mx.issubdtype(place.dtype, mx.floating)
        # Of another shape, it is another fault, of which mlx-lm tells.
        if given.shape == place.shape and floats and not mx.issubdtype(given.dtype, mx.floating):
            raise _taken_for_integers(_stored(checkpoint, name), name, given.dtype)
    float8 = (tensor for tensor in _odd_weights(checkpoint) if tensor.dtype == "F8_E4M3")
    made = ((tensor, array) for tensor in float8 for array in _made_of(tensor, weights))
    # One tells of all, and more would be computed for nothing.
    for tensor, array in itertools.islice(made, 1):
        # mlx-lm 0.32 multiplies the bytes by their scale in ministral3.
        negative = np.greater(tensor.read(), _NEGATIVE_ZERO).any()
        if negative and not mx.any(array < 0).item():
            raise _taken_for_integers(tensor, tensor.name, None)


def _taken_for_integers(tensor: TensorRef | None, name: str, dtype: object) -> CheckpointError:
    what = f"{name} is loaded as {dtype}" if tensor is None else _described(tensor)
    return CheckpointError(f"{what}, which mlx-lm would take for whole numbers; {_CURE}")


def _made_of(tensor: TensorRef, weights: "Mapping[str, mx.array]") -> "Iterator[mx.array]":
    """The floats of the same shape that a class made of a stored weight, by their name."""
    import mlx.core as mx

    if (end := _LAYER.search(tensor.name)) is not None:
        for name, array in weights.items():
            same = name.endswith(end[1]) and array.shape == tensor.shape
            if same and mx.issubdtype(array.dtype, mx.floating):
                yield array


def _odd_weights(checkpoint: Checkpoint) -> Iterator[TensorRef]:
    packed = set(checkpoint.quantized_modules)
    for name, tensor in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        parameter = leaf in ("weight", "bias") and module not in packed
        if tensor.dtype not in FLOAT_DTYPES and (parameter or tensor.dtype.startswith("F8_")):
            yield tensor


def _stored(checkpoint: Checkpoint, name: str) -> TensorRef | None:
    """The tensor of a file that a parameter was made from, as far as its name tells."""
    end = _LAYER.search(name)
    names = (n for n in checkpoint.tensors if end is not None and n.endswith(end[1]))
    return checkpoint.tensors.get(name) or checkpoint.tensors.get(next(names, ""))


def _described(tensor: TensorRef) -> str:
    return f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}"
