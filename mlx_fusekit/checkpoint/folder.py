"""A model folder, opened read-only: configuration, weights, quantization, the files beside them."""

import codecs
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from mlx_fusekit.checkpoint.belongings import ADAPTER_CONFIG_NAME, INDEX_NAME, check_files
from mlx_fusekit.checkpoint.decoded import loadable_folder
from mlx_fusekit.checkpoint.header import Header, TensorRef, read_header
from mlx_fusekit.checkpoint.json_text import LARGEST_TEXT, MOST_VALUES, cut, parse_json, shown
from mlx_fusekit.checkpoint.mistaken import mistaken_file
from mlx_fusekit.checkpoint.mlx_lm import load_lazily, logical_columns, quantization_block
from mlx_fusekit.checkpoint.plausible import check_layers
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.formats.specs import CODEBOOK_MODES, QuantSpec
from mlx_fusekit.reading import exists, read_bytes, resolve_inside

_WEIGHT_FILE = re.compile(r"model[^/\\:\0]*\.safetensors")
_NUMBERED = re.compile(r"(model.*?)(?:\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder as mlx-lm would load it.

    Attributes:
        folder: where it lies.
        config: ``config.json``.
        headers: of each weight file, by file name.
        tensors: every tensor of all weight files, by name.
        warnings: what is wrong with the folder without being an obstacle, one line each.
    """

    folder: Path
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    tensors: Mapping[str, TensorRef]
    warnings: tuple[str, ...] = ()
    converted = False
    beside: ClassVar[Mapping[str, TensorRef]] = MappingProxyType({})
    lost: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def open(cls, folder: Path, *, trust_remote_code: bool = False) -> "Checkpoint":
        """Open and validate a model folder; reads headers only.

        Where its index or the numbers of its files contradict what lies there, mlx-lm is asked
        whether that is a whole model.

        Args:
            trust_remote_code: whether model code that lies in the folder may run.

        Raises:
            CheckpointError: naming the file or tensor that is wrong, and the cure.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such model folder")
        if is_adapter(folder):
            raise CheckpointError(
                f"{folder}: is an adapter, not a model; give it as --adapter-path, and the model "
                "that it was trained on as --model"
            )
        check_files(folder, trust_remote_code=trust_remote_code)
        config = read_json_in(folder, "config.json")
        headers = {name: read_header(folder / name) for name in _weight_files(folder)}
        tensors: dict[str, TensorRef] = {}
        for name, header in headers.items():
            for tensor in header.tensors.values():
                if (other := tensors.get(tensor.name)) is not None:
                    raise CheckpointError(
                        f"{folder}: tensor {tensor.name!r} is in both {other.file.name} and "
                        f"{name}; remove the file that does not belong to this model"
                    )
                tensors[tensor.name] = tensor
        check_layers(config, len(tensors), folder / "config.json")
        layers = layer_count(config) or 0
        if layers > len(tensors):
            raise CheckpointError(
                f"{folder / 'config.json'}: has {layers} layers, and the weights are only "
                f"{len(tensors)} tensors; correct num_hidden_layers, or download the model again"
            )
        opened = cls(folder, config, MappingProxyType(headers), MappingProxyType(tensors))
        return replace(opened, warnings=_check_whole(opened, trust_remote_code))

    @property
    def files(self) -> dict[str, str]:
        """Name of the file that holds each tensor."""
        return {name: tensor.file.name for name, tensor in self.tensors.items()}

    @property
    def written_by_mlx(self) -> bool:
        """Whether MLX wrote every weight file, so that tensor names are module paths."""
        return all(header.metadata.get("format") == "mlx" for header in self.headers.values())

    @property
    def layer_count(self) -> int | None:
        """Number of decoder layers, when the configuration says it."""
        return layer_count(self.config)

    @cached_property
    def quantization_config(self) -> dict[str, Any]:
        """MLX's quantization block: defaults and per-module overrides; empty when there is none."""
        return quantization_block(self.config)

    @cached_property
    def quantized_modules(self) -> tuple[str, ...]:
        """Paths of all modules that have scales beside their weight."""
        return tuple(
            name.removesuffix(".scales")
            for name in self.tensors
            if name.endswith(".scales") and name.removesuffix("scales") + "weight" in self.tensors
        )

    def quantization(self, module: str, columns: int | None = None) -> QuantSpec | None:
        """How a module's weight is quantized, or None when it is not.

        What ``config.json`` says for this module, else its default where that agrees with the
        shapes of weight and scales, else what follows from the shapes, as mlx-lm does. Shapes give
        only the product of bits and group size, so they need the logical width of the weight,
        which mlx-lm's model class knows.

        Args:
            module: path of the module.
            columns: the width the caller takes it to have.

        Raises:
            CheckpointError: when shapes and configuration contradict each other.
        """
        weight = self.tensors.get(f"{module}.weight")
        scales = self.tensors.get(f"{module}.scales")
        if weight is None or scales is None:
            return None
        block = self.quantization_config
        override = block.get(module)
        if isinstance(override, dict):
            given = {key: value for key, value in override.items() if value is not None}
            spec = self._spec(module, {**_mode_defaults(given), **given})
        elif (default := _default(block)) is not None and _fits(default, weight, scales):
            spec = default
            if columns not in (None, spec.columns(weight.shape[-1])):
                # The default fits by its product only, or the caller is mistaken.
                spec = self._inferred(module, weight, scales) or default
        else:
            spec = self._inferred(module, weight, scales) or _only_candidate(weight, scales)
        self._check(module, spec, weight, scales, columns)
        return spec

    @cached_property
    def _logical_columns(self) -> dict[str, int]:
        return logical_columns(self.config)

    def _inferred(self, module: str, weight: TensorRef, scales: TensorRef) -> QuantSpec | None:
        """As ``mlx_lm.utils.infer_quant_config``; None where mlx-lm does not know the module."""
        columns = self._logical_columns.get(module)
        fitting = (s for s in _candidates(weight, scales) if s.columns(weight.shape[-1]) == columns)
        return next(fitting, None)

    def _spec(self, module: str, block: Mapping[str, Any]) -> QuantSpec:
        try:
            return QuantSpec(block["bits"], block["group_size"], block.get("mode") or "affine")
        except (KeyError, TypeError, ConfigurationError) as error:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: the quantization of {module} is none that MLX "
                f"has ({error})"
            ) from error

    def _check(
        self,
        module: str,
        spec: QuantSpec,
        weight: TensorRef,
        scales: TensorRef,
        columns: int | None,
    ) -> None:
        fits = _fits(spec, weight, scales) and columns in (None, spec.columns(weight.shape[-1]))
        biases = self.tensors.get(f"{module}.biases")
        if spec.affine:
            fits &= biases is not None
            fits &= biases is None or (biases.shape, biases.dtype) == (scales.shape, scales.dtype)
            fits &= scales.dtype in ("F16", "BF16", "F32")
        else:
            fits &= biases is None and scales.dtype == "U8"
        if not fits:
            raise CheckpointError(
                f"{weight.file}: {module} has weight {weight.dtype} {list(weight.shape)} and "
                f"scales {scales.dtype} {list(scales.shape)}, which is not {spec} as config.json "
                "says; correct its quantization in config.json"
            )


