"""Rotary embeddings: how the configuration scales them, as GGUF keys and tensors of factors.

mlx-lm and llama.cpp agree on each scheme up to where its constants lie. What a configuration
declares and its llama.cpp architecture cannot express is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType

from mlx_fusekit.gguf.models.hyperparameters import Hyperparameters
from mlx_fusekit.gguf.models.settings import Settings
from mlx_fusekit.gguf.models.tensors import GgufTensor

COUNT, REAL, TEXT = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING

#: Names that mean the same scheme.
_SYNONYMS = {"su": "longrope", "deepseek_yarn": "yarn", "mrope": "default"}
#: llama.cpp's constants of yarn, for architectures that do not read them from the file.
_BETAS = {"beta_fast": 32, "beta_slow": 1}


@dataclass(frozen=True, slots=True)
class RopeStyle:
    """What llama.cpp's graph of an architecture does with rotary embeddings.

    Attributes:
        scalings: the schemes it can run, beside none.
        ignored_by_mlx: whether mlx-lm's class leaves ``rope_scaling`` aside.
        yarn_multiplier: how it reads ``yarn_log_multiplier``: 0 not at all, else a factor of it.
        reads_betas: whether it reads yarn's ``beta_fast`` and ``beta_slow``.
        off: whether the file says that there is no scaling at all.
    """

    scalings: frozenset[str] = frozenset({"linear", "yarn"})
    ignored_by_mlx: bool = False
    yarn_multiplier: float = 0
    reads_betas: bool = False
    off: bool = False


PLAIN = RopeStyle()
PLAIN_IN_MLX = RopeStyle(ignored_by_mlx=True)
FACTORS = RopeStyle(frozenset({"linear", "yarn", "llama3"}))
ALL_FACTORS = RopeStyle(frozenset({"linear", "yarn", "llama3", "longrope"}))


@dataclass(frozen=True, slots=True)
class Rope:
    """Keys (without the architecture), tensors, and what the user should know."""

    keys: Hyperparameters = field(default_factory=dict)
    tensors: list[GgufTensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rope_of(settings: Settings, style: RopeStyle, dims: int) -> Rope:
    """What a file says about a model's rotary embeddings.

    Args:
        settings: of the model.
        style: of its llama.cpp architecture.
        dims: how many dimensions of a head are rotated.

    Raises:
        CheckpointError: when llama.cpp cannot run what the configuration declares.
    """
    rope = Rope()
    nested, plain = _parameters(settings), settings.declared.get("rope_scaling") or {}
    if nested and plain and _kind(nested) != _kind(plain):
        raise settings.refuse(
            f"rope_scaling says {_kind(plain)}, but rope_parameters {_kind(nested)}; correct one "
            "of them"
        )
    theta = _theta(settings, nested, rope.notes)
    rope.keys["rope.dimension_count"] = (dims, COUNT)
    rope.keys["rope.freq_base"] = (theta, REAL)
    block = nested or plain
    kind = _kind(block)
    if kind != "default":
        if kind not in style.scalings:
            known = ", ".join(sorted(style.scalings))
            raise settings.refuse(
                f"llama.cpp has no rotary embedding scaled by {kind!r} for this architecture (it "
                f"has {known}), so the model cannot be exported"
            )
        _note_what_mlx_ignores(settings, style, kind, rope.notes)
        _SCHEMES[kind](_Scaling(rope, settings, style, block, dims, theta))
    elif style.off:
        rope.keys["rope.scaling.type"] = ("none", TEXT)
    return rope


def local_theta(settings: Settings) -> float:
    """The base of layers that see a window only, where they have their own."""
    block = settings.declared.get("rope_parameters") or {}
    local = block.get("sliding_attention") or {}
    return float(local.get("rope_theta") or settings["rope_local_base_freq"])


def _parameters(settings: Settings) -> Mapping[str, Any]:
    """``rope_parameters`` as transformers 5 writes them; of layers that see everything."""
    block = settings.declared.get("rope_parameters") or {}
    inner = block.get("full_attention", block)
    return inner if isinstance(inner, dict) else {}


def _kind(block: Mapping[str, Any]) -> str:
    kind = str(block.get("type") or block.get("rope_type") or "default")
    return _SYNONYMS.get(kind, kind)


def _theta(settings: Settings, nested: Mapping[str, Any], notes: list[str]) -> float:
    inner, plain = nested.get("rope_theta"), settings.declared.get("rope_theta")
    if inner is not None and plain is not None and float(inner) != float(plain):
        raise settings.refuse(
            f"rope_theta is {plain}, but {inner} in rope_parameters; correct one of them"
        )
    used = settings.used.get("rope_theta")
    declared = next((value for value in (inner, plain, used) if value is not None), None)
    if declared is None:
        return float(settings["rope_theta"])
    if used is not None and float(used) != float(declared):
        notes.append(
            f"mlx-lm runs this model with rope_theta {used}; the file has {declared}, as "
            "rope_parameters in config.json say"
        )
    return float(declared)


def _note_what_mlx_ignores(
    settings: Settings, style: RopeStyle, kind: str, notes: list[str]
) -> None:
    read = any(settings.used.get(key) for key in ("rope_scaling", "rope_parameters"))
    if style.ignored_by_mlx or not read:
        notes.append(
            f"mlx-lm ignores the {kind} scaling of the rotary embedding that config.json "
            "declares; llama.cpp will apply it"
        )


@dataclass(frozen=True, slots=True)
class _Scaling:
    """A scaling that is being put into a file."""

    rope: Rope
    settings: Settings
    style: RopeStyle
    block: Mapping[str, Any]
    dims: int
    theta: float

    def linear(self) -> None:
        """Positions divided by a factor."""
        self._say("scaling.type", "linear", TEXT)
        self._say("scaling.factor", self._factor, REAL)

    def llama3(self) -> None:
        """Llama 3.1's: long wave lengths stretched, short ones kept, a blend between."""
        low, high = self._get("low_freq_factor", 1), self._get("high_freq_factor", 4)
        original = self._get("original_max_position_embeddings", 8192)
        waves = 2 * np.pi * self.theta ** (np.arange(0, self.dims, 2) / self.dims)
        blend = np.clip((original / waves - low) / (high - low), 0, 1)
        self._add("rope_freqs", 1 / ((1 - blend) / self._factor + blend))

    def yarn(self) -> None:
        """YaRN (arXiv 2309.00071).

        llama.cpp multiplies queries and keys by ``0.1 ln(factor) + 1`` and by the attention factor
        of the file, mlx-lm by that formula of ``mscale`` over that of ``mscale_all_dim``.
        """
        self._say("scaling.type", "yarn", TEXT)
        self._say("scaling.factor", self._factor, REAL)
        original = int(self._required("original_max_position_embeddings"))
        self._say("scaling.original_context_length", original, COUNT)
        for name, usual in _BETAS.items():
            beta = self._get(name, usual)
            if beta != usual and not self.style.reads_betas:
                raise self.settings.refuse(
                    f"llama.cpp runs this architecture's yarn with {name} {usual} only, not "
                    f"{beta:g}, so the model cannot be exported"
                )
            self._say(f"scaling.yarn_{name}", beta, REAL)
        wanted = self._magnitude(self._get("mscale", 1))
        wanted /= self._magnitude(self._get("mscale_all_dim", 0))
        self._check_attention_factor(wanted)
        given = self._with_multiplier() if self.style.yarn_multiplier else self._magnitude(1)
        if not math.isclose(wanted, given, rel_tol=1e-7):
            self._say("scaling.attn_factor", wanted / given, REAL)

    def _with_multiplier(self) -> float:
        """Say ``mscale_all_dim``; what llama.cpp then multiplies queries and keys by."""
        mscale, all_dim = self._get("mscale", 1), self._get("mscale_all_dim", 0)
        also_of_scores = self.style.yarn_multiplier != 1
        if also_of_scores and mscale != all_dim:
            # Deepseek's graph scales attention scores by it too, and takes both to be the same.
            raise self.settings.refuse(
                "llama.cpp runs this architecture's yarn with equal mscale and mscale_all_dim "
                f"only, not {mscale:g} and {all_dim:g}, so the model cannot be exported"
            )
        if all_dim:
            multiplier = self.style.yarn_multiplier * all_dim
            self._say("scaling.yarn_log_multiplier", multiplier, REAL)
        return self._magnitude(mscale if also_of_scores else 1) / self._magnitude(all_dim)

    def longrope(self) -> None:
        """LongRoPE (arXiv 2402.13753): factors found by search, for short and long contexts."""
        original = self.settings.used.get("original_max_position_embeddings")
        original = int(original or self._required("original_max_position_embeddings"))
        stretch = int(self.settings["max_position_embeddings"]) / original
        wanted = 1.0
        if stretch > 1:
            wanted = math.sqrt(1 + math.log(stretch) / math.log(original))
        self._check_attention_factor(wanted)
        self._say("scaling.type", "longrope", TEXT)
        self._say("scaling.original_context_length", original, COUNT)
        self._say("scaling.attn_factor", wanted, REAL)
        for length in ("long", "short"):
            factors = np.asarray(self._required(f"{length}_factor"), np.float64)
            if factors.shape != (self.dims // 2,):
                raise self.settings.refuse(
                    f"{length}_factor of its rotary embedding has shape {list(factors.shape)}, "
                    f"not [{self.dims // 2}]; correct it"
                )
            self._add(f"rope_factors_{length}", factors)
        self.rope.notes.append(
            "mlx-lm uses the long factors of the rotary embedding for every text; llama.cpp uses "
            f"the short ones in contexts of up to {original} tokens, as the model was trained"
        )

    def _check_attention_factor(self, wanted: float) -> None:
        declared = self._get("attention_factor", wanted)
        if not math.isclose(declared, wanted, rel_tol=1e-5):
            raise self.settings.refuse(
                f"mlx-lm ignores the attention_factor {declared:g} of the rotary embedding and "
                f"runs {wanted:g}; remove it to export the model as mlx-lm runs it"
            )

    @property
    def _factor(self) -> float:
        return float(self._required("factor"))

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self._factor <= 1 else 0.1 * mscale * math.log(self._factor) + 1

    def _required(self, key: str) -> Any:
        if self.block.get(key) is None:
            raise self.settings.refuse(f"the scaling of its rotary embedding has no {key}; add it")
        return self.block[key]

    def _get(self, key: str, default: float) -> float:
        return float(default if self.block.get(key) is None else self.block[key])

    def _say(self, name: str, value: float | str, kind: GGUFValueType) -> None:
        self.rope.keys[f"rope.{name}"] = (value, kind)

    def _add(self, name: str, factors: npt.NDArray[np.float64]) -> None:
        values = factors.astype(np.float32)
        tensor = GgufTensor(f"{name}.weight", "", values.shape, float32=True, values=values)
        self.rope.tensors.append(tensor)


_SCHEMES = {
    "linear": _Scaling.linear,
    "llama3": _Scaling.llama3,
    "yarn": _Scaling.yarn,
    "longrope": _Scaling.longrope,
}
