"""Carrying out one plan: computed row blocks and copied byte ranges, in parallel.

Memory is bounded by the workers' blocks (a few MiB each), whatever the size of the model; only a
base that mlx-lm converts on the fly holds one whole tensor at a time.
"""

from collections.abc import Callable
from pathlib import Path

from mlx_fusekit.fusing.one_pass import Output, write_models
from mlx_fusekit.merging.blocks import BLOCK_ELEMENTS
from mlx_fusekit.merging.plan import FusePlan, WeightStep
from mlx_fusekit.requantize.requantizer import Requantizer

#: Arrays of a block's size that one worker holds at most.
_BLOCK_COPIES = 3


def working_memory(plan: FusePlan, workers: int) -> int:
    """Bytes the work takes at its peak beyond the interpreter and the adapter, an estimate."""
    columns = [step.shape[2] for step in plan.steps if isinstance(step, WeightStep)]
    block = max(BLOCK_ELEMENTS, *columns, 0) * 4
    held = [tensor.nbytes for tensor in plan.base.tensors.values()] if plan.base.converted else []
    return workers * _BLOCK_COPIES * block + max(held, default=0)


def execute(
    plan: FusePlan,
    folder: Path,
    requantizer: Requantizer,
    *,
    workers: int | None = None,
    clone: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> bool:
    """Write the plan's weight files into a folder.

    Args:
        folder: existing and empty.
        requantizer: the strategy, ready to be used.
        workers: threads; the result does not depend on their number.
        clone: whether files of the base's layout may be cloned.
        progress: called with the number of bytes just done, from the calling thread.

    Returns:
        Whether any file was cloned.

    Raises:
        AdapterError: when a merged weight does not fit its stored type.
    """
    output = Output(plan, folder, requantizer)
    write_models([output], workers=workers, clone=clone, progress=progress)
    if output.failure is not None:
        raise output.failure
    return output.cloned
