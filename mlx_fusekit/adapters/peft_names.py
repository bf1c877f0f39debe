"""From the names of a PEFT file's tensors to modules of a base in MLX's form.

PEFT names a tensor by the path of its module in the transformers model, with ``base_model.model.``
in front, and maybe the adapter's own name inside. MLX's models have the same paths but for what
leads to the layers, and for experts, which are one stacked matrix.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mlx_fusekit.adapters.towers import is_of_another_tower
from mlx_fusekit.checkpoint.base import BaseModel

#: What training wraps modules in, without another name for them.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
#: What some models keep in one matrix and others in several, in the order of its rows.
_FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
#: Classes of mlx-lm that take the rows of a fused matrix apart in another order.
_OTHER_ORDER = {("hunyuan", "qkv_proj")}
#: Classes whose experts have rows of gate and up by turns in transformers.
_BY_TURNS = ("gpt_oss",)
#: What leads to the text model's layers, in one tree or another.
_TRUNK = frozenset(
    ("model", "language_model", "text_model", "transformer", "decoder", "gpt_neox", "backbone")
)
_LEAVES = (
    (re.compile(r"(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight"), "lora_{}"),
    (re.compile(r"(.+)\.lora_(A|B)(?:\.[^.]+)?\.bias"), "lora_{}.bias"),
    (re.compile(r"(.+)\.lora_embedding_(A|B)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"), "embedding_{}"),
    (re.compile(r"(.+)\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?"), "magnitude"),
    (re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?"), "tokens"),
    (re.compile(r"(.+?)\.base_layer\.weight"), "base weight"),
    (re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(weight|bias)"), "{}"),
)
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)")
_EXPERTS = re.compile(r"(.+)\.experts((?:\.base_layer)*)")
#: What MLX's classes call the module of stacked experts.
_BETWEEN = ("switch_mlp", "experts", "switch_glu")
#: What Mixtral's experts call the three.
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class PeftName:
    """What a tensor is.

    Attributes:
        module: path of its module in the transformers model.
        leaf: ``lora_A``, ``lora_B``, ``embedding_A``, ``embedding_B``, ``magnitude``, ``tokens``,
            ``weight``, ``bias``, ``base weight`` or ``lora_B.bias``.
    """

    module: str
    leaf: str


def parsed(name: str) -> PeftName | None:
    """What the tensor of a name is; None for what PEFT does not write."""
    inner = _WRAPPERS.sub("", name)
    if inner.startswith("base_model."):
        inner = inner.removeprefix("base_model.").removeprefix("model.")
    for pattern, leaf in _LEAVES:
        if found := pattern.fullmatch(inner):
            return PeftName(found[1], leaf.format(*found.groups()[1:]))
    return None


def is_of_peft(name: str) -> bool:
    """Whether only PEFT gives a tensor such a name."""
    return any(part in name for part in (".lora_A.", ".lora_embedding_A", ".token_adapter."))


@dataclass(frozen=True)
class Expert:
    """One expert's matrix of a projection.

    Attributes:
        module: path of the stacked matrix in the base.
        number: of the expert.
    """

    module: str
    number: int


class ModulesOf:
    """Finds modules of a base by the paths that transformers gives them."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    @cached_property
    def _by_core(self) -> Mapping[str, str]:
        """Paths of modules by what remains of them without the trunk."""
        found: dict[str, str] = {}
        for name in self._base.tensors:
            module, _, leaf = name.rpartition(".")
            if leaf in ("weight", "bias") and not is_of_another_tower(module):
                found.setdefault(_core(module), module)
        return found

    def plain(self, module: str) -> str | None:
        """The module of a path; None where the base has none."""
        if f"{module}.weight" in self._base.tensors:
            return module
        if is_of_another_tower(module):
            return None
        return self._by_core.get(_core(module))

    def parts(self, module: str) -> tuple[str, ...]:
        """The base's modules that share the rows of a fused matrix, in their order."""
        before, _, leaf = module.rpartition(".")
        if (self._base.config.get("model_type"), leaf) in _OTHER_ORDER:
            return ()
        found = [self.plain(f"{before}.{part}") for part in _FUSED.get(leaf, ())]
        known = tuple(place for place in found if place is not None)
        return known if len(known) == len(found) else ()

    def expert(self, module: str) -> Expert | None:
        """One expert's place in a stacked matrix; None for what is no expert's."""
        found = _EXPERT.fullmatch(module)
        if found is None:
            return None
        stacked = self._stacked(found[1], _PROJECTIONS.get(found[3], found[3]))
        return None if stacked is None else Expert(stacked, int(found[2]))

    def experts(self, module: str) -> Mapping[str, str] | None:
        """The stacked matrices of all experts, by projection; None for what is no such module."""
        found = _EXPERTS.fullmatch(module)
        if found is None:
            return None
        names = ("gate_proj", "up_proj", "down_proj")
        places = {name: self._stacked(found[1], name) for name in names}
        known = {name: place for name, place in places.items() if place is not None}
        return known if len(known) == len(names) else None

    @property
    def gate_and_up_by_turns(self) -> bool:
        """Whether rows of gate and up alternate in transformers' parameter of all experts."""
        return self._base.config.get("model_type") in _BY_TURNS

    def _stacked(self, block: str, projection: str) -> str | None:
        # transformers 5 calls the block mlp in models that had another name for it.
        before, _, leaf = block.rpartition(".")
        blocks = [block, f"{before}.block_sparse_moe"] if leaf == "mlp" else [block]
        names = (f"{b}.{between}.{projection}" for b in blocks for between in _BETWEEN)
        return next((place for place in map(self.plain, names) if place is not None), None)


def _core(module: str) -> str:
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in _TRUNK:
        parts.pop(0)
    return ".".join(parts)
