"""What measuring is asked for; it imports nothing heavy, for the command line."""

import math

from mlx_fusekit.errors import ConfigurationError

#: About how many tokens ``verify`` runs, by default.
MAX_TOKENS = 4096
#: The mean KL, in nats a token, up to which a model counts as its reference where no bound is asked
#: for; ``auto`` widens modules above it.
DEFAULT_MAX_KL = 0.1


def check_max_kl(max_kl: float) -> None:
    """The one rule for a bound on the mean KL divergence, in nats a token.

    Raises:
        ConfigurationError: when it is no finite number, or below 0.
    """
    if not (math.isfinite(max_kl) and max_kl >= 0):
        raise ConfigurationError(f"--max-kl {max_kl}: must be a number of nats, 0 or more")
