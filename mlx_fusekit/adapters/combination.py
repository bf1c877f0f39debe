"""In which way several adapters become one update; imports nothing heavy, for the command line."""

import math
from dataclasses import dataclass
from typing import Any

from mlx_fusekit.errors import ConfigurationError

#: The ways, and what each does, for people.
METHODS = {
    "sum": "the weighted sum of the updates",
    "ties": "TIES: of each update the largest elements, where they agree in sign their mean",
    "dare": "DARE: of each update a random share of elements, made larger, summed",
    "dare-ties": "DARE's share of elements, and TIES' mean of those that agree in sign",
}
#: Share of elements that stay where none is asked for.
DEFAULT_DENSITY = 0.5


@dataclass(frozen=True, slots=True)
class Combination:
    """How several adapters are combined.

    Attributes:
        method: a key of :data:`METHODS`.
        density: share of the elements of each update that stay, above 0 and at most 1; None for
            :data:`DEFAULT_DENSITY`, or of a sum, which keeps all.
        seed: of DARE's choice of elements.

    Raises:
        ConfigurationError: when they contradict each other, naming the flag.
    """

    method: str = "sum"
    density: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigurationError(f"--combine {self.method}: choose {', '.join(METHODS)}")
        if self.density is None:
            return
        if self.is_sum:
            raise ConfigurationError(
                f"--density {self.density:g}: a sum keeps all elements; add --combine "
                f"{', '.join(m for m in METHODS if m != 'sum')}, or drop it"
            )
        if not (math.isfinite(self.density) and 0 < self.density <= 1):
            raise ConfigurationError(
                f"--density {self.density:g}: must be a share above 0 and at most 1"
            )

    def check_count(self, adapters: int) -> None:
        """Refuse to combine a single adapter.

        Raises:
            ConfigurationError: naming the flag.
        """
        if adapters < 2 and not self.is_sum:
            raise ConfigurationError(
                f"--combine {self.method}: combines several adapters, and one was given; name "
                "more with --adapter-path, or drop it"
            )

    @property
    def is_sum(self) -> bool:
        """Whether it is the plain weighted sum."""
        return self.method == "sum"

    @property
    def draws(self) -> bool:
        """Whether elements are chosen at random, and not by size."""
        return self.method.startswith("dare")

    @property
    def elects(self) -> bool:
        """Whether only elements of the elected sign count."""
        return self.method.endswith("ties")

    @property
    def share(self) -> float:
        """Of the elements of each update that stay."""
        return DEFAULT_DENSITY if self.density is None else self.density

    def as_json(self) -> dict[str, Any] | None:
        """For reports and ``fusekit.json``; None of a sum."""
        if self.is_sum:
            return None
        return {
            "method": self.method,
            "density": self.share,
            "seed": self.seed if self.draws else None,
        }


#: The weighted sum.
SUM = Combination()
