"""Which quantized formats MLX has, and what a module in one is stored as."""

from dataclasses import dataclass
from typing import Self

from mlx_fusekit.errors import ConfigurationError

AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
#: The only (bits, group size) each non-affine mode has.
CODEBOOK_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
#: All modes.
Q_MODES = ("affine", *CODEBOOK_MODES)
#: What affine has where nothing else is said.
_USUAL_AFFINE = (4, 64)

#: What lies beside a module's quantized weight, by the last part of the tensors' names, and all of
#: what the weight is stored as.
SCALE_LEAVES = ("scales", "biases", "global_scale")
LEAVES = ("weight", *SCALE_LEAVES)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one module's weight is quantized: ``bits`` a code, ``group_size`` codes a scale."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str):
            raise ConfigurationError(f"MLX has no quantization of the mode {self.mode!r}")
        if self.mode == "affine":
            valid = self.bits in AFFINE_BITS and self.group_size in AFFINE_GROUPS
        else:
            valid = CODEBOOK_MODES.get(self.mode) == (self.bits, self.group_size)
        if not valid:
            raise ConfigurationError(
                f"MLX has no quantization {self}: affine takes bits {_listed(AFFINE_BITS)} and "
                f"group size {_listed(AFFINE_GROUPS)}; mxfp4 is 4 bits group 32, mxfp8 8 bits "
                "group 32, nvfp4 4 bits group 16"
            )

    @classmethod
    def of_mode(
        cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None
    ) -> Self:
        """A mode with MLX's own width and group size where none is given.

        Raises:
            ConfigurationError: for what MLX does not have.
        """
        usual = CODEBOOK_MODES.get(mode, _USUAL_AFFINE)
        width = usual[0] if bits is None else bits
        return cls(width, usual[1] if group_size is None else group_size, mode)

    def with_bits(self, bits: int) -> "QuantSpec":
        """The affine format of another width whose groups are as large, where it has such."""
        if bits == self.bits:
            return self
        return QuantSpec(bits, self.group_size if self.group_size in AFFINE_GROUPS else 32)

    @property
    def affine(self) -> bool:
        """Whether values are ``scale * code + bias`` (else a codebook times a scale)."""
        return self.mode == "affine"

    def columns(self, words: int) -> int:
        """Logical columns of a row of ``words`` packed 32-bit words."""
        return words * 32 // self.bits

    def words(self, columns: int) -> int:
        """Packed 32-bit words of a row of ``columns``."""
        return columns * self.bits // 32

    def as_config(self) -> dict[str, int | str]:
        """The form in which ``config.json`` holds it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        if self.affine:
            return f"{self.bits}-bit group {self.group_size}"
        return self.mode


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in numbers)
