"""Every model class of mlx-lm, fused and compared with mlx-lm's unfused logits.

A base is saved in three forms (converted by MLX, quantized by mlx-lm, as Hugging Face has it), an
adapter is random and made as mlx-lm makes one, and all is float32. The teacher is mlx-lm: its
loader, its adapter loader, its model. Only for a full fine-tune of a quantized base, which mlx-lm
does not load, it is the base with its weights dequantized by MLX.
"""

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_fusekit import fuse
from mlx_fusekit.errors import FusekitError
from support.every_class import VOCABULARY, config_of, model_of
from support.folders import as_hugging_face
from support.raw_forms import raw_form

#: Largest difference of two logits, as a share of the largest logit. In float32, merged and
#: unmerged weights add the same products in another order: that is some 1e-6. A module left out, or
#: scaled wrongly, moves the logits by more than 1e-2.
TOLERANCE = 1e-4
MATERIAL = 1e-2

BASES = ("converted", "quantized", "raw")
ADAPTERS = ("default keys", "explicit keys", "full fine-tune")

#: What mlx-lm raises where it does not make, load or run an adapter or a model.
MLX_LM_ERRORS = (ValueError, AttributeError, TypeError)

EXACT, REFUSED, NOT_BY_MLX_LM, FAILING = "exact", "refused", "not by mlx-lm", "failing"

_TOKENS = [(7 * i + 3) % VOCABULARY for i in range(24)]
_ADAPTABLE = (
    nn.Linear,
    nn.QuantizedLinear,
    nn.Embedding,
    nn.QuantizedEmbedding,
    SwitchLinear,
    QuantizedSwitchLinear,
)
#: Models read the weight of these modules themselves, and do not run with an adapter there.
_READ = ("altup", "_res_proj", "output_attn_res")


@dataclass(frozen=True)
class Outcome:
    """What came of an adapter on a base.

    Attributes:
        kind: one of four: the logits are the teacher's; we refuse; mlx-lm itself does not do it;
            anything else.
        why: unless the logits are the teacher's.
        difference: from the teacher's logits.
    """

    kind: str
    why: str = ""
    difference: float = 0.0


class ModelClass:
    """A class of mlx-lm's, by its module's name, with bases in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name

    def outcome(self, base_kind: str, adapter_kind: str) -> Outcome:
        """Make a base and an adapter, fuse, and compare."""
        adapter = self._folder / f"{base_kind}, {adapter_kind}" / "adapter"
        dense = (base_kind, adapter_kind) == ("quantized", "full fine-tune")
        try:
            base = self._base(base_kind)
            before = logits(self._loaded(base, dense=dense))
            make_adapter(adapter, self._loaded(base, dense=dense), adapter_kind)
            wanted = self._taught(base, adapter, dense=dense)
        except MLX_LM_ERRORS as error:
            return Outcome(NOT_BY_MLX_LM, str(error).strip().splitlines()[-1].strip())
        try:
            if base_kind == "quantized" and (wrong := self._rounded(base, adapter)):
                return Outcome(FAILING, wrong)
            apart = self._apart(base, adapter, wanted, dequantize=base_kind == "quantized")
        except FusekitError as error:
            why = str(error).replace(str(adapter), "ADAPTER").replace(str(base), "BASE")
            return Outcome(REFUSED, why)
        if wanted is None:
            return Outcome(FAILING, "fused, though mlx-lm does not load the adapter")
        if difference(before, wanted) < MATERIAL:
            return Outcome(FAILING, "the adapter does next to nothing")
        if not apart <= TOLERANCE:
            return Outcome(FAILING, f"logits are {apart:.1e} apart", apart)
        return Outcome(EXACT, difference=apart)

    def _taught(self, base: Path, adapter: Path, *, dense: bool) -> mx.array | None:
        """Logits of mlx-lm's unfused model; None where it does not load the adapter."""
        model = self._loaded(base, dense=dense)
        try:
            model = load_adapters(model, str(adapter))
        except ValueError:
            return None
        model.eval()
        return logits(model)

    def _rounded(self, base: Path, adapter: Path) -> str:
        """What is wrong with the model fused at the base's bits."""
        fused = adapter.parent / "nearest"
        fuse(base, adapter, fused, requantize="nearest")
        load_model(fused)
        return "" if tensors_of(fused) == tensors_of(base) else "other tensors at the same bits"

    def _apart(
        self, base: Path, adapter: Path, wanted: mx.array | None, *, dequantize: bool
    ) -> float:
        """How far the logits of the model fused in float32 are from these."""
        fused = adapter.parent / "fused"
        fuse(base, adapter, fused, dequantize=dequantize, dtype="float32" if dequantize else None)
        return 0.0 if wanted is None else difference(logits(load_model(fused)[0]), wanted)

    def _base(self, kind: str) -> Path:
        folder = self._folder / kind
        if not folder.exists():
            model, config = random_model(self._name), config_of(self._name)
            if kind == "quantized":
                with redirect_stdout(io.StringIO()):
                    model, config = quantize_model(model, config, 32, 4)
            save_model(folder, model)
            save_config(config, folder / "config.json")
            if kind == "raw":
                as_hugging_face(
                    folder, raw_form(self._name, mx.load(str(folder / "model.safetensors")))
                )
        return folder

    def _loaded(self, base: Path, *, dense: bool) -> Any:
        model, _ = load_model(base)
        return dequantized(model, model_of(self._name)) if dense else model


