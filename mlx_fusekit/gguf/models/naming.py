"""From the names that mlx-lm's classes give parameters to GGUF's."""

import re
from collections.abc import Iterable

import gguf

from mlx_fusekit.errors import CheckpointError

#: mlx-lm's names that are not those of Hugging Face, which gguf's map knows.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^language_model\.", ""),
        (r"(?:mlp|feed_forward)\.switch_mlp\.", "mlp.experts."),
        (
            r"^model\.(layers\.\d+)\.block_sparse_moe\.switch_mlp\.gate_proj\.",
            r"\1.feed_forward.experts.w1.",
        ),
        (
            r"^model\.(layers\.\d+)\.block_sparse_moe\.switch_mlp\.down_proj\.",
            r"\1.feed_forward.experts.w2.",
        ),
        (
            r"^model\.(layers\.\d+)\.block_sparse_moe\.switch_mlp\.up_proj\.",
            r"\1.feed_forward.experts.w3.",
        ),
        (r"\.e_score_correction_bias$", ".e_score_correction.bias"),
        (r"\.expert_bias$", ".expert_bias.bias"),
        (r"\.sinks$", ".sinks.weight"),
        (r"\.dt_bias$", ".dt_proj.bias"),
        (r"\.embed_q\.", ".k_b_proj."),
        (r"\.unembed_out\.", ".v_b_proj."),
    )
)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
#: Weights that llama.cpp multiplies element by element or runs through F32 kernels only.
_FLOAT32 = re.compile(
    r"(_norm\.weight|\.bias|ffn_gate_inp\.weight|conv1?d?\.weight|sinks\.weight)$"
)


class Names:
    """GGUF's names of one architecture's tensors."""

    def __init__(self, architecture: str, layers: int) -> None:
        """Prepare the map.

        Args:
            architecture: member of ``gguf.MODEL_ARCH``, as "QWEN2MOE".
            layers: of the model.

        Raises:
            CheckpointError: when the installed gguf package does not know the architecture.
        """
        if not hasattr(gguf.MODEL_ARCH, architecture):
            raise CheckpointError(
                f"the installed gguf package does not know the architecture {architecture}; "
                "upgrade it: pip install -U gguf"
            )
        self._map = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], layers)

    def of(self, stored: str) -> str | None:
        """The GGUF name of a stored tensor, or None where the architecture has none."""
        for pattern, replacement in _RENAMES:
            stored = pattern.sub(replacement, stored)
        name: str | None = self._map.get_name(stored, (".weight", ".bias"))
        return name


def needs_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp takes a tensor as F32 only, by its GGUF name and shape."""
    return len(shape) == 1 or _FLOAT32.search(name) is not None


def in_file_order(names: Iterable[str]) -> list[str]:
    """Names sorted: what stands before the blocks, the blocks by number, what follows them."""

    def place(name: str) -> tuple[int, int, str]:
        if (block := _BLOCK.fullmatch(name)) is not None:
            return 1, int(block[1]), block[2]
        return (2 if name.startswith("output") else 0), 0, name

    return sorted(names, key=place)


def leaf(name: str) -> str:
    """A GGUF name without its block, as ``attn_q.weight``."""
    block = _BLOCK.fullmatch(name)
    return name if block is None else block[2]
