"""How work that takes long tells how far it is."""

from collections.abc import Callable
from functools import partial

#: Called with how much is done, and how much there is in all.
Progress = Callable[[int, int], None]
#: Called with the name of a step, how much of it is done, and how much there is in all.
StepProgress = Callable[[str, int, int], None]


def of_step(progress: StepProgress | None, name: str) -> Progress | None:
    """What one step reports to, where anybody listens."""
    return None if progress is None else partial(progress, name)
