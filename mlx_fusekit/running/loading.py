"""Model folders into memory, as mlx-lm loads them."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_fusekit.checkpoint import mlx_lm
from mlx_fusekit.checkpoint.decoded import loadable_folder
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.stored_types import classes_of_floats
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running.exact import MEMORY_SHARE, may_run_in_float32, to_float32
from mlx_fusekit.running.model import RunningModel


def run_model(source: LocalFolder, *, memory_share: float = MEMORY_SHARE) -> RunningModel:
    """Load a model folder.

    Args:
        source: a folder as mlx-lm loads it, quantized or not.
        memory_share: on the CPU backend, weights become float32 when they then take at most this
            share of the machine's memory.

    Raises:
        CheckpointError: naming what is wrong with the folder.
    """
    model, config = load_lazily(source)
    exact = may_run_in_float32(model, memory_share) and to_float32(model)
    mx.eval(model.parameters())
    model.eval()
    return RunningModel(model, source, config, exact)


def load_lazily(source: LocalFolder) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model and its configuration; weights are read when they are first used.

    Raises:
        CheckpointError: naming what is wrong with the folder, with mlx-lm's words where it cannot
            load it.
    """
    checkpoint = Checkpoint.open(source.path, trust_remote_code=source.trusted)
    return mlx_lm.load_lazily(
        source.path,
        weights=loadable_folder(source.path, checkpoint.headers),
        trust_remote_code=source.trusted,
        classes=classes_of_floats(checkpoint),
    )
