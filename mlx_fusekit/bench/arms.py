"""What is timed: a base, the base with its adapter as mlx-lm runs it, fused models."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import load_adapters

from mlx_fusekit import launched
from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.adapters.sources import open_model
from mlx_fusekit.adapters.updates import AdapterFolder
from mlx_fusekit.bench.sharding import run_shard
from mlx_fusekit.checkpoint.belongings import ADAPTER_CONFIG_NAME
from mlx_fusekit.checkpoint.mlx_lm import MLX_LM_ERRORS, one_line
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.specs import LEAVES
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.running.adapted import put_adapter
from mlx_fusekit.running.loading import run_model
from mlx_fusekit.running.model import RunningModel
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.files import write_new
from mlx_fusekit.writing.staging import temporary_folder

BASE = "base"
ADAPTED = "base+adapter"
FUSED = "fused"

#: What configurations call the number of experts a token goes through.
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k")


@dataclass(frozen=True)
class ArmSource:
    """An arm on disk.

    Attributes:
        name: in tables.
        public_name: of the model: the Hub id, or the path the user gave.
        folder: of the model.
        adapter: folder of the adapter that it runs with, unmerged.
        trust_remote_code: let model code that lies in the folder run.
        scale: of the adapter's update, where the user says it.
        ignore: patterns of modules to leave out of the adapter.
    """

    name: str
    public_name: str
    folder: Path
    adapter: Path | None = None
    trust_remote_code: bool = False
    scale: float | None = None
    ignore: tuple[str, ...] = ()

    @property
    def local(self) -> LocalFolder:
        """The model's folder, and whether its code may run."""
        return LocalFolder(self.folder, trusted=self.trust_remote_code)

    def opened_adapter(self) -> AdapterFolder | None:
        """The adapter, opened; None without one."""
        if self.adapter is None:
            return None
        return open_adapter(self.adapter, scale=self.scale, ignore=self.ignore)

    @property
    def disk_bytes(self) -> int:
        """Size of all weight files, the adapter's included."""
        return _weight_file_bytes(self.folder) + self.adapter_disk_bytes

    @property
    def adapter_disk_bytes(self) -> int:
        """Size of the adapter's weight files."""
        return _weight_file_bytes(self.adapter) if self.adapter is not None else 0


def _weight_file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@dataclass(frozen=True)
class LoadedArm:
    """An arm in memory.

    Attributes:
        load_seconds: until its weights were in memory, the adapter's share included.
        adapter_load_seconds: the adapter's share; None without one.
    """

    running: RunningModel
    load_seconds: float
    adapter_load_seconds: float | None

    @property
    def model(self) -> nn.Module:
        """mlx-lm's."""
        return self.running.model


def load_arm(source: ArmSource) -> LoadedArm:
    """Load an arm as mlx-lm does: weights in their stored formats, adapter layers around them.

    Under ``mlx.launch`` each rank loads its shard, and waits for no other.

    Raises:
        AdapterError: when mlx-lm cannot run the adapter.
        CheckpointError: naming what is wrong with the model's folder.
    """
    group = launched.group()
    start = time.perf_counter()
    if group is None:
        running = run_model(source.local, memory_share=0.0)
    else:
        running = run_shard(source.local, source.public_name, group)
    loaded = time.perf_counter()
    adapter = source.opened_adapter()
    if adapter is None:
        return LoadedArm(running, loaded - start, None)
    try:
        _put_adapter(running.model, source, adapter)
    except MLX_LM_ERRORS as error:
        raise AdapterError(
            f"--adapter-path {source.adapter}: mlx-lm cannot run it on {source.public_name}, "
            f"so there is no unfused arm to time ({one_line(error)})"
        ) from error
    running.model.eval()
    end = time.perf_counter()
    return LoadedArm(running, end - start, end - loaded)


def _put_adapter(model: nn.Module, source: ArmSource, adapter: AdapterFolder) -> None:
    """Let mlx-lm load an adapter, its settings told as today's mlx-lm reads them.

    What it does not read is put into the same layers here, in the type that it is stored in.
    """
    if adapter.mlx_lm_config is None:
        stored = Counter(tensor.dtype for tensor in adapter.tensors.values()).most_common(1)[0][0]
        dtype = {"F16": mx.float16, "BF16": mx.bfloat16}.get(stored, mx.float32)
        base = open_model(source.local, adapter.target_tensors)
        scale = 1.0 if adapter.kind == "full" else adapter.scale
        put_adapter(model, adapter.bind(base, scaled=False), scale=scale, dtype=dtype)
        return
    with temporary_folder() as folder:
        write_new(folder / ADAPTER_CONFIG_NAME, json.dumps(adapter.mlx_lm_config).encode())
        calls.make_link(folder / "adapters.safetensors", adapter.files[-1].resolve())
        load_adapters(model, str(folder))
        mx.eval(model.parameters())


@dataclass(frozen=True)
class WeightFacts:
    """What a model's weights amount to.

    Attributes:
        bits_per_weight: bytes of the stored arrays in bits, by the numbers they stand for.
        weight_bytes: of all arrays.
        read_bytes_per_token: of the arrays that generating one token reads: of an embedding that
            is not also the head, one row; of experts, those a token goes through. An adapter's
            matrices count; the key-value cache and intermediate results do not.
    """

    bits_per_weight: float
    weight_bytes: int
    read_bytes_per_token: int


def weight_facts(model: nn.Module, config: Mapping[str, Any]) -> WeightFacts:
    """Count the arrays of a model in memory."""
    tied = not any(path.rpartition(".")[2] == "lm_head" for path, _ in model.named_modules())
    count = stored = read = 0
    for _, module in model.named_modules():
        arrays = {key: value for key, value in module.items() if isinstance(value, mx.array)}
        nbytes = sum(array.nbytes for array in arrays.values())
        stored += nbytes
        count += _logical_size(module, arrays)
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) and not tied:
            nbytes //= arrays["weight"].shape[0]
        elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            nbytes = round(nbytes * _active_share(module, config))
        read += nbytes
    return WeightFacts(8 * stored / max(count, 1), stored, read)


def _logical_size(module: nn.Module, arrays: Mapping[str, mx.array]) -> int:
    if "scales" not in arrays:
        return sum(array.size for array in arrays.values())
    others = sum(array.size for key, array in arrays.items() if key not in LEAVES)
    return int(arrays["weight"].size * 32 // module.bits) + others


def _active_share(module: nn.Module, config: Mapping[str, Any]) -> float:
    """The share of its experts that a token goes through; all where the config does not say."""
    experts = module.weight.shape[0]
    texts = (config, config.get("text_config") or {})
    active = next(
        (text[key] for text in texts for key in _ACTIVE_EXPERTS if isinstance(text.get(key), int)),
        experts,
    )
    return float(min(1.0, active / experts))
