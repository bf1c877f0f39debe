"""What a fuse will do, decided from headers alone: which tensors are computed, which are copied."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlx_fusekit.adapters.updates import Adapter, FullUpdate, Update
from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.checkpoint.mlx_lm import computes_anew
from mlx_fusekit.checkpoint.writer import FileLayout, OutputTensor
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.formats.floats import FLOAT_DTYPES
from mlx_fusekit.formats.quantization import parts_of
from mlx_fusekit.formats.specs import LEAVES, QuantSpec
from mlx_fusekit.merging.blocks import logical_shape, weight_sources
from mlx_fusekit.merging.formats import FormatOptions, TargetSpecs, weights_dtype
from mlx_fusekit.merging.layout import lay_out


@dataclass(frozen=True)
class WeightStep:
    """Compute one module's weight: dequantize, merge, bring into the target format.

    Attributes:
        update: what the adapter does to it; None where only the format changes.
        source_spec: the base's quantization, None for a dense weight.
        target_spec: the quantization to write, None for a dense weight.
        dtype: of the dense weight written, or of the scales and biases.
        sources: the base's tensors by leaf name ("weight", "scales", "biases", "global_scale").
        outputs: the tensors written, by the same leaf names.
    """

    module: str
    update: Update | None
    source_spec: QuantSpec | None
    target_spec: QuantSpec | None
    dtype: str
    sources: Mapping[str, TensorSource]
    outputs: Mapping[str, OutputTensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Logical (experts, rows, columns) of the weight."""
        return logical_shape(self.sources["weight"], self.source_spec)


@dataclass(frozen=True)
class ParameterStep:
    """Write one unquantized parameter with a new value or dtype.

    Attributes:
        source: the new value.
    """

    source: TensorSource
    output: OutputTensor


Step = WeightStep | ParameterStep


@dataclass(frozen=True)
class FusePlan:
    """All that a fuse will do.

    Attributes:
        files: the weight files to be written.
        steps: what is computed, in the order of the files.
        unchanged: modules of the adapter whose update is zero.
        quantization: quantization block for ``config.json``, None when it stays as it is,
            empty when the model is no longer quantized.
    """

    base: BaseModel
    adapter: Adapter
    options: FormatOptions
    files: tuple[FileLayout, ...]
    steps: tuple[Step, ...]
    unchanged: tuple[str, ...]
    quantization: Mapping[str, object] | None

    @property
    def merged(self) -> tuple[WeightStep, ...]:
        """Steps that merge an update into a module's weight."""
        return tuple(s for s in self.steps if isinstance(s, WeightStep) and s.update is not None)

    @property
    def requantized(self) -> tuple[WeightStep, ...]:
        """Steps that bring a weight into a quantized format which it does not have."""
        weights = (step for step in self.steps if isinstance(step, WeightStep))
        return tuple(
            step
            for step in weights
            if step.target_spec is not None
            and (step.update is not None or step.source_spec != step.target_spec)
        )

    @property
    def parameters(self) -> int:
        """Numbers that the text model's tensors hold, quantized ones counted unpacked."""
        base = self.base
        skipped = parts_of(base.tensors, base.quantized_modules) | self.options.left_out
        quantized = frozenset(base.quantized_modules)
        count = 0
        for name, tensor in base.tensors.items():
            module = name.removesuffix(".weight")
            spec = base.quantization(module) if module in quantized else None
            if name not in skipped:
                count += math.prod(logical_shape(tensor, spec) if spec else tensor.shape)
        return max(1, count)

    @property
    def text_bytes(self) -> int:
        """Size of the text model's tensors."""
        tensors = (tensor for file in self.files for tensor in file.tensors)
        return sum(tensor.nbytes for tensor in tensors if tensor.name not in self.base.beside)

    @property
    def output_bytes(self) -> int:
        """Size of all weight files."""
        return sum(file.nbytes for file in self.files)

    @property
    def computed_bytes(self) -> int:
        """How much of that is computed and not taken over from the base."""
        changed = (step for step in self.steps if not self._takes_over(step))
        return sum(output.nbytes for step in changed for output in outputs_of(step))

    def _takes_over(self, step: Step) -> bool:
        """Whether a step writes a tensor as the base, which mlx-lm converts, gives it."""
        return (
            isinstance(step, ParameterStep)
            and step.source is self.base.tensors.get(step.output.name)
            and step.source.dtype == step.output.dtype
        )

    @property
    def base_bytes(self) -> int:
        """Size of the base's weight files."""
        return sum(path.stat().st_size for path in self.base.folder.glob("model*.safetensors"))


def outputs_of(step: Step) -> Iterable[OutputTensor]:
    """The tensors a step writes."""
    return step.outputs.values() if isinstance(step, WeightStep) else (step.output,)


