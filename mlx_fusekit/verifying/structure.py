"""What a fused model's files must be like, checked against its base's and its adapter's.

From headers and bytes alone, a few megabytes at a time; nothing is run.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_fusekit.adapters.updates import Adapter
from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.checkpoint.beside_text import in_words, is_text_only
from mlx_fusekit.checkpoint.folder import Checkpoint, recipe_of
from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.checkpoint.sanitized import beside_text
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.formats.floats import FLOAT_DTYPES, STORAGE, to_float32
from mlx_fusekit.formats.specs import LEAVES, QuantSpec
from mlx_fusekit.merging.arithmetic import unchanged_rows
from mlx_fusekit.merging.blocks import WeightReader, logical_shape, row_blocks, weight_sources
from mlx_fusekit.progress import Progress

_ADAPTER_LEAVES = ("lora_a", "lora_b", "lora_A", "lora_B", "lora_magnitude_vector")
_READ_BYTES = 8 << 20
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check of a model's files.

    Attributes:
        name: what was asked for.
        ok: whether it holds.
        detail: what was found, one line.
    """

    name: str
    ok: bool
    detail: str


def check_no_adapter(fused: Checkpoint) -> Check:
    """Whether no tensor of a LoRA or DoRA layer is left."""
    left = [
        name
        for name in fused.tensors
        if any(part in _ADAPTER_LEAVES for part in name.split("."))
        or (name.endswith(".m") and f"{name[:-2]}.lora_a" in fused.tensors)
    ]
    return Check("no adapter layers left", not left, _listed(left, f"{len(fused.tensors)} tensors"))


def check_structure(
    base: BaseModel, adapter: Adapter, fused: Checkpoint, progress: Progress | None = None
) -> tuple[Check, ...]:
    """Check a fused model's files.

    A module may have been given another format than the base's if the fused model's config.json
    says so: more bits, none at all, any where the base is not quantized or ``fusekit.json`` says
    that the whole model was quantized. Its bytes cannot be compared then, and the checks say of how
    many modules that holds.

    Args:
        base: as :func:`mlx_fusekit.checkpoint.sanitized.open_base` opens it.
        adapter: bound to this base.
        fused: the folder to check.
        progress: called with bytes compared and in all.

    Raises:
        CheckpointError: when the fused model's shapes and its config.json contradict each other.
    """
    comparison = _Comparison.of(base, fused)
    changed = _compare_bytes(base, fused, comparison.same_layout, progress)
    return (
        check_no_adapter(fused),
        comparison.check(),
        _check_untouched(adapter, comparison, changed),
        _check_touched(base, adapter, comparison, changed),
    )


@dataclass(frozen=True)
class _Comparison:
    """Headers of base and fused model, side by side.

    Attributes:
        missing: tensors of the base that the fused model should have and has not.
        extra: tensors that the base has not.
        misshapen: tensors whose shape or type differs without leave.
        formats: "old -> new" of what was given another format, by module for its weight, by
            tensor name for others.
        same_layout: names of the tensors that have the same shape and type in both.
        left_out: tensors of the base beside its text model, which the fused model does not promise.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]
    formats: Mapping[str, str]
    same_layout: tuple[str, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, base: BaseModel, fused: Checkpoint) -> "_Comparison":
        """Compare all headers.

        Raises:
            CheckpointError: when shapes and config.json contradict each other.
        """
        formats, misshapen = _compare_formats(base, fused)
        reformatted = {f"{module}.{leaf}" for module in formats for leaf in LEAVES}
        stored = _stored(base)
        expected = {name for name in stored if name not in reformatted}
        found = {name for name in fused.tensors if name not in reformatted}
        same = []
        # A model that is dequantized as a whole may be given another type as a whole.
        free_type = bool(base.quantized_modules) and not fused.quantized_modules
        for name in sorted(expected & found):
            before, after = stored[name], fused.tensors[name]
            if (before.dtype, before.shape) == (after.dtype, after.shape):
                same.append(name)
            elif before.shape == after.shape and free_type and _both_float(before, after):
                formats[_owner(name)] = f"{before.dtype} -> {after.dtype}"
            else:
                misshapen.append(f"{name} {_layout(before)} -> {_layout(after)}")
        missing = expected - found
        left_out = _left_out(base, fused, missing)
        return cls(
            tuple(sorted(missing - left_out)),
            tuple(sorted(found - expected)),
            tuple(misshapen),
            formats,
            tuple(same),
            tuple(sorted(left_out)),
        )

    def check(self) -> Check:
        """Whether the tensors are those of the base."""
        faults = [
            f"{what}: {_listed(names, '')}"
            for what, names in (
                ("missing", self.missing),
                ("extra", self.extra),
                ("other shape or type", self.misshapen),
            )
            if names
        ]
        detail = f"{len(self.same_layout)} alike"
        kinds = Counter(self.formats.values()).most_common()
        if kinds:
            detail += ", in another format " + ", ".join(f"{n} ({kind})" for kind, n in kinds)
        if self.left_out:
            detail += f", text only: without {in_words(self.left_out)}"
        return Check("same tensors as the base", not faults, "; ".join([*faults, detail]))


def _stored(base: BaseModel) -> dict[str, TensorSource]:
    """All that is in the base's files, by the names a fused model has it under."""
    return {**base.tensors, **base.beside}


