"""From an adapter's folder to what reads its format."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlx_fusekit.adapters.ignoring import without_ignored
from mlx_fusekit.adapters.mlx_lm import MlxLmAdapter
from mlx_fusekit.adapters.mlx_lm_settings import AdapterSettings
from mlx_fusekit.adapters.peft import PeftAdapter
from mlx_fusekit.adapters.peft_names import is_of_peft
from mlx_fusekit.adapters.peft_settings import PeftSettings
from mlx_fusekit.adapters.updates import AdapterFolder
from mlx_fusekit.checkpoint.belongings import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS,
    PEFT_WEIGHTS,
    is_hidden,
)
from mlx_fusekit.checkpoint.folder import read_json_in
from mlx_fusekit.checkpoint.header import Header, read_header
from mlx_fusekit.errors import AdapterError, CheckpointError, ConfigurationError
from mlx_fusekit.reading import exists, is_folder, resolve_inside

_PICKLED = ("*.npz", "*.bin", "*.pt", "*.pth", "*.pkl")


def open_adapter(
    folder: Path, *, scale: float | None = None, ignore: Sequence[str] = ()
) -> AdapterFolder:
    """Open an adapter's folder and check what can be checked without its base.

    What its tensors are decides whether it is mlx-lm's or PEFT's: others write the tensors of one
    beside the settings of both.

    Args:
        folder: the adapter's.
        scale: of its update, taken instead of the recorded one.
        ignore: patterns of modules to leave out, see
            :func:`~mlx_fusekit.adapters.ignoring.without_ignored`.

    Raises:
        ConfigurationError: for a scale that is no finite number.
        AdapterError: naming the file or tensor that is wrong, and the cure.
    """
    if scale is not None and not math.isfinite(scale):
        raise ConfigurationError(f"--scale {scale:g}: must be a finite number")
    if not is_folder(folder):
        raise AdapterError(f"{folder}: there is no such adapter folder")
    config = MappingProxyType(_read_config(folder))
    path, file = folder / ADAPTER_CONFIG_NAME, _weights(folder, config)
    peft = PeftSettings(path, config, scale)
    if file is None:
        peft.check()  # prompts and others have files of other names
        raise AdapterError(
            f"{folder / PEFT_WEIGHTS}: the file is missing; copy it there, or download the "
            "adapter again"
        )
    header = _header(folder, file)
    kept, ignored = without_ignored(header, ignore)
    if any(map(is_of_peft, header.tensors)):
        return PeftAdapter.of(peft, kept, ignored)
    if file == PEFT_WEIGHTS:
        peft.check()
    return MlxLmAdapter.of(AdapterSettings(path, config, scale), kept, ignored)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG_NAME
    if not exists(path) and exists(folder / "config.json"):
        raise AdapterError(f"{folder}: is a model, not an adapter; give the adapter's folder")
    if not exists(path):
        raise AdapterError(
            f"{path}: the file is missing; it says with which scale the adapter was trained, "
            "so copy it from the training folder"
        )
    try:
        return read_json_in(folder, ADAPTER_CONFIG_NAME)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def _weights(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Name of the file of weights; None where a PEFT adapter has none.

    Raises:
        AdapterError: for what lies there instead.
    """
    for name in (ADAPTER_WEIGHTS, PEFT_WEIGHTS):
        if exists(folder / name):
            return name
    wanted = PEFT_WEIGHTS if "peft_type" in config else ADAPTER_WEIGHTS
    pickled = next((p for s in _PICKLED for p in folder.glob(s) if not is_hidden(p)), None)
    if pickled is not None:
        by = "PEFT" if "peft_type" in config else "mlx-lm"
        raise AdapterError(
            f"{pickled}: pickled or old-format weights are never opened; save the adapter again "
            f"with a current {by}, as {wanted}"
        )
    if any(folder.glob("adapter_model-*-of-*.safetensors")):
        raise AdapterError(
            f"{folder}: has its weights in several files; save the adapter again as one "
            f"{PEFT_WEIGHTS}"
        )
    if "peft_type" in config:
        return None
    checkpoint = next(iter(sorted(folder.glob("[0-9]*_adapters.safetensors"), reverse=True)), None)
    hint = f"; to fuse {checkpoint.name}, copy it to that name" if checkpoint else ""
    raise AdapterError(f"{folder / ADAPTER_WEIGHTS}: the file is missing{hint}")


def _header(folder: Path, name: str) -> Header:
    try:
        resolve_inside(folder, name)
        return read_header(folder / name)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
