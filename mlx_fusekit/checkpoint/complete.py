"""Whether a model's tensors look complete, by their names alone.

Only mlx-lm's class knows what a model needs, and a fuse of an MLX base does without mlx-lm; so this
only says when to ask it. It may be wrong where layers differ, as in hybrids.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from mlx_fusekit.checkpoint.header import TensorRef

_IN_LAYER = re.compile(r"(.*?\.)(\d+)\.(.+)")
_EMBEDDING = re.compile(r"emb|wte|\bword|tok")
_HEAD = re.compile(r"head|output|\bout")
_NORM = re.compile(r"norm|ln_|final_layer")


def lacking(
    tensors: Mapping[str, TensorRef], layers: int | None, *, head: bool = False
) -> str | None:
    """A tensor that seems to be missing, or what else does; None where nothing seems so.

    Args:
        tensors: of the model, as MLX writes them, or as Hugging Face has them.
        layers: how many the configuration says; None where it does not.
        head: whether the configuration says that the head is not the embedding.
    """
    found = (
        *_parts_of_quantized(tensors),
        *_in_layers(tensors, layers),
        *_around_layers(tensors, head),
    )
    return next(iter(found), None)


def _parts_of_quantized(tensors: Mapping[str, TensorRef]) -> Iterator[str]:
    """What packed weights need beside them, and what lies beside none."""
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        beside = {part for part in ("weight", "scales", "biases") if f"{module}.{part}" in tensors}
        if leaf == "weight" and tensor.dtype == "U32" and "scales" not in beside:
            yield f"{module}.scales"
        elif leaf == "scales" and "weight" not in beside:
            yield f"{module}.weight"
        elif leaf == "scales" and tensor.dtype != "U8" and "biases" not in beside:
            yield f"{module}.biases"


def _in_layers(names: Iterable[str], layers: int | None) -> Iterator[str]:
    """Whole layers, and what half of the layers have where one has nothing of its own instead."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := _IN_LAYER.fullmatch(name):
            found[match[1]][int(match[2])].add(match[3])
    for prefix, members in found.items():
        times = Counter(leaf for leaves in members.values() for leaf in leaves)
        common = {leaf for leaf, count in times.items() if 2 * count >= len(members)}
        for number, leaves in sorted(members.items()):
            if leaves < common:
                yield f"{prefix}{number}.{min(common - leaves)}"
    most = max(found, key=lambda prefix: len(found[prefix]), default=None)
    if layers is not None and (most is None or len(found[most]) < layers):
        held = found[most] if most is not None else {}
        gap = next(number for number in range(layers) if number not in held)
        yield f"layer {gap} of {layers}"


def _around_layers(names: Iterable[str], head: bool) -> Iterator[str]:
    outside = [name for name in names if not _IN_LAYER.fullmatch(name)]
    wanted = {"the embedding": _EMBEDDING, "the norm of the last layer": _NORM}
    if head:
        wanted["the head"] = _HEAD
    for what, pattern in wanted.items():
        if not any(pattern.search(name) for name in outside):
            yield what