def plan_fuse(base: BaseModel, adapter: Adapter, options: FormatOptions) -> FusePlan:
    """Decide what happens to every tensor of the base.

    Raises:
        ConfigurationError: when the options do not fit the base.
    """
    if options.bits is not None and not base.quantized_modules:
        raise ConfigurationError(
            f"--bits {options.bits}: the base is not quantized; drop the flag, or quantize the "
            f"whole model with --quantize --q-bits {options.bits}"
        )
    _check_left_out(adapter, options)
    targets = TargetSpecs.of(base, options)
    steps: list[Step] = []
    unchanged: list[str] = []
    for module, update in adapter.weights.items():
        step = _weight_step(base, module, update, targets)
        if update.is_zero and step.source_spec == step.target_spec and not options.dequantize:
            unchanged.append(module)
        else:
            steps.append(step)
    _check_bits(options, steps)
    steps += [
        _parameter_step(base.tensors[name], update, options)
        for name, update in adapter.parameters.items()
    ]
    if options.dequantize:
        steps += _dequantize_steps(base, steps, targets)
    if options.quantize is not None:
        steps += _quantize_steps(base, adapter, targets)
    _check_head(base, steps)
    return _lay_out(base, adapter, options, steps, tuple(unchanged))


def _check_left_out(adapter: Adapter, options: FormatOptions) -> None:
    touched = (*(f"{module}.weight" for module in adapter.weights), *adapter.parameters)
    if lost := next((name for name in touched if name in options.left_out), None):
        raise ConfigurationError(
            f"--text-only: the adapter changes {lost}, which is beside the text; drop the flag"
        )


def _check_bits(options: FormatOptions, steps: Iterable[Step]) -> None:
    """``--bits`` widens what is narrower; where nothing is, it was a mistake."""
    if options.bits is None:
        return
    specs = [s.source_spec for s in steps if isinstance(s, WeightStep) and s.source_spec]
    if not specs:
        raise ConfigurationError(
            f"--bits {options.bits}: the merged modules are not quantized, and stay as they are; "
            "drop the flag"
        )
    if all(spec.bits > options.bits for spec in specs):
        raise ConfigurationError(
            f"--bits {options.bits}: the merged modules have {min(s.bits for s in specs)} bits "
            "already, and the flag only widens; give a larger number or drop it"
        )


def _check_head(base: BaseModel, steps: Iterable[Step]) -> None:
    """A new ``lm_head`` cannot be stored where mlx-lm normalizes it whenever it loads the model."""
    for step in steps:
        name = next(iter(outputs_of(step))).name
        if not name.endswith("lm_head.weight"):
            continue
        if isinstance(step, WeightStep):
            merged = step.update is not None
            new = step.target_spec is None and (merged or step.source_spec is not None)
        else:
            merged = new = step.source is not base.tensors.get(name)
        if new and computes_anew(base.config, name):
            cure = "leave lm_head out of the adapter" if merged else "drop --dequantize"
            raise ConfigurationError(
                f"{base.folder}: mlx-lm normalizes an unquantized {name} of a "
                f"{base.config.get('model_type')} model whenever it loads it, so that the fused "
                f"model would not be what was merged; {cure}"
            )


def _weight_step(
    base: BaseModel, module: str, update: Update | None, targets: TargetSpecs
) -> WeightStep:
    spec = base.quantization(module, None if update is None else update.columns)
    sources = weight_sources(base, module, spec)
    target = targets.target(module, spec, logical_shape(sources["weight"], spec)[2])
    dtype = targets.written_dtype(sources, spec, target)
    step = WeightStep(module, update, spec, target, dtype, sources, {})
    return WeightStep(module, update, spec, target, dtype, sources, _outputs(step))


