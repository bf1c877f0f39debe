"""Keys of a GGUF file that say what a model computes, as data.

Names are those of llama.cpp (``gguf.Keys``) without the architecture in front. llama.cpp reads a
key by its exact type, so each entry names it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from gguf import ExpertGatingFuncType, GGUFValueType, GGUFWriter

from mlx_fusekit.gguf.models.settings import Settings

#: A value as GGUF types it; arrays are lists of whole numbers or of booleans.
Hyperparameters: TypeAlias = dict[str, tuple[Any, GGUFValueType]]

#: Of a model whose configuration does not say how long its context is; Llama's own default.
DEFAULT_CONTEXT = 2048
_LARGEST_FLOAT32 = 3.4e38


@dataclass(frozen=True, slots=True)
class Key:
    """One key, and where its value comes from.

    Attributes:
        name: without the architecture, as ``attention.head_count``.
        type: what llama.cpp reads it as.
        value: name of a setting, or a function of them all, or the value itself. A function's None
            leaves the key out.
    """

    name: str
    type: GGUFValueType
    value: str | float | Callable[[Settings], Any]

    def of(self, settings: Settings) -> Any:
        """The value, in the Python type that belongs to the key's.

        Raises:
            CheckpointError: when the configuration lacks it.
        """
        found = self.value
        if isinstance(found, str):
            found = settings[found]
        elif callable(found):
            found = found(settings)
        convert = {GGUFValueType.UINT32: int, GGUFValueType.FLOAT32: float}.get(self.type)
        if found is None or convert is None:
            return found
        try:
            number = convert(found)
        except (TypeError, ValueError, OverflowError) as error:
            raise settings.refuse(f"{self._setting} must be a number, not {found!r}") from error
        if not (0 <= number < 2**32 if convert is int else abs(number) <= _LARGEST_FLOAT32):
            raise settings.refuse(f"{self._setting} cannot be {found!r} in a GGUF file; correct it")
        return number

    @property
    def _setting(self) -> str:
        """What the key is made from, for messages."""
        return self.value if isinstance(self.value, str) else self.name


count = partial(Key, type=GGUFValueType.UINT32)
real = partial(Key, type=GGUFValueType.FLOAT32)
flag = partial(Key, type=GGUFValueType.BOOL)
array = partial(Key, type=GGUFValueType.ARRAY)


def evaluate(keys: Iterable[Key], settings: Settings) -> Hyperparameters:
    """The values of keys for one model, by name without the architecture."""
    values = ((key, key.of(settings)) for key in keys)
    return {key.name: (value, key.type) for key, value in values if value is not None}


def write(hyperparameters: Hyperparameters, writer: GGUFWriter) -> None:
    """Put hyperparameters, named in full, into a file's header."""
    for name, (value, kind) in hyperparameters.items():
        if kind is GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, kind)


def sliding_pattern(period: int, *, default: int) -> Callable[[Settings], list[bool] | None]:
    """Which layers see a window only, where that is not what llama.cpp assumes.

    Args:
        period: every how many layers mlx-lm's class has one that sees everything; 0 where
            ``sliding_window_pattern`` says it.
        default: the period that llama.cpp assumes.
    """

    def pattern(settings: Settings) -> list[bool] | None:
        slides = sliding_layers(settings, period or int(settings["sliding_window_pattern"]))
        usual = [(i + 1) % default != 0 for i in settings.layer_numbers()]
        return None if slides == usual else slides

    return pattern


def sliding_layers(settings: Settings, period: int) -> list[bool]:
    """Which layers see a window only, from ``layer_types`` where mlx-lm's class reads that."""
    types = settings.used.get("layer_types")
    if types is None:
        return [(i + 1) % period != 0 for i in settings.layer_numbers()]
    return [kind == "sliding_attention" for kind in types]


BASE = (
    count(name="block_count", value="num_hidden_layers"),
    count(name="context_length", value=lambda s: s.get("max_position_embeddings", DEFAULT_CONTEXT)),
    count(name="embedding_length", value="hidden_size"),
    count(name="feed_forward_length", value="intermediate_size"),
    count(name="attention.head_count", value="num_attention_heads"),
    count(name="attention.head_count_kv", value=lambda s: s.key_value_heads),
    count(name="vocab_size", value="vocab_size"),
)
HEADS = (
    count(name="attention.key_length", value=lambda s: s.head_dim),
    count(name="attention.value_length", value=lambda s: s.head_dim),
)
RMS_NORM = (real(name="attention.layer_norm_rms_epsilon", value="rms_norm_eps"),)
LAYER_NORM = (real(name="attention.layer_norm_epsilon", value="layer_norm_eps"),)
WINDOW = (count(name="attention.sliding_window", value="sliding_window"),)
GRANITE_SCALES = (
    real(name="attention.scale", value="attention_multiplier"),
    real(name="embedding_scale", value="embedding_multiplier"),
    real(name="residual_scale", value="residual_multiplier"),
    real(name="logit_scale", value="logits_scaling"),
)
SIGMOID_GATE = count(name="expert_gating_func", value=int(ExpertGatingFuncType.SIGMOID))
SHARED_EXPERT = (
    count(name="expert_shared_feed_forward_length", value="shared_expert_intermediate_size"),
)


def experts(total: str, size: str = "moe_intermediate_size") -> tuple[Key, ...]:
    """Keys of a mixture of experts: their number, how many are used, how wide they are."""
    return (
        count(name="expert_count", value=total),
        count(name="expert_used_count", value="num_experts_per_tok"),
        count(name="expert_feed_forward_length", value=size),
    )


def without(keys: tuple[Key, ...], *names: str) -> tuple[Key, ...]:
    """Keys but for some, by name."""
    return tuple(key for key in keys if key.name not in names)
