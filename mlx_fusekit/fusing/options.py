"""What the user asks a fuse for, and what of it contradicts itself."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_fusekit.adapters.combination import Combination
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.formats.floats import DTYPE_NAMES
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.merging.formats import FormatOptions
from mlx_fusekit.reading import exists
from mlx_fusekit.requantize.options import (
    CALIBRATION_TOKENS,
    DEFAULT_MAX_GROWTH,
    CalibrationOptions,
)
from mlx_fusekit.requantize.strategy import STRATEGIES, Strategy
from mlx_fusekit.texts.data import check_text
from mlx_fusekit.verifying.options import DEFAULT_MAX_KL, check_max_kl

#: The file of --export-gguf, seen from --save-path.
GGUF_NAME = "model.gguf"


@dataclass(frozen=True)
class FuseOptions:
    """How to fuse; the attributes are the arguments of :func:`mlx_fusekit.fuse`.

    Raises:
        ConfigurationError: when they contradict each other, naming the flag.
    """

    requantize: str = "auto"
    bits: int | None = None
    dequantize: bool = False
    dtype: str | None = None
    quantize: bool = False
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str | None = None
    calibration: str | Path | None = None
    calibration_tokens: int = CALIBRATION_TOKENS
    max_kl: float | None = None
    max_growth: float | None = None
    target_bpw: float | None = None
    memory: int | str | None = None
    resume: bool = True
    seed: int = 0
    combine: str = "sum"
    density: float | None = None
    combine_seed: int = 0
    again: bool = False
    text_only: bool = False
    overwrite: bool = False
    export_gguf: bool = False
    gguf_path: str | Path = GGUF_NAME
    outtype: str = "auto"
    upload_repo: str | None = None

    def __post_init__(self) -> None:
        if self.requantize not in STRATEGIES:
            raise ConfigurationError(
                f"--requantize {self.requantize}: choose {', '.join(STRATEGIES)}"
            )
        self._check_calibration()
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            raise ConfigurationError(f"--dtype {self.dtype}: choose {', '.join(DTYPE_NAMES)}")
        if self.outtype != "auto" and not self.export_gguf:
            raise ConfigurationError(
                f"--outtype {self.outtype} is for the file of --export-gguf; add that, or drop it"
            )
        if Path(self.gguf_path) != Path(GGUF_NAME) and not self.export_gguf:
            raise ConfigurationError(
                f"--gguf-path {self.gguf_path} names the file of --export-gguf; add that, or drop "
                "it"
            )
        _ = self.formats, self.combination, self.calibrating

    def _check_calibration(self) -> None:
        given = {
            "--calibration": self.calibration,
            "--max-kl": self.max_kl,
            "--max-growth": self.max_growth,
            "--target-bpw": self.target_bpw,
            "--memory": self.memory,
        }
        flag = next((flag for flag, value in given.items() if value is not None), None)
        if flag is not None and not self.strategy.calibrates:
            able = [name for name, strategy in STRATEGIES.items() if strategy.calibrates]
            raise ConfigurationError(
                f"{flag} goes with --requantize {' or '.join(able)}; drop it, or {self.requantize}"
            )
        if self.max_growth is not None and not self.strategy.widens:
            able = [name for name, strategy in STRATEGIES.items() if strategy.widens]
            raise ConfigurationError(
                f"--max-growth goes with --requantize {' or '.join(able)}, which alone makes "
                "modules wider; drop it"
            )
        self._check_budget()
        if self.max_kl is not None:
            check_max_kl(self.max_kl)
        if self.max_growth is not None and not (
            math.isfinite(self.max_growth) and self.max_growth >= 0
        ):
            raise ConfigurationError(f"--max-growth {self.max_growth}: must be a share, 0 or more")
        if self.calibration_tokens < 1:
            raise ConfigurationError(
                f"--calibration-tokens {self.calibration_tokens}: must be 1 or more"
            )
        if self._text is not None:
            if not exists(self._text):
                raise ConfigurationError(
                    f"--calibration {self.calibration}: there is no such file or folder"
                )
            check_text(self._text)

    def _check_budget(self) -> None:
        asked = self.target_bpw
        if asked is None:
            return
        if not (math.isfinite(asked) and asked > 0):
            raise ConfigurationError(f"--target-bpw {asked}: must be a number of bits above 0")
        flag = f"--target-bpw {asked:g}"
        if not self.quantize:
            raise ConfigurationError(f"{flag}: goes with --quantize; add that, or drop it")
        if not self.strategy.widens:
            raise ConfigurationError(
                f"{flag}: goes with --requantize auto, which alone chooses widths; drop one"
            )
        if self.max_kl is not None or self.max_growth is not None:
            other = "--max-kl" if self.max_kl is not None else "--max-growth"
            raise ConfigurationError(f"{flag} and {other} both say how large it becomes; drop one")

    def refuse_calibration(self) -> None:
        """Refuse settings of a calibration where nothing is re-quantized, and so calibrated.

        A bound on the KL is reported as not measured instead.

        Raises:
            ConfigurationError: naming the flag.
        """
        given = {
            "--calibration": self.calibration is not None,
            "--calibration-tokens": self.calibration_tokens != CALIBRATION_TOKENS,
            "--max-growth": self.max_growth is not None,
            "--target-bpw": self.target_bpw is not None,
            "--memory": self.memory is not None,
        }
        flag = next((flag for flag, asked in given.items() if asked), None)
        if flag is not None:
            raise ConfigurationError(
                f"{flag}: nothing is re-quantized here, so nothing is calibrated; drop the flag"
            )

    @property
    def strategy(self) -> Strategy:
        """The strategy that was asked for."""
        return STRATEGIES[self.requantize]

    @property
    def rounding_will_do(self) -> bool:
        """Whether another strategy may stand in, since nothing asks for this one's work."""
        asked = (self.max_kl, self.calibration, self.target_bpw)
        return self.strategy.otherwise is not None and all(value is None for value in asked)

    @property
    def combination(self) -> Combination:
        """How several adapters are combined."""
        return Combination(self.combine, self.density, self.combine_seed)

    @property
    def formats(self) -> FormatOptions:
        """In which formats to write."""
        dtype = None if self.dtype is None else DTYPE_NAMES[self.dtype]
        return FormatOptions(self.bits, self.dequantize, dtype, self._whole_format)

    @property
    def _whole_format(self) -> QuantSpec | None:
        """What all of the model is to be quantized to."""
        given = {
            "--q-bits": self.q_bits,
            "--q-group-size": self.q_group_size,
            "--q-mode": self.q_mode,
        }
        if not self.quantize:
            flag = next((flag for flag, value in given.items() if value is not None), None)
            if flag is not None:
                raise ConfigurationError(f"{flag} goes with --quantize; add that, or drop it")
            return None
        try:
            return QuantSpec.of_mode(self.q_mode or "affine", self.q_bits, self.q_group_size)
        except ConfigurationError as error:
            raise ConfigurationError(f"--q-bits, --q-group-size or --q-mode: {error}") from error

    @property
    def calibrating(self) -> CalibrationOptions:
        """How to calibrate."""
        bound, growth = self.max_kl, self.max_growth
        # Whoever says how wide the whole model is to be has it so, unless a bound asks for more.
        as_told = self.quantize and growth is None
        if self.strategy.widens and bound is None and not as_told:
            bound = DEFAULT_MAX_KL
            growth = DEFAULT_MAX_GROWTH if growth is None else growth
        return CalibrationOptions(
            file=self._text,
            tokens=self.calibration_tokens,
            seed=self.seed,
            max_kl=bound,
            max_kl_asked=self.max_kl is not None,
            widen=self.strategy.widens,
            max_growth=growth,
            target_bpw=self.target_bpw,
            memory=None if self.memory is None else _bytes(self.memory),
        )

    @property
    def _text(self) -> Path | None:
        return None if self.calibration is None else Path(self.calibration).expanduser()


def _bytes(size: int | str) -> int:
    """A size in bytes, as ``8GB``, ``7.5 GiB`` or a number.

    Raises:
        ConfigurationError: for what is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(size), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigurationError(f"--memory {size}: must be a size, such as 8GB")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
