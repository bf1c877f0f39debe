"""A model's shard in memory, as the model's own class in mlx-lm cuts it (tensor parallelism)."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from mlx_fusekit.checkpoint.mlx_lm import MLX_LM_ERRORS, one_line
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running.loading import load_lazily
from mlx_fusekit.running.model import RunningModel

#: What mlx-lm's attention layers call their number of heads, of queries and of keys.
_HEADS = (
    "n_heads",
    "num_heads",
    "num_attention_heads",
    "n_kv_heads",
    "num_kv_heads",
    "num_key_value_heads",
)


def run_shard(source: LocalFolder, name: str, group: mx.distributed.Group) -> RunningModel:
    """Load this rank's shard of a model, as ``mlx_lm.utils.sharded_load`` does.

    Unlike that it wants every weight to be there, and waits for no other rank.

    Args:
        source: folder of the whole model.
        name: of the model, in errors.
        group: the ranks that share it.

    Raises:
        CheckpointError: when mlx-lm cannot load it, or not shard it among so many.
    """
    model, config = load_lazily(source)
    if not hasattr(model, "shard"):
        kind = type(model).__module__.rpartition(".")[2]
        raise CheckpointError(
            f"{name}: mlx-lm's class for {kind} has no shard(), so mlx.launch cannot share it; "
            "time it without mlx.launch"
        )
    before = dict(_heads(model))
    many = f"{name}: mlx-lm cannot shard it among {group.size()} ranks"
    try:
        model.shard(group)
        mx.eval(model.parameters())
    except MLX_LM_ERRORS as error:
        raise CheckpointError(
            f"{many} ({one_line(error)}); start another number with mlx.launch"
        ) from error
    _check_heads(before, dict(_heads(model)), group.size(), many)
    model.eval()
    return RunningModel(model, source, config, exact=False)


def _heads(model: nn.Module) -> Iterator[tuple[tuple[str, str], int]]:
    """How many heads each layer has, by its path and the name of the attribute."""
    for path, module in model.named_modules():
        for key in _HEADS:
            if isinstance(number := vars(module).get(key), int):
                yield (path, key), number


def _check_heads(
    before: dict[tuple[str, str], int],
    after: dict[tuple[str, str], int],
    ranks: int,
    many: str,
) -> None:
    """Refuse heads that are not shared evenly: mlx-lm rounds, and computes something else.

    A class may give several ranks a copy of one head.
    """
    for place, heads in before.items():
        own = after.get(place, heads)
        copied = own == 1 and heads < ranks and ranks % heads == 0
        if own not in (heads, heads / ranks) and not copied:
            raise CheckpointError(
                f"{many}: {'.'.join(place)} is {heads}, which {ranks} does not divide; start "
                "another number with mlx.launch"
            )
