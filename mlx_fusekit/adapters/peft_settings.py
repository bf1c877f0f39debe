"""What ``adapter_config.json`` says of a PEFT adapter.

What counts is what the file of weights holds; the settings give the scale, and tell features whose
result is no plain change of weights. Source: ``tuners/lora/config.py``, ``tuners/lora/layer.py``
and ``utils/other.py`` of PEFT 0.21.2.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_fusekit.checkpoint.json_text import shown
from mlx_fusekit.errors import AdapterError

_NO_WEIGHTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
)
#: Ways to begin that take the first update off the base's weights, so that it belongs to others.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Settings whose adapters do more than add to weights.
_FEATURES = {
    "alora_invocation_tokens": "an aLoRA, which acts only behind its invocation tokens",
    "layer_replication": "of a model with layers that layer_replication repeated",
    "lora_bias": "with biases in its lora_B (lora_bias)",
    "use_qalora": "a QA-LoRA, which pools its inputs",
    "use_bdlora": "a BD-LoRA of blocks",
    "arrow_config": "a router of several adapters (arrow_config)",
    "kasa_config": "a KaSA adapter",
    "monteclora_config": "a MonteCLoRA, which draws at random",
}
_CONVERT = "convert it to LoRA with PEFT (peft.save_as_lora), and fuse that"
#: More repetitions than this in one pattern of a stranger could be searched for without end.
_REPETITIONS = 2
_LONGEST_PATTERN = 300


@dataclass(frozen=True)
class PeftSettings:
    """The settings of a PEFT adapter.

    Attributes:
        path: of ``adapter_config.json``.
        config: its content.
        chosen_scale: what the user says the scale is; it is taken before all else.
    """

    path: Path
    config: Mapping[str, Any]
    chosen_scale: float | None = None

    def check(self) -> None:
        """Refuse what is no LoRA, or a kind of it that cannot be fused.

        Raises:
            AdapterError: naming the feature, and the cure.
        """
        kind = self.config.get("peft_type")
        if not isinstance(kind, str):
            raise AdapterError(f"{self.path}: peft_type is {shown(kind)}; it must be LORA")
        if kind.upper() in _NO_WEIGHTS:
            raise AdapterError(
                f"{self.path}: is a {shown(kind)} adapter, which changes the prompt and no "
                "weights; it cannot be fused"
            )
        if kind.upper() != "LORA":
            raise AdapterError(f"{self.path}: is a {shown(kind)} adapter, and no LoRA; {_CONVERT}")
        for key, what in _FEATURES.items():
            if self.config.get(key):
                raise AdapterError(
                    f"{self.path}: is {what}, and no plain LoRA; it cannot be fused: train one "
                    f"without {key}, or use it in PEFT"
                )
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise AdapterError(
                f"{self.path}: init_lora_weights is {shown(start)}, with which PEFT changed the "
                "base before training, so that the adapter does not fit the base as it is; save "
                "it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        _ = self.rank, self.scale

    @property
    def trained_on(self) -> str | None:
        """The base's name, where it is recorded."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @cached_property
    def rank(self) -> int:
        """``r``, of modules that have none of their own.

        Raises:
            AdapterError: for what is no whole number above 0.
        """
        return self._rank(self.config.get("r", 8), "r")

    @property
    def scale(self) -> float:
        """The factor of the update of modules that have none of their own.

        Raises:
            AdapterError: for what is no finite number.
        """
        if self.chosen_scale is not None:
            return self.chosen_scale
        return self._scaling(self._alpha(self.config.get("lora_alpha", 8), "lora_alpha"), self.rank)

    def rank_of(self, module: str) -> int:
        """The rank of one module."""
        own = self._matching("rank_pattern", module)
        return self.rank if own is None else self._rank(own, "rank_pattern")

    def scale_of(self, module: str) -> float:
        """The factor of one module's update.

        Args:
            module: its path in the model that PEFT adapted.

        Raises:
            AdapterError: as :attr:`scale`.
        """
        if self.chosen_scale is not None:
            return self.chosen_scale
        own = self._matching("alpha_pattern", module)
        alpha = self.config.get("lora_alpha", 8) if own is None else own
        return self._scaling(self._alpha(alpha, "lora_alpha"), self.rank_of(module))

    def tokens_of(self, module: str) -> Sequence[int] | None:
        """Which rows of an embedding were trained (``trainable_token_indices``).

        Raises:
            AdapterError: for what is no list of token ids.
        """
        tokens = self.config.get("trainable_token_indices")
        if isinstance(tokens, dict):
            names = (key for key in tokens if module == key or module.endswith(f".{key}"))
            tokens = tokens.get(next(names, None))
        if tokens is None:
            return None
        if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
            raise AdapterError(
                f"{self.path}: trainable_token_indices is {shown(tokens)}; it must be a list of "
                "token ids"
            )
        return tokens

    def missing_targets(self, of_base: Iterable[str], of_file: Iterable[str]) -> tuple[str, ...]:
        """Names in ``target_modules`` that the base has modules of, and the file no tensor.

        A name is the end of a module's path, as in PEFT. Nothing is said of patterns, such as
        ``all-linear``, nor of what other settings may leave out.

        Args:
            of_base: paths of the base's matrices.
            of_file: paths of the modules in the adapter's file.
        """
        targets = self._names("target_modules")
        if isinstance(self.config.get("exclude_modules"), str):
            return ()
        excluded = self._names("exclude_modules") | self._names("modules_to_save")
        adapted = (path for path in of_base if self._is_in_layers(path))
        there = _ends(path for path in adapted if excluded.isdisjoint(_ends([path])))
        return tuple(sorted((there & targets) - _ends(of_file)))

    def _names(self, key: str) -> set[str]:
        names = self.config.get(key)
        return (
            {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
        )

    def _is_in_layers(self, path: str) -> bool:
        """Whether ``layers_to_transform`` leaves a module to be adapted."""
        layers = self.config.get("layers_to_transform")
        chosen = layers if isinstance(layers, list) else [layers]
        numbers = [int(part) for part in path.split(".") if part.isdecimal()]
        return chosen in ([], [None]) or any(number in chosen for number in numbers)

    def _scaling(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _matching(self, key: str, module: str) -> Any:
        """What a pattern says of a module: the first one that matches its end, as in PEFT."""
        patterns = self.config.get(key) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{self.path}: {key} is {shown(patterns)}; it must be an object")
        found = (value for pattern, value in patterns.items() if self._fits(key, pattern, module))
        return next(found, None)

    def _fits(self, key: str, pattern: str, module: str) -> bool:
        """Whether a pattern matches the end of a module's path."""
        if module == pattern or module.endswith(f".{pattern}"):
            return True
        plain = re.sub(r"([*+}])\?|\(\?", r"\1", pattern)
        nested = re.search(r"\)[*+{?]", plain)
        many = len(re.findall(r"[*+{?]", plain)) > _REPETITIONS
        if nested or many or max(len(pattern), len(module)) > _LONGEST_PATTERN:
            raise AdapterError(
                f"{self.path}: {key} has the pattern {shown(pattern)}, which may take without end "
                "to look for; write the modules' names instead"
            )
        try:
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error as error:
            raise AdapterError(
                f"{self.path}: {key} has {shown(pattern)}, which is no pattern ({error})"
            ) from error

    def _rank(self, value: Any, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise AdapterError(
                f"{self.path}: {name} is {shown(value)}; it must be a whole number above 0"
            )
        return value

    def _alpha(self, value: Any, name: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:
            raise AdapterError(f"{self.path}: {name} is {shown(value)}; it must be a finite number")
        return float(value)


def _ends(paths: Iterable[str]) -> set[str]:
    """All names that modules of these paths can be targeted by."""
    parts = (path.split(".") for path in paths)
    return {".".join(of[first:]) for of in parts for first in range(len(of))}
