"""Re-quantized modules that take their teachers' places in the running model."""

import contextlib
import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fusekit.formats.floats import Array
from mlx_fusekit.formats.quantization import QuantizedRows, dequantize, to_matrix
from mlx_fusekit.formats.specs import QuantSpec
from mlx_fusekit.running.model import RunningModel, place, swapped

_MX_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16}


class FusedModules:
    """The modules that were re-quantized so far, to be swapped into the teacher for a while.

    Attributes:
        ever: whether there was any.
    """

    def __init__(self, teacher: RunningModel) -> None:
        self._teacher = teacher
        self._modules: dict[str, nn.Module] = {}
        self.ever = False

    def put(self, path: str, experts: Sequence[QuantizedRows], spec: QuantSpec) -> None:
        """Make the fused module of a path, of one matrix or one an expert."""
        self.ever = True
        teacher = place(self._teacher.model, path).value
        self._modules[path] = _module(self._teacher.bare(path), teacher, experts, spec)

    def give_back(self, paths: Collection[str]) -> None:
        """Forget modules that will not run any more."""
        for path in paths:
            self._modules.pop(path, None)

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """While it lasts, the model runs with the fused modules."""
        model = self._teacher.model
        with swapped((place(model, path), module) for path, module in self._modules.items()):
            yield model


def _module(
    bare: nn.Module, teacher: nn.Module, experts: Sequence[QuantizedRows], spec: QuantSpec
) -> nn.Module:
    """The base's module with other weights: quantized ones where the base runs quantized."""
    module: Any = copy.copy(bare)
    stacked = bare["weight"].ndim > 2
    if "scales" in bare:
        module.weight = _array([rows.codes for rows in experts], stacked)
        dtype = experts[0].scale_dtype
        module.scales = _array([rows.scales for rows in experts], stacked, dtype)
        biases = [rows.biases for rows in experts if rows.biases is not None]
        module.biases = _array(biases, stacked, dtype) if biases else None
        module.bits, module.group_size, module.mode = spec.bits, spec.group_size, spec.mode
        if experts[0].global_scale is not None and spec.mode == "nvfp4":
            scales = [rows.global_scale for rows in experts]
            module.global_scale = mx.array(scales).reshape(bare["global_scale"].shape)
        elif "global_scale" in bare:
            module.global_scale = None
    else:
        dense = [to_matrix(dequantize(rows, spec)) for rows in experts]
        module.weight = _array(dense, stacked).astype(bare["weight"].dtype)
    if "bias" in teacher:
        module.bias = teacher["bias"]
    mx.eval(module.parameters())
    return module


def _array(matrices: Sequence[Array], stacked: bool, dtype: str = "") -> mx.array:
    array = mx.array(np.stack(matrices) if stacked else matrices[0])
    return array.view(_MX_TYPES[dtype]) if dtype in _MX_TYPES else array
