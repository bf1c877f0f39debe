"""From an mlx-lm LoRA adapter to a GGUF adapter: the public ``export_lora()``.

For each tensor ``W`` that an adapter names, llama.cpp computes ``W x + alpha / rank * B (A x)``,
where ``W.lora_a`` is ``A [rank, columns]`` and ``W.lora_b`` is ``B [rows, rank]``, both with the
experts before where there are some. Of the token embedding it takes rows of ``A [rows, rank]``
and multiplies them by ``B [columns, rank]``. ``rank`` is the width of the B at hand.
Source: llama.cpp, src/llama-adapter.cpp and src/llama-graph.cpp.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.adapters.updates import AdapterFolder
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.floats import Float32
from mlx_fusekit.gguf.file.front import front_bytes
from mlx_fusekit.gguf.file.header import padded, read_gguf_header
from mlx_fusekit.gguf.file.target import gguf_target
from mlx_fusekit.gguf.model_facts import add_facts, base_model, read_model_facts
from mlx_fusekit.gguf.models.architectures import Layout, lay_out
from mlx_fusekit.gguf.models.naming import in_file_order, leaf
from mlx_fusekit.gguf.models.tensors import GgufTensor
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.writing.files import write_into
from mlx_fusekit.writing.staging import staged
from mlx_fusekit.writing.targets import FileTarget

_CURE = "fuse the adapter and export the model instead: mlx-fusekit fuse --export-gguf"
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
#: Tensors that llama.cpp's graph multiplies by without looking for adapters, by architecture: it
#: would load an adapter of them and do nothing with it.
_NOT_ADAPTED = {
    "deepseek2": frozenset(
        {
            "attn_q.weight",
            "attn_q_a.weight",
            "attn_q_b.weight",
            "attn_kv_a_mqa.weight",
            "attn_k_b.weight",
            "attn_v_b.weight",
            _HEAD,
        }
    ),
}


@dataclass(frozen=True)
class LoraReport:
    """What an export of an adapter did.

    Attributes:
        gguf_path: the file.
        architecture: llama.cpp's name of the base's.
        tensors: number of tensors in the file, two for each tensor of the model that is adapted.
        modules: number of mlx-lm's modules that are adapted.
        rank: of the adapter; the largest, where modules differ.
        alpha: ``adapter.lora.alpha``, mlx-lm's scale times rank.
        bytes: size of the file.
        notes: what the user should know, one line each.
    """

    gguf_path: str
    architecture: str
    tensors: int
    modules: int
    rank: int
    alpha: float
    bytes: int
    seconds: float
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"notes": list(self.notes)}


@dataclass(frozen=True, eq=False)
class _Pair:
    """What the file holds for one tensor of the model.

    Attributes:
        name: of the model's tensor, as ``blk.0.attn_q.weight``.
        a: ``lora_a``, float32.
        b: ``lora_b``, float32.
    """

    name: str
    a: Float32
    b: Float32

    @property
    def tensors(self) -> dict[str, Float32]:
        """Both, by their names in the file."""
        return {f"{self.name}.lora_a": self.a, f"{self.name}.lora_b": self.b}


def export_lora(
    model: str | Path,
    adapter_path: str | Path,
    gguf_path: str | Path,
    *,
    scale: float | None = None,
    ignore: Sequence[str] = (),
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> LoraReport:
    """Write an mlx-lm LoRA adapter as a GGUF adapter, which llama.cpp applies to its base.

    The numbers stay those of the adapter, as F32: llama.cpp rounds activations to the type of what
    it multiplies them by.

    Args:
        model: the base, folder or Hub id, quantized or not; only headers are read.
        adapter_path: folder or Hub id of the adapter.
        gguf_path: the file to write.
        scale: of the adapter's update, taken instead of the one in ``adapter_config.json``.
        ignore: shell patterns (``*vision_tower*``) of the adapter's modules to leave out.
        revision: of the base, where it is a Hub id.
        overwrite: replace an existing GGUF file.
        trust_remote_code: let model code that lies in the base's folder run.

    Raises:
        AdapterError: for an adapter that does not fit the base or that llama.cpp cannot apply,
            naming the module.
        CheckpointError: for a base that cannot be exported to GGUF.
        FusekitError: for what cannot be found or written. No file is left behind.
    """
    start = time.perf_counter()
    target = gguf_target(Path(gguf_path).expanduser(), overwrite=overwrite)
    target.check()
    named = NamedSources.find(
        model,
        adapter_path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        weighted=False,
        scale=scale,
        ignore=ignore,
    )
    (folder,) = opened = named.open_adapters()
    _check_lora(folder)
    sources = named.open(opened)
    layout = lay_out(sources.base)
    updates = _unscaled(folder, sources.base)
    rank = max(update.rank for update in updates.values())
    alpha = _alpha(folder, rank)
    pairs = _in_order(
        pair
        for module, update in updates.items()
        for pair in _Module(folder, layout, module).pairs(update, rank)
    )
    keys = _keys(named.model, named.adapters[0].folder, layout.architecture, alpha)
    size = _write(keys, pairs, target)
    return LoraReport(
        gguf_path=str(gguf_path),
        architecture=layout.architecture,
        tensors=2 * len(pairs),
        modules=len(updates),
        rank=rank,
        alpha=alpha,
        bytes=size,
        seconds=time.perf_counter() - start,
        notes=sources.adapter.warnings,
    )


def _check_lora(folder: AdapterFolder) -> None:
    if folder.kind != "lora":
        what = "a DoRA adapter" if folder.kind == "dora" else "a full fine-tune"
        raise AdapterError(
            f"{folder.folder}: is {what}, which llama.cpp cannot apply as an adapter; {_CURE}"
        )


def _unscaled(folder: AdapterFolder, base: BaseModel) -> Mapping[str, LowRankUpdate]:
    """Updates by module whose numbers are the file's own, without the scale multiplied in."""
    updates = {}
    adapter = folder.bind(base, scaled=False)
    if whole := next(iter(adapter.parameters), None):
        raise AdapterError(
            f"{folder.files[-1]}: saves {whole} as a whole, which a GGUF adapter cannot hold; "
            f"{_CURE}"
        )
    for module, update in adapter.weights.items():
        if not isinstance(update, LowRankUpdate):
            raise AdapterError(
                f"{folder.files[-1]}: saves {module} as a whole, which a GGUF adapter cannot hold; "
                f"{_CURE}"
            )
        if update.rank == 0:
            raise AdapterError(f"{folder.files[-1]}: {module} has rank 0; train the adapter again")
        updates[module] = update
    return updates