def layer_count(config: Mapping[str, Any]) -> int | None:
    """``num_hidden_layers``, also of a text model inside a multimodal configuration."""
    text = config.get("text_config")
    for block in (config, text if isinstance(text, dict) else {}):
        for key in ("num_hidden_layers", "n_layers", "n_layer"):
            if isinstance(block.get(key), int):
                return int(block[key])
    return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return not exists(folder / "config.json") and exists(folder / ADAPTER_CONFIG_NAME)


def read_json_in(
    folder: Path, name: str, *, most_bytes: int = LARGEST_TEXT, most_values: int = MOST_VALUES
) -> dict[str, Any]:
    """A JSON object from a file of a folder, which may be no link out of it; see :func:`read_json`.

    Raises:
        CheckpointError: also for such a link.
    """
    resolve_inside(folder, name)
    return read_json(folder / name, most_bytes=most_bytes, most_values=most_values)


def optional_json(
    folder: Path, name: str, *, most_bytes: int = LARGEST_TEXT, most_values: int = MOST_VALUES
) -> dict[str, Any] | None:
    """The same of a file that need not be there; None where it is not."""
    if not exists(folder / name):
        return None
    return read_json_in(folder, name, most_bytes=most_bytes, most_values=most_values)


def recipe_of(folder: Path) -> Mapping[str, Any]:
    """``fusekit.json`` of a model; empty without one, or of one that is not ours."""
    try:
        return optional_json(folder, RECIPE_NAME) or {}
    except CheckpointError:
        return {}