def _outputs(step: WeightStep) -> dict[str, OutputTensor]:
    stored = step.sources["weight"].shape
    _, _, columns = step.shape
    name = f"{step.module}.weight"
    if step.target_spec is None:
        return {"weight": OutputTensor(name, step.dtype, (*stored[:-1], columns))}
    spec = step.target_spec
    groups = (*stored[:-1], columns // spec.group_size)
    outputs = {
        "weight": OutputTensor(name, "U32", (*stored[:-1], spec.words(columns))),
        "scales": OutputTensor(f"{step.module}.scales", step.dtype, groups),
    }
    if spec.affine:
        outputs["biases"] = OutputTensor(f"{step.module}.biases", step.dtype, groups)
    if "global_scale" in step.sources and spec.mode == "nvfp4":
        source = step.sources["global_scale"]
        outputs["global_scale"] = OutputTensor(source.name, source.dtype, source.shape)
    return outputs


def _parameter_step(
    target: TensorSource, update: FullUpdate, options: FormatOptions
) -> ParameterStep:
    dtype = options.dtype or target.dtype
    return ParameterStep(update.tensor, OutputTensor(target.name, dtype, target.shape))


def _dequantize_steps(base: BaseModel, planned: list[Step], targets: TargetSpecs) -> Iterable[Step]:
    """Steps for all that the adapter does not touch, where it is quantized or of another type."""
    options = targets.options
    done = {output.name for step in planned for output in outputs_of(step)}
    quantized = set()
    for module in base.quantized_modules:
        quantized |= {f"{module}.{leaf}" for leaf in LEAVES}
        if f"{module}.weight" not in done | options.left_out:
            yield _weight_step(base, module, None, targets)
    main = weights_dtype(base)
    for name, tensor in base.tensors.items():
        skipped = name in done | quantized | options.left_out
        if skipped or options.dtype in (None, tensor.dtype):
            continue
        assert options.dtype is not None
        # What a 16-bit model keeps in float32 (a router's bias, say) is kept so on purpose.
        if tensor.dtype == main or (tensor.dtype in FLOAT_DTYPES and options.dtype == "F32"):
            yield ParameterStep(tensor, OutputTensor(name, options.dtype, tensor.shape))


def _quantize_steps(base: BaseModel, adapter: Adapter, targets: TargetSpecs) -> Iterable[Step]:
    """Steps for the modules that the adapter does not touch and that have another format."""
    for module in dict.fromkeys((*targets.quantized, *base.quantized_modules)):
        if module in adapter.weights or f"{module}.weight" in targets.options.left_out:
            continue
        step = _weight_step(base, module, None, targets)
        if step.source_spec != step.target_spec:
            yield step


def _lay_out(
    base: BaseModel,
    adapter: Adapter,
    options: FormatOptions,
    steps: list[Step],
    unchanged: tuple[str, ...],
) -> FusePlan:
    computed = {output.name: output for step in steps for output in outputs_of(step)}
    dropped = {
        source.name
        for step in steps
        if isinstance(step, WeightStep)
        for leaf, source in step.sources.items()
        if leaf not in step.outputs
    } | options.left_out
    added = _added_after(steps)
    steps = list(steps)

    def outputs_for(tensor: TensorSource) -> Iterable[OutputTensor]:
        if tensor.name in dropped:
            return
        if tensor.name in computed:
            yield computed[tensor.name]
        elif isinstance(tensor, TensorRef):
            yield OutputTensor(tensor.name, tensor.dtype, tensor.shape, tensor)
        else:
            output = OutputTensor(tensor.name, tensor.dtype, tensor.shape)
            steps.append(ParameterStep(tensor, output))
            yield output
        yield from added.get(tensor.name, ())

    files = lay_out(base, outputs_for, frozenset(computed))
    order = {tensor.name: place for place, tensor in enumerate(t for f in files for t in f.tensors)}
    steps.sort(key=lambda step: min(order[output.name] for output in outputs_of(step)))
    return FusePlan(
        base,
        adapter,
        options,
        files,
        tuple(steps),
        unchanged,
        _quantization_block(base, steps, options),
    )


def _added_after(steps: Iterable[Step]) -> dict[str, list[OutputTensor]]:
    """Tensors the base does not have (scales of a dense weight, say), by their predecessor."""
    return {
        step.sources["scales" if "scales" in step.sources else "weight"].name: [
            output for leaf, output in step.outputs.items() if leaf not in step.sources
        ]
        for step in steps
        if isinstance(step, WeightStep)
    }


def _quantization_block(
    base: BaseModel, steps: list[Step], options: FormatOptions
) -> Mapping[str, object] | None:
    if options.dequantize:
        return {}
    if options.quantize is not None:
        found = {module: base.quantization(module) for module in base.quantized_modules}
        found |= {s.module: s.target_spec for s in steps if isinstance(s, WeightStep)}
        own = {m: s.as_config() for m, s in found.items() if s and s != options.quantize}
        return {**options.quantize.as_config(), **own}
    current = base.quantization_config
    widened = {
        step.module: step.target_spec.as_config()
        for step in steps
        if isinstance(step, WeightStep)
        and step.target_spec is not None
        and step.target_spec != step.source_spec
    }
    if not current and base.quantized_modules:
        # The base left it to the shapes; mlx-lm wants to be told.
        specs = {module: base.quantization(module) for module in base.quantized_modules}
        first = next(spec for spec in specs.values() if spec)
        current = {
            **first.as_config(),
            **{m: s.as_config() for m, s in specs.items() if s and s != first},
        }
        return {**current, **widened}
    told = not current or base.config.get("quantization") is not None
    if not widened and not base.converted and told:
        return None
    foreign = base.config.get("quantization_config")
    fp8 = isinstance(foreign, dict) and foreign.get("quant_method") == "fp8"
    if fp8 and not base.quantized_modules:
        return {}  # mlx-lm made 16-bit floats of it
    return {**current, **widened} if current or widened else None