def _alpha(folder: AdapterFolder, rank: int) -> float:
    """Scale times rank, as float32; llama.cpp takes an alpha of zero as none, and scales by one."""
    with np.errstate(over="ignore", under="ignore"):
        alpha = np.float32(folder.scale * rank)
    if alpha == 0 or not np.isfinite(alpha):
        raise AdapterError(
            f"{folder.files[0]}: lora_parameters.scale is {folder.scale:g}, "
            "which a GGUF adapter cannot hold; correct it"
        )
    return float(alpha)


@dataclass(frozen=True)
class _Module:
    """A module that an adapter changes, and what it is in the GGUF file of the base."""

    folder: AdapterFolder
    layout: Layout
    path: str

    def pairs(self, update: LowRankUpdate, rank: int) -> Iterator[_Pair]:
        """The update, for each tensor that is made from the module's weight.

        Args:
            update: without the scale.
            rank: that alpha was computed with. llama.cpp divides alpha by the module's own.
        """
        tensors = self.layout.tensors_of(self.path)
        if not tensors:
            raise self._refusal("is not in the GGUF file of this model, which does without it")
        up = update.up * np.float32(update.rank / rank)
        for tensor in tensors:
            self._check(tensor)
            yield self._pair(tensor, up, update.down)

    def _check(self, tensor: GgufTensor) -> None:
        if leaf(tensor.name) in _NOT_ADAPTED.get(self.layout.architecture, ()):
            raise self._refusal(
                f"is {tensor.name} in llama.cpp, which does not apply adapters to it in the "
                f"architecture {self.layout.architecture}"
            )
        names = {other.name for other in self.layout.tensors}
        if tensor.name == _EMBEDDING and _HEAD not in names:
            raise self._refusal(
                "is both embedding and output matrix of this model, and llama.cpp aborts on an "
                "adapter of such a one"
            )

    def _pair(self, tensor: GgufTensor, up: Float32, down: Float32) -> _Pair:
        stacked = len(tensor.shape) == 3
        if tensor.transform is not None:
            raise self._refusal(f"holds other values in llama.cpp, as {tensor.name}")
        if tensor.columns is not None:
            down = down[..., tensor.columns]
        if (stacked and tensor.rows is not None) or (not stacked and len(up) > 1):
            raise self._refusal(f"has another shape in llama.cpp, as {tensor.name}")
        if tensor.rows is not None:
            up = up[:, tensor.rows]
        if not stacked:
            up, down = up[0], down[0]
        a, b = (up, down.T) if tensor.name == _EMBEDDING else (down, up)
        return _Pair(tensor.name, np.ascontiguousarray(a), np.ascontiguousarray(b))

    def _refusal(self, what: str) -> AdapterError:
        return AdapterError(f"{self.folder.files[-1]}: {self.path} {what}; {_CURE}")


def _in_order(pairs: Iterator[_Pair]) -> list[_Pair]:
    by_name = {pair.name: pair for pair in pairs}
    return [by_name[name] for name in in_file_order(by_name)]


def _keys(
    model: LocalFolder, adapter: LocalFolder, architecture: str, alpha: float
) -> gguf.GGUFWriter:
    """All metadata of the file."""
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    facts = read_model_facts(adapter)
    add_facts(replace(facts, base_models=[base_model(model.public_name)]), writer)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    return writer


def _write(writer: gguf.GGUFWriter, pairs: Sequence[_Pair], target: FileTarget) -> int:
    """Write a file that exists complete or not at all; its size."""
    tensors = {name: values for pair in pairs for name, values in pair.tensors.items()}
    for name, values in tensors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    pieces = [front_bytes(writer), *(values.tobytes() for values in tensors.values())]
    content = b"".join(piece.ljust(padded(len(piece)), b"\0") for piece in pieces)
    with staged(target) as path:
        write_into(path, content)
        header = read_gguf_header(path)
        found = {tensor.name: tensor.shape for tensor in header.tensors.values()}
        planned = {name: values.shape for name, values in tensors.items()}
        if found != planned or path.read_bytes() != content:
            raise AssertionError(f"{target.path}: what was written and what is read differ")
    return len(content)
