"""What an entry of the table of architectures says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mlx_fusekit.gguf.models.changes import Change, Split
from mlx_fusekit.gguf.models.hyperparameters import Key
from mlx_fusekit.gguf.models.requirements import Check
from mlx_fusekit.gguf.models.rope import PLAIN, RopeStyle
from mlx_fusekit.gguf.models.settings import Settings

QKV = frozenset({"attn_q.bias", "attn_k.bias", "attn_v.bias"})
ATTENTION = QKV | {"attn_output.bias"}
MLP = frozenset({"ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"})
NORMS = frozenset({"attn_norm.bias", "ffn_norm.bias", "output_norm.bias"})
PROBABILITIES = frozenset({"exp_probs_b.bias"})
STEPS = frozenset({"ssm_dt.bias"})
GELU = frozenset({"gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"})


@dataclass(frozen=True, slots=True)
class Family:
    """How models of one type become GGUF.

    Attributes:
        gguf: member of ``gguf.MODEL_ARCH``.
        keys: hyperparameters, those of the rotary embedding apart.
        rope: what llama.cpp does with rotary embeddings.
        rope_dims: how many dimensions of a head are rotated.
        rotates_pairs: whether mlx-lm's class turns neighbouring rows unless ``rope_traditional``
            says otherwise, as the graph does (type NORM).
        biases: which biases its graph adds, by GGUF name without the block.
        splits: stored tensors that the file holds as several, by the end of their name.
        changes: what else differs from the stored tensors; those not named stay as they are.
        needs_head: whether it has no fallback to the embedding for a missing output matrix.
        may_lack_head: whether mlx-lm's class ties the embedding where no output matrix is stored.
        square_heads: whether it takes heads times their width to be the hidden size.
        activations: what ``hidden_act`` may be.
        checks: of settings that it may not be able to run.
        notes: for the table of supported architectures.
    """

    gguf: str
    keys: tuple[Key, ...]
    rope: RopeStyle = PLAIN
    rope_dims: Callable[[Settings], int] = lambda s: s.head_dim
    rotates_pairs: bool = False
    biases: frozenset[str] = frozenset()
    splits: Mapping[str, Split] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    needs_head: bool = False
    may_lack_head: bool = False
    square_heads: bool = False
    activations: frozenset[str] = frozenset({"silu", "swiglu"})
    checks: tuple[Check, ...] = ()
    notes: str = ""
