"""What merging needs to know of a base model, whether its bytes or mlx-lm's classes provide it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mlx_fusekit.checkpoint.header import Header, TensorRef
from mlx_fusekit.formats.floats import FLOAT_DTYPES, Array
from mlx_fusekit.formats.specs import QuantSpec


class TensorSource(Protocol):
    """One tensor that can be read by rows; all axes but the last count as rows."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...

    def read_rows(self, first: int, last: int) -> Array:
        """Rows ``first`` to ``last`` (exclusive), as stored bits."""

    def held(self) -> "TensorSource":
        """The same tensor, ready to be read by rows many times.

        What mlx-lm computes is computed here, as a whole, and is in memory as long as the result.
        """


class BaseModel(Protocol):
    """A model whose tensors are named by the module paths that adapters use."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def converted(self) -> bool:
        """Whether mlx-lm makes the tensors of others, so that no file can stay as it is."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Of the weight files as they lie in the folder, by file name."""

    @property
    def quantization_config(self) -> Mapping[str, Any]:
        """MLX's quantization block: defaults and per-module overrides; empty without one."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the folder without being an obstacle, one line each."""

    @property
    def tensors(self) -> Mapping[str, TensorSource]: ...
    @property
    def beside(self) -> Mapping[str, TensorRef]:
        """Of a converted base, stored tensors that are no part of the text model.

        They are named as they are to be kept beside it.
        """

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of such tensors that a converted model would not load with."""

    @property
    def quantized_modules(self) -> tuple[str, ...]: ...
    @property
    def layer_count(self) -> int | None:
        """Number of decoder layers, when the configuration says it."""

    def quantization(self, module: str, columns: int | None = None) -> QuantSpec | None:
        """How the weight of a module is quantized, or None."""


def main_float_dtype(tensors: Iterable[TensorSource]) -> str:
    """The floating-point type that most of the tensors' bytes have; BF16 where none has one."""
    sizes = dict.fromkeys(FLOAT_DTYPES, 0)
    for tensor in tensors:
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if any(sizes.values()) else "BF16"
