"""Solved rows and hidden states as bytes, to be handed from rank to rank."""

import json
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_fusekit.formats.floats import Array
from mlx_fusekit.formats.quantization import QuantizedRows
from mlx_fusekit.requantize.bits import array_of, bits_of, type_of_bits

_LEAVES = ("codes", "scales", "biases")


def packed(solved: Sequence[tuple[QuantizedRows, float, float]]) -> bytes:
    """Rows, each with its two errors: a line of JSON that says how they lie, then their bytes."""
    heads: list[object] = []
    arrays: list[Array] = []
    for rows, *errors in solved:
        own = {name: a for name in _LEAVES if (a := getattr(rows, name)) is not None}
        arrays += own.values()
        head = {name: [array.dtype.str, array.shape] for name, array in own.items()}
        heads.append([head, rows.scale_dtype, rows.global_scale, errors])
    line = json.dumps(heads).encode() + b"\n"
    return line + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


def unpacked(data: bytes) -> Iterator[tuple[QuantizedRows, float, float]]:
    """The same, from the bytes."""
    line, _, _ = data.partition(b"\n")
    at = len(line) + 1
    for head, scale_dtype, global_scale, (error, nearest_error) in json.loads(line):
        arrays = {}
        for name, (dtype, shape) in head.items():
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
            at += arrays[name].nbytes
        codes, scales, biases = (arrays.get(name) for name in _LEAVES)
        assert codes is not None, "rows have codes"
        assert scales is not None, "rows have scales"
        rows = QuantizedRows(codes, scales, biases, scale_dtype, global_scale)
        yield rows, error, nearest_error


def packed_states(states: Sequence[mx.array]) -> bytes:
    """Hidden states: a line of JSON with type and shape of each, then their bits."""
    line = json.dumps([[str(array.dtype), array.shape] for array in states]).encode() + b"\n"
    return line + b"".join(bits_of(array).tobytes() for array in states)


def unpacked_states(data: bytes) -> Iterator[mx.array]:
    """The same, from the bytes."""
    line, _, _ = data.partition(b"\n")
    at = len(line) + 1
    for kind, shape in json.loads(line):
        count = int(np.prod(shape, dtype=np.int64))
        bits = np.frombuffer(data, type_of_bits(kind), count, at).reshape(shape)
        yield array_of(bits, kind)
        at += bits.nbytes
