"""What stored tensors become in a GGUF file, beyond new names: a family's entries say it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.gguf.models.settings import Settings

Indices: TypeAlias = npt.NDArray[np.int64]
#: In which order a file holds rows or columns, as indices into the stored ones; None for theirs.
Order: TypeAlias = Callable[[Settings], Indices | None]
#: Which rows of a stored matrix belong to which tensors of its block, by their names in it.
Split: TypeAlias = Callable[[Settings], Mapping[str, Indices]]


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to the tensors of some names, in this order.

    Attributes:
        names: in the file, without the block, as ``attn_q.weight``; a ``*`` stands for anything.
        rows: the order of the first dimension.
        columns: the order of the last dimension.
        values: what is computed of the values, one by one.
        squeezed: a dimension of one that mlx-lm keeps and llama.cpp does without.
    """

    names: tuple[str, ...] = ()
    rows: Order | None = None
    columns: Order | None = None
    values: Callable[[Float32], Float32] | None = None
    squeezed: int | None = None


def add_one(weights: Float32) -> Float32:
    """A norm's weights as llama.cpp multiplies by them."""
    return weights + np.float32(1)


def interleaved_rows(heads: int, head_dim: int) -> Indices:
    """Rows of a query or key projection in the order of pairs that lie side by side.

    Hugging Face's rotary embedding turns row ``i`` of a head with row ``i + head_dim / 2``;
    llama.cpp's of type NORM turns ``2 i`` with ``2 i + 1``.
    """
    rows = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
    return rows.transpose(0, 2, 1).reshape(-1)


def _interleaved(settings: Settings, heads: int) -> Indices | None:
    traditional = settings.used.get("rope_traditional")
    return None if traditional else interleaved_rows(heads, settings.head_dim)


#: Of graphs whose rotary embedding is of type NORM, where mlx-lm's class by default turns rows half
#: a head apart.
INTERLEAVED = (
    Change(("attn_q.weight", "attn_q.bias"), rows=lambda s: _interleaved(s, s.heads)),
    Change(("attn_k.weight", "attn_k.bias"), rows=lambda s: _interleaved(s, s.key_value_heads)),
)
#: Of classes that add one to stored norm weights when they run.
PLUS_ONE = (Change(("*_norm.weight",), values=add_one),)
SHARED_EXPERT_GATE = Change(("ffn_gate_inp_shexp.weight",), squeezed=0)
SHORT_CONVOLUTION = Change(("shortconv.conv.weight",), squeezed=2)
