"""What a GGUF file will hold: each tensor with its type, decided before the first byte."""

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import gguf
from gguf import GGMLQuantizationType as GgmlType

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.file.encoding import TensorEncoding, choose_converted, choose_type
from mlx_fusekit.gguf.file.header import padded
from mlx_fusekit.gguf.file.rows import RowOpener, TensorRows
from mlx_fusekit.gguf.file.scales import scan_scales
from mlx_fusekit.gguf.models.tensors import GgufTensor
from mlx_fusekit.machine import default_workers

_FILE_TYPES = {
    GgmlType.F32: gguf.LlamaFileType.ALL_F32,
    GgmlType.F16: gguf.LlamaFileType.MOSTLY_F16,
    GgmlType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    GgmlType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    GgmlType.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
    GgmlType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    GgmlType.MXFP4: gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
    GgmlType.NVFP4: gguf.LlamaFileType.MOSTLY_NVFP4,
}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the file, how it is written, and where after the header."""

    tensor: GgufTensor
    encoding: TensorEncoding
    offset: int


@dataclass(frozen=True)
class GgufPlan:
    """A file to be written.

    Attributes:
        tensors: in the order of the file.
        opener: gives their rows.
        data_bytes: size of all tensors with the padding between them.
    """

    tensors: tuple[PlannedTensor, ...]
    opener: RowOpener
    data_bytes: int

    @property
    def encodings(self) -> tuple[TensorEncoding, ...]:
        """How each tensor is written."""
        return tuple(planned.encoding for planned in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors."""
        return sum(encoding.nbytes for encoding in self.encodings)

    @property
    def file_type(self) -> int:
        """The number by which llama.cpp names a file, of the type that most bytes have."""
        sizes: Counter[GgmlType] = Counter()
        for encoding in self.encodings:
            sizes[encoding.ggml_type] += encoding.nbytes
        return int(_FILE_TYPES[max(sizes, key=sizes.__getitem__, default=GgmlType.F32)])


def plan_gguf(
    base: BaseModel,
    tensors: Sequence[GgufTensor],
    *,
    outtype: str = "auto",
    workers: int | None = None,
) -> GgufPlan:
    """Choose the type of every tensor; reads the scales and biases of quantized ones.

    Args:
        base: the model that is exported.
        tensors: in the order of the file.
        outtype: one of :data:`~mlx_fusekit.gguf.outtypes.OUTTYPES`.
        workers: threads; the plan does not depend on their number.

    Raises:
        CheckpointError: when a source is missing, of another shape or of a kind that GGUF cannot
            hold, or has a scale or bias that is NaN or makes infinite weights.
    """
    opener = RowOpener(base)
    encode = partial(_planned, base, outtype)
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        encodings = list(pool.map(encode, tensors, map(opener.scales, tensors)))
    planned, offset = [], 0
    for tensor, encoding in zip(tensors, encodings, strict=True):
        planned.append(PlannedTensor(tensor, encoding, offset))
        offset += padded(encoding.nbytes)
    return GgufPlan(tuple(planned), opener, offset)


def _planned(base: BaseModel, outtype: str, tensor: GgufTensor, rows: TensorRows) -> TensorEncoding:
    if tensor.has_stored_rows and not _fits(tensor, rows):
        raise CheckpointError(
            f"{base.folder}: {tensor.source} has shape {rows.shape}, but {tensor.name} must have "
            f"{tensor.shape}; its weights do not belong to its config.json"
        )
    ggml_type, exact = _type_of(base, tensor, rows, outtype)
    return TensorEncoding(tensor.name, ggml_type, tensor.shape, exact)


def _fits(tensor: GgufTensor, rows: TensorRows) -> bool:
    """Whether the rows give a tensor of its shape; floats may be split into rows differently."""
    same_rows = rows.spec is None or rows.columns == tensor.shape[-1]
    return same_rows and math.prod(rows.shape) == math.prod(tensor.shape)


def _type_of(
    base: BaseModel, tensor: GgufTensor, rows: TensorRows, outtype: str
) -> tuple[GgmlType, bool]:
    """The type of a tensor, and whether that is known to hold its values exactly."""
    columns = tensor.shape[-1]
    stored = rows.sources["weight"].dtype
    facts = scan_scales(rows) if rows.spec is not None else None
    if facts is not None and not facts.finite:
        raise CheckpointError(
            f"{base.folder}: {tensor.source} has a scale or bias that is NaN, infinite or so large "
            "that weights are; download the model again, or fuse it again"
        )
    if tensor.float32 or len(tensor.shape) == 1:
        return GgmlType.F32, True
    if rows.spec is not None and facts is not None and tensor.has_stored_rows:
        return choose_type(rows.spec, facts, columns, outtype)
    if outtype not in ("auto", "lossless"):
        chosen = choose_converted(columns, outtype)
    elif tensor.has_stored_rows:
        chosen = GgmlType[stored]
    elif outtype == "lossless":
        chosen = GgmlType.F32
    else:
        chosen = GgmlType[stored] if rows.spec is None else GgmlType.F16
    return chosen, chosen == GgmlType.F32 or (chosen.name == stored and tensor.has_stored_rows)
