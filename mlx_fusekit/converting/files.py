"""An adapter's folder to be written, in any form."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fusekit.adapters.updates import Adapter, AdapterFolder, FullUpdate
from mlx_fusekit.checkpoint.base import TensorSource
from mlx_fusekit.checkpoint.belongings import ADAPTER_CONFIG_NAME
from mlx_fusekit.checkpoint.writer import FileWriter, OutputTensor, new_layout
from mlx_fusekit.formats.floats import FLOAT_DTYPES, Float32, from_float32, to_float32
from mlx_fusekit.writing.files import write_new
from mlx_fusekit.writing.targets import FolderTarget


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's folder is to hold.

    Attributes:
        name: of the file of weights.
        tensors: its tensors, float32, by name.
        config: ``adapter_config.json``.
        notes: what the user should know, one line each.
    """

    name: str
    tensors: Mapping[str, Float32]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def write(self, folder: Path, dtype: str = "F32") -> int:
        """Write both files into an empty folder; the size of the weights in bytes.

        Args:
            folder: of the adapter.
            dtype: to store tensors in where it holds their values exactly; else as float32.
        """
        stored = {name: _stored(values, dtype) for name, values in sorted(self.tensors.items())}
        layout = new_layout(
            self.name,
            [
                OutputTensor(name, kind, self.tensors[name].shape)
                for name, (kind, _) in stored.items()
            ],
        )
        with FileWriter(layout, folder) as writer:
            for name, (_, bits) in stored.items():
                writer.write_rows(name, 0, bits.reshape(-1, bits.shape[-1]))
            writer.finish()
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        write_new(folder / ADAPTER_CONFIG_NAME, text.encode())
        return layout.nbytes


def adapter_target(path: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> FolderTarget:
    """An adapter's folder to be made, which replaces nothing but another."""
    return FolderTarget(path, "--save-path", _refusal, overwrite, sources)


def whole_values(adapter: Adapter) -> Mapping[str, Float32]:
    """Values that take the place of the base's, by the base's names."""
    return {name: values_of(update.tensor) for name, update in adapter.parameters.items()}


def values_of(tensor: TensorSource) -> Float32:
    """A tensor's values."""
    stored = tensor.read_rows(0, math.prod(tensor.shape[:-1]))
    return to_float32(stored.reshape(tensor.shape), tensor.dtype)


def stored_type(folders: Iterable[AdapterFolder]) -> str:
    """The type of floats that most tensors of the adapters have."""
    found = Counter(tensor.dtype for folder in folders for tensor in folder.tensors.values())
    known = [dtype for dtype, _ in found.most_common() if dtype in FLOAT_DTYPES]
    return known[0] if known else "F32"


def whole_weights(adapter: Adapter) -> Mapping[str, FullUpdate]:
    """Quantized modules whose weight was saved as a whole, by path."""
    return {m: u for m, u in adapter.weights.items() if isinstance(u, FullUpdate)}


def _stored(values: Float32, dtype: str) -> tuple[str, Any]:
    """The type and bits of values: the wanted type, where it holds them exactly."""
    if dtype != "F32":
        bits = from_float32(values, dtype)
        if np.array_equal(to_float32(bits, dtype), values):
            return dtype, bits
    return "F32", values


def _refusal(folder: Path) -> str | None:
    if (folder / "config.json").exists():
        return "is a model folder, and no adapter's"
    found = (folder / ADAPTER_CONFIG_NAME).exists()
    return None if found else "is not empty and no adapter's folder"
