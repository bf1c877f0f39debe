"""What writing an adapter is asked for; it imports nothing heavy, for the command line."""

import math

from mlx_fusekit.errors import ConfigurationError

#: The forms that an adapter is written in.
FORMS = ("mlx", "peft")


def check_form(form: str) -> None:
    """Refuse a form that is not known.

    Raises:
        ConfigurationError: naming the flag.
    """
    if form not in FORMS:
        raise ConfigurationError(f"--to {form}: choose {' or '.join(FORMS)}")


def check_size(rank: int | None, energy: float | None) -> None:
    """Refuse sizes that no adapter has.

    Raises:
        ConfigurationError: naming the flag.
    """
    if rank is not None and energy is not None:
        raise ConfigurationError("--rank and --energy exclude each other; drop one")
    if rank is not None and rank < 1:
        raise ConfigurationError(f"--rank {rank}: must be 1 or more")
    if energy is not None and not (math.isfinite(energy) and 0 < energy <= 1):
        raise ConfigurationError(f"--energy {energy:g}: must be a share above 0 and at most 1")
