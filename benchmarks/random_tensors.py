"""Random values for the tensors of a checkpoint or adapter, in pieces."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from tensors import Tensor

_PIECE_BYTES = 16 << 20


def values(tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor in pieces; the same name, seed and shape give the same bytes."""
    module, _, leaf = tensor.name.rpartition(".")
    # Scales and biases of a module must fit each other, so they share their seed.
    seed = module if leaf in ("scales", "biases") else tensor.name
    rng = np.random.default_rng(list((seed + tensor.seed).encode()))
    if leaf in ("scales", "biases"):
        yield _grid(tensor.shape, leaf, rng)
    elif tensor.dtype == "BF16":
        yield _as_bfloat16(1 + 0.1 * rng.standard_normal(tensor.shape, np.float32)).tobytes()
    elif tensor.dtype == "F32":
        yield _low_rank_factor(tensor, rng).tobytes()
    else:
        for start in range(0, tensor.nbytes, _PIECE_BYTES):
            yield rng.bytes(min(_PIECE_BYTES, tensor.nbytes - start))


def _grid(shape: tuple[int, ...], leaf: str, rng: np.random.Generator) -> bytes:
    """Scales of either sign, or the biases that centre the codes of these scales on zero."""
    scales = rng.uniform(0.003, 0.006, shape).astype(np.float32)
    scales *= rng.choice(np.array([-1, 1], np.float32), shape)
    stored = _as_bfloat16(scales)
    if leaf == "biases":
        stored = _as_bfloat16(-8 * (stored.astype(np.uint32) << 16).view(np.float32))
    return stored.tobytes()


def _low_rank_factor(tensor: Tensor, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """As after a short training: ``lora_a`` as initialized, ``lora_b`` a little off zero."""
    if tensor.name.endswith("lora_a"):
        bound = 1 / math.sqrt(max(tensor.shape))  # the columns
        return rng.uniform(-bound, bound, tensor.shape).astype(np.float32)
    return (2e-3 * rng.standard_normal(tensor.shape)).astype(np.float32)


def _as_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return ((np.ascontiguousarray(values, np.float32).view(np.uint32) + 0x8000) >> 16).astype(
        np.uint16
    )