def _left_out(base: BaseModel, fused: Checkpoint, missing: Collection[str]) -> frozenset[str]:
    """What a fused model may lack, since it says in config.json that it is text only."""
    if not missing or not is_text_only(fused.config, base.config):
        return frozenset()
    try:
        return beside_text(base) & frozenset(missing)
    except CheckpointError:
        return frozenset()


def _compare_formats(base: BaseModel, fused: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """Modules whose quantization differs: allowed changes by module, and faults."""
    formats: dict[str, str] = {}
    faults = []
    anew = bool(recipe_of(fused.folder).get("quantize"))
    for module in dict.fromkeys((*base.quantized_modules, *fused.quantized_modules)):
        name = f"{module}.weight"
        if name not in base.tensors or name not in fused.tensors:
            continue  # reported as missing or extra
        before, after = base.quantization(module), fused.quantization(module)
        if before == after:
            continue
        weights = base.tensors[name], fused.tensors[name]
        shapes = [logical_shape(w, spec) for w, spec in zip(weights, (before, after), strict=True)]
        old, new = (
            str(spec or weight.dtype) for weight, spec in zip(weights, (before, after), strict=True)
        )
        formats[module] = f"{old} -> {new}"
        if shapes[0] != shapes[1] or len(weights[0].shape) != len(weights[1].shape):
            faults.append(f"{name} {list(shapes[0])} -> {list(shapes[1])}")
        elif not (anew or _may_become(before, after)):
            faults.append(f"{name} {old} -> {new}")
    return formats, faults


def _may_become(before: QuantSpec | None, after: QuantSpec | None) -> bool:
    """Whether a fused module may have this format: wider than the base's, of a float base any."""
    return before is None or after is None or after.bits > before.bits


def _compare_bytes(
    base: BaseModel, fused: Checkpoint, names: Sequence[str], progress: Progress | None
) -> set[str]:
    """Names of the tensors whose bytes differ."""
    total = sum(fused.tensors[name].nbytes for name in names)
    done, changed, stored = 0, set[str](), _stored(base)
    # In the order of the fused model's files, as disks like it.
    for name in sorted(names, key=lambda n: (fused.tensors[n].file, fused.tensors[n].start)):
        source, tensor = stored[name], fused.tensors[name]
        if not _equal_bytes(source.held(), tensor):
            changed.add(name)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    return changed


def _equal_bytes(first: TensorSource, second: TensorRef) -> bool:
    if not second.nbytes:
        return True
    columns = second.shape[-1] if second.shape else 1
    stride = columns * STORAGE[second.dtype].itemsize
    rows, step = second.nbytes // stride, max(1, _READ_BYTES // stride)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        blocks = [tensor.read_rows(start, end) for tensor in (first, second)]
        # As bytes: a NaN is not equal to itself.
        one, other = (np.ascontiguousarray(block).view(np.uint8) for block in blocks)
        if not np.array_equal(one, other):
            return False
    return True


def _check_untouched(adapter: Adapter, comparison: _Comparison, changed: set[str]) -> Check:
    touched = _touched_names(adapter)
    wrong = sorted(changed - touched)
    untouched = [name for name in comparison.same_layout if name not in touched]
    detail = f"{len(untouched)} tensors"
    if wrong:
        detail = f"{len(wrong)} of {len(untouched)} differ: {_listed(wrong, '')}"
    if skipped := set(comparison.formats) - {_owner(name) for name in touched}:
        detail += f"; {len(skipped)} in another format, not compared"
    return Check("untouched tensors byte-identical", not wrong, detail)


def _touched_names(adapter: Adapter) -> set[str]:
    leaves = {f"{module}.{leaf}" for module in adapter.weights for leaf in LEAVES}
    return leaves | set(adapter.parameters)


def _check_touched(
    base: BaseModel, adapter: Adapter, comparison: _Comparison, changed: set[str]
) -> Check:
    comparable = set(comparison.same_layout)
    still, skipped, merged = [], 0, 0
    for module in adapter.weights:
        names = {f"{module}.{leaf}" for leaf in LEAVES}
        if module in comparison.formats:
            skipped += 1
        elif names & changed:
            merged += 1
        elif f"{module}.weight" in comparable and not _changes_nothing(base, adapter, module):
            still.append(module)
    for name in adapter.parameters:
        if _owner(name) in comparison.formats:
            skipped += 1
        elif name in changed:
            merged += 1
        elif name in comparable and not _same_value(base, adapter, name):
            still.append(name)
    detail = f"{merged} changed"
    if still:
        detail = f"{len(still)} as in the base: {_listed(still, '')}; {detail}"
    if skipped:
        detail += f"; {skipped} in another format, not compared"
    without_effect = len(adapter.weights) + len(adapter.parameters) - merged - skipped - len(still)
    if without_effect:
        detail += f"; {without_effect} without effect"
    return Check("touched modules changed", not still, detail)


def _changes_nothing(base: BaseModel, adapter: Adapter, module: str) -> bool:
    """Whether merging leaves every row of a module's weight as it is, as of a fresh adapter."""
    update = adapter.weights[module]
    if update.is_zero:
        return True
    spec = base.quantization(module)
    sources = weight_sources(base, module, spec)
    reader = WeightReader.open(sources, spec)
    return all(
        bool(unchanged_rows(reader.read(rows)[1], update, rows).all())
        for rows in row_blocks(reader.shape)
    )


def _same_value(base: BaseModel, adapter: Adapter, name: str) -> bool:
    """Whether a full fine-tune left a parameter as it was."""
    new, old = adapter.parameters[name].tensor, base.tensors[name].held()
    rows = int(np.prod(new.shape[:-1], dtype=np.int64))
    first, second = (to_float32(t.read_rows(0, rows), t.dtype) for t in (new, old))
    return bool(np.array_equal(first, second))


def _owner(name: str) -> str:
    """The module whose weight a tensor is; other tensors are on their own."""
    return name.removesuffix(".weight")


def _both_float(*tensors: TensorSource) -> bool:
    return all(tensor.dtype in FLOAT_DTYPES for tensor in tensors)


def _layout(tensor: TensorSource) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _listed(names: Iterable[str], nothing: str) -> str:
    found = list(names)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more if found else nothing


def check_same_model(base: BaseModel, fused: Checkpoint, base_flag: str, fused_flag: str) -> None:
    """Refuse to compare what cannot be base and fused model.

    Raises:
        CheckpointError: when the architectures differ.
    """
    before, after = base.config.get("model_type"), fused.config.get("model_type")
    if before != after:
        raise CheckpointError(
            f"{fused_flag}: its architecture is {after}, but that of {base_flag} is {before}; "
            "name the base it was fused from, or compare any two models with --reference"
        )
