"""Models with types that MLX does not have."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from support.tiny import make_model


def raw_with_float64(folder: Path, config: dict[str, Any]) -> Path:
    """A float model as PyTorch saves one, its norms in float64."""
    weights = mx.load(str(make_model(folder, config, bits=None) / "model.safetensors"))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in weights.items():
        wide = "norm" in name
        values = np.array(value.astype(mx.float32)).astype("<f8" if wide else "<f4")
        span = [len(data), len(data) + values.nbytes]
        dtype = "F64" if wide else "F32"
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": span}
        data += values.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder
