"""What ``adapter_config.json`` says of adapters in mlx-lm's form, whoever wrote it.

mlx-lm has changed what it writes, and others write the same tensors with settings of their own:

- mlx-lm up to 0.14.1 scaled by ``scale * alpha / rank``, since 0.14.3 by ``scale``; both wrote
  ``lora_layers``, and 0.14.0 and later ``use_dora``, where newer ones write ``fine_tune_type``.
- mlx-vlm up to 0.4 wrote ``rank`` and ``alpha`` by themselves, and scaled by ``alpha``.
- Unsloth adds PEFT's keys and, where modules differ, ``unsloth_mlx_lora_module_ranks`` and
  ``..._scales``; mlx-optiq adds PEFT's keys and ``optiq.applied_ranks``.

Sources: ``tuner/lora.py`` of mlx-lm 0.13.0 to 0.32.2, ``trainer/lora.py`` of mlx-vlm 0.1.0 to
0.3.0, ``mlx/utils.py`` of unsloth_zoo 2026.10.9, ``lora/trainer.py`` of mlx-optiq 0.7.7.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlx_fusekit.checkpoint.json_text import shown
from mlx_fusekit.errors import AdapterError

_KINDS = ("lora", "dora", "full")
_RANKS, _SCALES = "unsloth_mlx_lora_module_ranks", "unsloth_mlx_lora_module_scales"


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of an adapter.

    Attributes:
        path: of ``adapter_config.json``.
        config: its content.
        chosen_scale: what the user says the scale is; it is taken before all else.
    """

    path: Path
    config: Mapping[str, Any]
    chosen_scale: float | None = None

    @cached_property
    def kind(self) -> str:
        """``lora``, ``dora`` or ``full``.

        Raises:
            AdapterError: for another kind of fine-tune.
        """
        stated = self.config.get("fine_tune_type")
        if stated is None:
            return "dora" if self.config.get("use_dora") is True else "lora"
        if not isinstance(stated, str) or stated.lower() not in _KINDS:
            raise AdapterError(
                f"{self.path}: fine_tune_type is {shown(stated)}; lora, dora and full are known"
            )
        return stated.lower()

    @property
    def trained_on(self) -> str | None:
        """The base's name, where it is recorded."""
        names = (self.config.get(key) for key in ("model", "base_model_name_or_path"))
        return next((name for name in names if isinstance(name, str) and name), None)

    @property
    def num_layers(self) -> int | None:
        """How many of the last layers were adapted; None, 0 and less mean all of them.

        Raises:
            AdapterError: for what is no number.
        """
        key = "lora_layers" if self._old else "num_layers"
        value = self.config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise AdapterError(
                f"{self.path}: {key} is {shown(value)}; it must be a whole number "
                "(-1 for all layers)"
            )
        return value

    @property
    def keys(self) -> Sequence[str] | None:
        """Adapted modules, seen from a layer or from the model; None for all that can be.

        Raises:
            AdapterError: for what is no list of names.
        """
        keys = self.parameters.get("keys")
        if keys is not None and not (
            isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        ):
            raise AdapterError(
                f"{self.path}: lora_parameters.keys is {shown(keys)}; it must be a list of "
                "module names"
            )
        return keys

    @cached_property
    def parameters(self) -> Mapping[str, Any]:
        """``lora_parameters``, or the same settings where they stand by themselves.

        Raises:
            AdapterError: when there are none.
        """
        parameters = self.config.get("lora_parameters")
        if isinstance(parameters, dict):
            return MappingProxyType(parameters)
        alone = {k: self.config[k] for k in ("rank", "scale", "alpha") if k in self.config}
        if "rank" not in alone or len(alone) == 1:
            raise AdapterError(
                f"{self.path}: has no lora_parameters; add rank and scale as trained"
            )
        return MappingProxyType(alone)

    @property
    def rank(self) -> int | None:
        """Of the adapter's matrices, where it is recorded.

        Raises:
            AdapterError: for what is no number.
        """
        rank = self.parameters.get("rank")
        if rank is None:
            return None
        if not _is_finite(rank) or abs(rank) >= 2**31 or rank != int(rank):
            hint = f"; write {rank} without quotes" if str(rank).isdigit() else ""
            raise AdapterError(
                f"{self.path}: lora_parameters.rank is {shown(rank)}, which is no whole "
                f"number{hint}"
            )
        return int(rank)

    def rank_of(self, module: str) -> int | None:
        """The rank recorded for one module, else that of all."""
        single = _single(self.config.get(_RANKS), module)
        if single is None:
            optiq = self.config.get("optiq")
            applied = optiq.get("applied_ranks") if isinstance(optiq, dict) else None
            single = _of_layer(applied, module)
        return single if isinstance(single, int) else self.rank

    @property
    def scale(self) -> float:
        """The factor of LoRA's and DoRA's update, of modules that have none of their own.

        Raises:
            AdapterError: when the configuration has none, or it is no finite number.
        """
        if self.chosen_scale is not None:
            return self.chosen_scale
        return self._scales[0]

    def scale_of(self, module: str) -> float:
        """The factor of one module's update.

        Raises:
            AdapterError: as :attr:`scale`.
        """
        single = _single(self.config.get(_SCALES), module)
        if single is None or self.chosen_scale is not None:
            return self.scale
        return self._number(single, f"{_SCALES}[{module!r}]")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the settings were read, one line each."""
        if self.kind == "full" or self.chosen_scale is not None:
            return ()
        scale, other, why = self._scales
        if why == "":
            return ()
        cure = "" if other is None else f"; if it is {other:g}, say --scale {other:g}"
        return (f"{self.path.parent.name}: {why}, so the update's scale is {scale:g}{cure}",)

    @property
    def _old(self) -> bool:
        """Whether an mlx-lm before 0.19 wrote it."""
        return "lora_layers" in self.config and "num_layers" not in self.config

    @cached_property
    def _scales(self) -> tuple[float, float | None, str]:
        """The scale, another that it may be, and why in words where that needs telling."""
        scale, alpha = (self.parameters.get(key) for key in ("scale", "alpha"))
        if "lora_parameters" not in self.config and scale is None:
            return self._number(alpha, "alpha"), None, ""
        if scale is None:
            hint = " (mlx-lm's scale is what others call alpha / rank)" if alpha is not None else ""
            raise AdapterError(
                f"{self.path}: lora_parameters has no 'scale'; add the one it was trained with, "
                f"or give it as --scale{hint}"
            )
        scale = self._number(scale, "lora_parameters.scale")
        if alpha is not None and self._old and "fine_tune_type" not in self.config and self.rank:
            older = scale * self._number(alpha, "lora_parameters.alpha") / self.rank
            if older == scale:
                return scale, None, ""
            if "use_dora" not in self.config:
                why = "was trained with mlx-lm before 0.14, which scaled by scale * alpha / rank"
                return older, None, why
            why = "mlx-lm since 0.14.3 scales by scale, before by scale * alpha / rank"
            return scale, older, why
        return self._beside_peft(scale)

    def _beside_peft(self, scale: float) -> tuple[float, float | None, str]:
        """The scale, where PEFT's settings stand beside mlx-lm's."""
        alpha, rank = self.config.get("lora_alpha"), self.config.get("r")
        if "peft_type" not in self.config or not _positive(alpha) or not _positive(rank):
            return scale, None, ""
        assert alpha is not None and rank is not None
        if abs(alpha - scale * rank) < 1:  # writers round lora_alpha to a whole number
            return scale, None, ""
        theirs = alpha / rank
        return scale, theirs, f"lora_alpha / r is {theirs:g}, but mlx-lm reads lora_parameters"

    def _number(self, value: Any, name: str) -> float:
        if not _is_finite(value):
            raise AdapterError(f"{self.path}: {name} is {shown(value)}; it must be a finite number")
        return float(value)


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold; to Python, truth values are numbers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _positive(value: Any) -> bool:
    return _is_finite(value) and value > 0


def _single(by_module: Any, module: str) -> Any:
    """What a map of single modules says, if it is there."""
    return by_module.get(module) if isinstance(by_module, dict) else None


def _of_layer(by_layer: Any, module: str) -> Any:
    """The same of a map whose keys are ``layer_3.self_attn.q_proj``."""
    if not isinstance(by_layer, dict):
        return None
    parts = module.split(".")
    names = (f"layer_{'.'.join(parts[place:])}" for place in range(len(parts)))
    return next((by_layer[name] for name in names if name in by_layer), None)
