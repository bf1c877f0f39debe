"""In which formats a fused model's weights are written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from mlx_fusekit.checkpoint.base import BaseModel, TensorSource, main_float_dtype
from mlx_fusekit.checkpoint.mlx_lm import quantizable_modules
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.formats.specs import AFFINE_BITS, QuantSpec


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """In which formats the user wants the model.

    Attributes:
        bits: width of the merged modules, or None for the base's.
        dequantize: write the whole model unquantized.
        dtype: safetensors dtype of a dequantized model; None keeps each module's own.
        quantize: format for every module that mlx-lm quantizes; None keeps the base's.
        widths: bits of single modules, by path, which have others than all that says.
        left_out: names of the base's tensors that are not written.
    """

    bits: int | None = None
    dequantize: bool = False
    dtype: str | None = None
    quantize: QuantSpec | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.bits is not None and self.dequantize:
            raise ConfigurationError("--bits and --dequantize exclude each other; drop one")
        if self.quantize is not None and self.dequantize:
            raise ConfigurationError("--quantize and --dequantize exclude each other; drop one")
        if self.quantize is not None and self.bits is not None:
            raise ConfigurationError(
                f"--bits {self.bits}: with --quantize the width is --q-bits; say that instead"
            )
        if self.dtype is not None and not self.dequantize:
            raise ConfigurationError("--dtype goes with --dequantize only; add that or drop it")
        if self.bits is not None and self.bits not in AFFINE_BITS:
            raise ConfigurationError(
                f"--bits {self.bits}: choose one of {', '.join(map(str, AFFINE_BITS))}"
            )


@dataclass(frozen=True)
class TargetSpecs:
    """Which quantization each module of a base is to get.

    Attributes:
        base: the model.
        options: what was asked for.
        quantized: of every module, by path, where the whole model is to be quantized.
    """

    base: BaseModel
    options: FormatOptions
    quantized: Mapping[str, QuantSpec] = field(default_factory=dict)

    @classmethod
    def of(cls, base: BaseModel, options: FormatOptions) -> Self:
        """Find the modules that mlx-lm would quantize, where that is asked for.

        Raises:
            ConfigurationError: where there is none.
        """
        if options.quantize is None:
            return cls(base, options)
        able = quantizable_modules(base.config, options.quantize)
        found = {module: spec for module, spec in able.items() if _has(base, module, options)}
        if not found:
            raise ConfigurationError(
                f"--q-group-size {options.quantize.group_size}: no module of {base.folder} has "
                "such columns; give a smaller one"
            )
        return cls(base, options, found)

    def target(self, module: str, spec: QuantSpec | None, columns: int) -> QuantSpec | None:
        """The quantization to write a module in, None for a dense weight.

        Args:
            module: its path.
            spec: the base's.
            columns: of its weight.

        Raises:
            ConfigurationError: for a width that they do not fit.
        """
        options = self.options
        if options.quantize is not None:
            spec = self.quantized.get(module)
        if spec is None or options.dequantize:
            return None
        bits = options.widths.get(module)
        if bits is None:
            bits = max(spec.bits, options.bits or 0)
        target = spec.with_bits(bits)
        if columns % target.group_size:
            raise ConfigurationError(
                f"{bits} bits: {module} has {columns} columns, no multiple of {target.group_size}; "
                "use --dequantize"
            )
        return target

    def written_dtype(
        self,
        sources: Mapping[str, TensorSource],
        spec: QuantSpec | None,
        target: QuantSpec | None,
    ) -> str:
        """Stored type of a module's dense weight, or of its scales and biases.

        Args:
            sources: the base's tensors by leaf name.
            spec: the base's quantization.
            target: the quantization to write.
        """
        if target is not None and not target.affine:
            return "U8"
        if self.options.dtype is not None:
            return self.options.dtype
        if spec is None:
            return sources["weight"].dtype
        return sources["scales"].dtype if spec.affine else weights_dtype(self.base)


def weights_dtype(base: BaseModel) -> str:
    """The floating-point type most of the unquantized bytes have."""
    tensors = base.tensors.items()
    return main_float_dtype(t for name, t in tensors if not name.endswith(".global_scale"))


def _has(base: BaseModel, module: str, options: FormatOptions) -> bool:
    name = f"{module}.weight"
    return name in base.tensors and name not in options.left_out