def random_model(name: str) -> Any:
    """A model of a class with float32 weights, none of them constant."""
    mx.random.seed(0)
    model = model_of(name)
    values = [(path, _varied(value)) for path, value in tree_flatten(model.parameters())]
    model.update(tree_unflatten(values))
    return model


def _varied(value: mx.array) -> mx.array:
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    value = value.astype(mx.float32)
    noise = 0.1 * mx.random.normal(value.shape)
    return value + noise if value.ndim == 1 or not value.any() else value


def dequantized(model: Any, dense: Any) -> Any:
    """An unquantized model of a class, with the weights that a quantized one stands for."""
    weights = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        if "scales" in module and weights[f"{path}.weight"].dtype == mx.uint32:
            parts = [weights.pop(f"{path}.{leaf}") for leaf in ("weight", "scales", "biases")]
            weights[f"{path}.weight"] = mx.dequantize(*parts, module.group_size, module.bits)
    dense.load_weights(list(weights.items()))
    return dense


def make_adapter(folder: Path, model: Any, kind: str) -> None:
    """Save a random adapter of a model as mlx-lm's trainer would; the model is spent."""
    mx.random.seed(1)
    config: dict[str, Any] = {"fine_tune_type": "full", "num_layers": 1, "lora_parameters": None}
    last = model.layers[-1]
    if kind == "full fine-tune":
        (prefix,) = (path for path, module in model.named_modules() if module is last)
        tensors = {
            f"{prefix}.{path}": value + 0.1 * mx.random.normal(value.shape)
            for path, value in tree_flatten(last.parameters())
            if mx.issubdtype(value.dtype, mx.floating)
        }
    else:
        parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
        if kind == "explicit keys":
            parameters["keys"] = some_keys(model)
        config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
        linear_to_lora_layers(model, -1, parameters)
        tensors = {
            path: 0.1 * mx.random.normal(value.shape)
            for path, value in tree_flatten(model.parameters())
            if "lora_a" in path or "lora_b" in path
        }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)


def some_keys(model: Any) -> list[str]:
    """Two modules by their paths in the last layer, and all outside the layers by their own."""
    inside = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    outside = [path for path, module in _adaptable(model) if id(module) not in inside]
    in_last = [path for path, _ in _adaptable(model.layers[-1])]
    return list(dict.fromkeys([in_last[0], in_last[-1], *outside]))


def _adaptable(model: Any) -> list[tuple[str, Any]]:
    return [
        (path, module)
        for path, module in sorted(model.named_modules())
        if isinstance(module, _ADAPTABLE) and not any(part in path for part in _READ)
    ]


def logits(model: Any) -> mx.array:
    """Of a fixed text, in float32; those that a class masks are zero."""
    found = model(mx.array([_TOKENS])).astype(mx.float32)
    found = mx.where(mx.isinf(found), 0, found)
    mx.eval(found)
    return found


def difference(first: mx.array, second: mx.array) -> float:
    """The largest of two logits, as a share of the largest logit."""
    return float((mx.abs(first - second).max() / mx.abs(second).max()).item())


def tensors_of(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Shape and dtype of every tensor of a model."""
    tensors = mx.load(str(folder / "model.safetensors"))
    return {name: (value.shape, value.dtype) for name, value in tensors.items()}