def read_json(
    path: Path, *, most_bytes: int = LARGEST_TEXT, most_values: int = MOST_VALUES
) -> dict[str, Any]:
    """A JSON object from a file that the user named.

    Args:
        path: of the file.
        most_bytes: how large it may be.
        most_values: how many values it may hold, in all.

    Raises:
        CheckpointError: when the file is missing, too large, or holds no JSON object.
    """
    try:
        content = read_bytes(path, most_bytes)
        if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise CheckpointError(
                f"{path}: begins with a byte order mark, with which mlx-lm does not read it; save "
                "it as UTF-8 without one"
            )
        value = parse_json(content, most_values)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing") from error
    except OSError as error:
        why = mistaken_file(path) or f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path}: {why}") from error
    except ValueError as error:
        why = mistaken_file(path) or f"not valid JSON ({error})"
        raise CheckpointError(f"{path}: {why}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def _weight_files(folder: Path) -> list[str]:
    """Names of the weight files: as for mlx-lm, all that lie there."""
    names = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not names:
        hint = _instead_of_weights(folder)
        if not hint and (fault := index_fault(folder, {})) is not None:
            hint = f" ({INDEX_NAME} {fault}); download the model again"
        raise CheckpointError(f"{folder}: no model*.safetensors file{hint}")
    for name in names:
        resolve_inside(folder, name)
    return names


def _instead_of_weights(folder: Path) -> str:
    """What lies there that may be weights, and the cure; empty for nothing."""
    for pattern, what in (
        ("[!.]*.bin", "is pickled"),
        ("[!.]*.npz", "is of an old mlx-lm"),
        ("[!.]*.safetensors", "has a name that mlx-lm does not look for"),
    ):
        for path in sorted(folder.glob(pattern)):
            return (
                f"; {path.name} {what}; download the original model in safetensors format, and "
                "convert it with mlx_lm.convert"
            )
    return ""


def index_fault(folder: Path, files: Mapping[str, str]) -> str | None:
    """What the index of a folder says that is not so; None where it is true, or there is none.

    Args:
        files: name of the file that holds each tensor.

    Raises:
        CheckpointError: for an index that is a link out of the folder, or names other files than
            weights beside it.
    """
    index = folder / INDEX_NAME
    if not exists(index):
        return None
    resolve_inside(folder, INDEX_NAME)
    try:
        weight_map = read_json(index).get("weight_map")
    except CheckpointError:
        return "is no JSON object"
    if not isinstance(weight_map, dict) or not weight_map:
        return "has no weight_map"
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
            raise CheckpointError(
                f"{index}: places tensor {shown(tensor)} in {shown(name)}; "
                "only files model*.safetensors beside the index are allowed"
            )
    named, held = set(weight_map.values()), set(files.values())
    wrong = [name for name in weight_map if name in files and weight_map[name] != files[name]]
    faults = {
        "names {}, which is not there": named - held,
        "leaves out {}": held - named,
        "lists {}, which no file holds": set(weight_map) - set(files),
        "leaves {} out": set(files) - set(weight_map),
        "places {} in another file than the one that holds it": wrong,
    }
    return next((words.format(_some(names)) for words, names in faults.items() if names), None)


def _missing_number(names: Collection[str]) -> str | None:
    """What is missing by the numbers of the files; None for nothing."""
    for name in names:
        if numbered := _NUMBERED.fullmatch(name):
            start, count = numbered[1], int(numbered[2])
            ends = (f"{n:05d}-of-{numbered[2]}.safetensors" for n in range(1, count + 1))
            missing = [f"{start}{end}" for end in ends if f"{start}{end}" not in names]
            if missing:
                return f"{_some(missing)} of {count} files is not there"
    return None


def refuse_unloadable(checkpoint: Checkpoint, told: str, *, trust_remote_code: bool) -> None:
    """Refuse a folder of which something is told, where mlx-lm cannot make a model of it.

    Raises:
        CheckpointError: with what is told, and mlx-lm's reason.
    """
    folder = checkpoint.folder
    try:
        weights = loadable_folder(folder, checkpoint.headers)
        load_lazily(folder, weights=weights, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        why = str(error).removeprefix(f"{folder}: ")
        raise CheckpointError(
            f"{told}, and {why}; download the model again, into an empty folder"
        ) from error


def _check_whole(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[str, ...]:
    """Warnings about an index that is out of date; mlx-lm does not read it.

    Raises:
        CheckpointError: when mlx-lm cannot make a model of the files that lie there.
    """
    folder, files = checkpoint.folder, checkpoint.files
    index = folder / INDEX_NAME
    if (fault := index_fault(folder, files)) is not None:
        told = f"{index}: {fault}"
    elif (missing := _missing_number(sorted(set(files.values())))) is not None:
        told = f"{folder}: {missing}"
    else:
        return ()
    refuse_unloadable(checkpoint, told, trust_remote_code=trust_remote_code)
    if fault is None:
        return ()
    return (
        f"{told}; it is out of date, and mlx-lm does not read it: the weights are taken from the "
        "files that lie there, which hold the whole model",
    )


def _some(names: Collection[str]) -> str:
    """The first of some names, and how many more there are."""
    first, more = cut(min(names)), len(names) - 1
    return f"{first} (and {more} more)" if more else first


def _default(block: Mapping[str, Any]) -> QuantSpec | None:
    """What a block says of all modules; None where that is nothing that MLX has.

    mlx-lm goes by the shapes then, as it does anyway.
    """
    bits, group_size = block.get("bits"), block.get("group_size")
    if type(bits) is not int or type(group_size) is not int:
        return None
    try:
        return QuantSpec(bits, group_size, block.get("mode") or "affine")
    except ConfigurationError:
        return None


def _mode_defaults(override: Mapping[str, Any]) -> dict[str, Any]:
    mode = override.get("mode")
    bits, group_size = CODEBOOK_MODES.get(mode if isinstance(mode, str) else "affine", (4, 64))
    return {"bits": bits, "group_size": group_size}


def _fits(spec: QuantSpec, weight: TensorRef, scales: TensorRef) -> bool:
    return (
        weight.dtype == "U32"
        and len(weight.shape) >= 2
        and weight.shape[:-1] == scales.shape[:-1]
        and weight.shape[-1] * 32 == scales.shape[-1] * spec.group_size * spec.bits
        and spec.affine == (scales.dtype != "U8")
    )


def _candidates(weight: TensorRef, scales: TensorRef) -> list[QuantSpec]:
    affine = [QuantSpec(b, g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
    codebook = [QuantSpec(bits, group, mode) for mode, (bits, group) in CODEBOOK_MODES.items()]
    return [spec for spec in affine + codebook if _fits(spec, weight, scales)]


def _only_candidate(weight: TensorRef, scales: TensorRef) -> QuantSpec:
    candidates = _candidates(weight, scales)
    if len(candidates) == 1:
        return candidates[0]
    known = " or ".join(str(spec) for spec in candidates) or "no format that MLX has"
    raise CheckpointError(
        f"{weight.file.parent / 'config.json'}: does not say how "
        f"{weight.name.removesuffix('.weight')} is quantized, and its shapes fit {known}; "
        "add it under 'quantization'"
    )
