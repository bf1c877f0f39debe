"""An adapter in PEFT's form, for transformers 5.

Modules have the paths of transformers' models. A linear's ``lora_A`` is ``[rank, columns]`` and its
``lora_B`` ``[rows, rank]``; an embedding's ``lora_embedding_A`` is ``[rank, tokens]`` and its
``lora_embedding_B`` ``[columns, rank]``. What is saved as a whole stands by its own name.
Source: ``tuners/lora`` and ``utils/save_and_load.py`` of PEFT 0.21.2.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.peft_names import ModulesOf
from mlx_fusekit.adapters.updates import Adapter
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.belongings import PEFT_WEIGHTS
from mlx_fusekit.checkpoint.class_values import ClassValues
from mlx_fusekit.checkpoint.mlx_lm import embedding_modules
from mlx_fusekit.converting.files import AdapterFiles, values_of, whole_values, whole_weights
from mlx_fusekit.converting.peft_experts import ExpertParts, experts_of, joined
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.floats import Float32

_PREFIX = "base_model.model."


def peft_files(
    adapter: Adapter, base: BaseModel, *, scale: float, trained_on: str | None
) -> AdapterFiles:
    """The folder of an adapter.

    Args:
        adapter: its updates without the scale.
        base: what it was bound to.
        scale: of all updates.
        trained_on: the base's name.

    Raises:
        AdapterError: for what PEFT cannot hold, or has no name for.
    """
    form = _Form(base, scale)
    form.add_updates(adapter)
    form.add_whole(adapter)
    tensors = {f"{_PREFIX}{name}": values for name, values in form.tensors.items()}
    config = form.config()
    if trained_on is not None:
        config["base_model_name_or_path"] = trained_on
    return AdapterFiles(PEFT_WEIGHTS, tensors, config)


@dataclass
class _Form:
    """What the folder will hold, as it is put together.

    Attributes:
        ranks: of each adapted module or parameter, by the path that patterns are matched with.
        targets: modules that PEFT is to put layers around.
        parameters: parameters that it is to put them around.
        saved: modules that it is to save as a whole.
        biases: modules whose bias was trained.
    """

    base: BaseModel
    scale: float
    tensors: dict[str, Float32] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    dora: bool = False

    def add_updates(self, adapter: Adapter) -> None:
        """Note all that is made of two matrices."""
        updates = {m: u for m, u in adapter.weights.items() if isinstance(u, LowRankUpdate)}
        dora = [m for m, update in updates.items() if update.magnitude is not None]
        if dora and len(dora) < len(updates):
            plain = next(module for module in updates if module not in dora)
            raise AdapterError(
                f"{plain}: is LoRA and {dora[0]} DoRA, and PEFT has one for all; fuse the adapter"
            )
        self.dora = bool(dora)
        embeddings = embedding_modules(self.base.config)
        stacked: dict[str, dict[str, LowRankUpdate]] = defaultdict(dict)
        for module, update in updates.items():
            if (place := experts_of(module, self.base)) is not None:
                stacked[place.block][place.projection] = update
            else:
                self._add(module, update, is_embedding=module in embeddings)
        for block, parts in stacked.items():
            self._add_experts(block, joined(parts, self.base, block))

    def _add(self, module: str, update: LowRankUpdate, *, is_embedding: bool) -> None:
        self._refuse_changed(f"{module}.weight", of_updates=True)
        name = self._name(module)
        up, down = update.up[0], update.down[0]
        self.ranks[name] = update.rank
        if is_embedding:
            if update.magnitude is not None:
                raise AdapterError(
                    f"{module}: is DoRA of an embedding, which is not written for PEFT; fuse the "
                    "adapter"
                )
            self.tensors[f"{name}.lora_embedding_A"] = np.ascontiguousarray(up.T)
            self.tensors[f"{name}.lora_embedding_B"] = np.ascontiguousarray(down.T)
        else:
            self.tensors[f"{name}.lora_A.weight"] = down
            self.tensors[f"{name}.lora_B.weight"] = up
        if update.magnitude is not None:
            self.tensors[f"{name}.lora_magnitude_vector"] = update.magnitude
        if self._is_router(module):
            self.ranks[f"{name}.weight"] = self.ranks.pop(name)
            self.parameters.append(f"{name}.weight")
        else:
            self.targets.append(name)

    def _is_router(self, module: str) -> bool:
        """Whether it chooses experts: in transformers 5 that is a parameter, and no linear."""
        block, _, leaf = module.rpartition(".")
        return leaf == "gate" and any(
            experts_of(f"{block}.{between}.down_proj", self.base)
            for between in ("switch_mlp", "experts", "switch_glu")
        )

    def _add_experts(self, block: str, parts: ExpertParts) -> None:
        """Note the experts of a layer, as layers around one or two parameters."""
        module = self._name_of_experts(block)
        for parameter, update in parts.items():
            inner = parameter == "gate_up_proj" and len(parts) > 1
            name = f"{module}.base_layer" if inner else module
            experts, rank, columns = update.down.shape
            flat = update.up.transpose(1, 2, 0).reshape(-1, rank * experts)
            self.tensors[f"{name}.lora_A.weight"] = update.down.reshape(-1, columns)
            self.tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(flat)
            self.ranks[f"{module}.{parameter}"] = rank
            self.parameters.append(f"{module}.{parameter}")

    def add_whole(self, adapter: Adapter) -> None:
        """Note what takes the place of the base's."""
        whole = {f"{m}.weight": values_of(u.tensor) for m, u in whole_weights(adapter).items()}
        for name, values in {**whole, **whole_values(adapter)}.items():
            self._refuse_changed(name, of_updates=False)
            module, _, leaf = name.rpartition(".")
            path = self._name(module)
            if leaf == "bias" and path not in self.saved:
                self.biases.append(path)
            elif leaf == "weight":
                self.saved.append(path)
            else:
                raise AdapterError(f"{name}: PEFT saves weights and biases alone; fuse the adapter")
            inner = ".base_layer" if path in self.targets else ""
            self.tensors[f"{path}{inner}.{leaf}"] = values

    def _refuse_changed(self, name: str, *, of_updates: bool) -> None:
        """Refuse what mlx-lm's class makes of another value, whose way back is not known here."""
        values = ClassValues(self.base.config)
        if values.multiplies(name) if of_updates else values.changes(name):
            raise AdapterError(
                f"{name}: mlx-lm has other values of it than transformers in a "
                f"{self.base.config.get('model_type')} model; write the adapter with --to mlx"
            )

    def _name(self, module: str) -> str:
        """The path of a module in transformers."""
        name = module
        if module.startswith("language_model."):
            inner = module.removeprefix("language_model.")
            trunk = inner.removeprefix("model.")
            name = inner if trunk == inner else f"model.language_model.{trunk}"
        return self._checked(name, module)

    def _name_of_experts(self, block: str) -> str:
        before, _, leaf = block.rpartition(".")
        # transformers 5 calls it mlp in the models that had another name for it, but for Granite.
        granite = str(self.base.config.get("model_type")).startswith("granite")
        renamed = leaf == "block_sparse_moe" and not granite
        inner = f"{before}.mlp" if renamed else block
        return f"{self._name(before)}.{inner.rpartition('.')[2]}.experts"

    def _checked(self, name: str, module: str) -> str:
        if self._found(name) not in (None, module):
            raise AdapterError(f"{module}: has no name in transformers that is known; fuse it")
        return name

    def _found(self, name: str) -> str | None:
        return ModulesOf(self.base).plain(name)

    def config(self) -> dict[str, Any]:
        """``adapter_config.json``."""
        rank = Counter(self.ranks.values()).most_common(1)[0][0] if self.ranks else 8
        others = {name: own for name, own in self.ranks.items() if own != rank}
        lora_only = set(self.biases) <= set(self.targets)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": _whole(self.scale * rank),
            "rank_pattern": _shortened(others, self.ranks),
            "alpha_pattern": {
                name: _whole(self.scale * own)
                for name, own in _shortened(others, self.ranks).items()
            },
            "use_rslora": False,
            "use_dora": self.dora,
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "bias": "none" if not self.biases else "lora_only" if lora_only else "all",
            "target_modules": self._shortest(self.targets),
            "target_parameters": sorted(self.parameters) or None,
            "modules_to_save": sorted(self.saved) or None,
            "init_lora_weights": True,
        }

    def _shortest(self, names: Collection[str]) -> list[str]:
        """Last parts of paths, where they name no other module of the base; else whole paths."""
        modules = {name.rpartition(".")[0] for name in self.base.tensors}
        last: dict[str, set[str]] = defaultdict(set)
        for module in modules:
            last[module.rpartition(".")[2]].add(module)
        targeted = {self._found(name) or name for name in names}
        alone = not self.base.beside and not any(m.startswith("language_model.") for m in modules)
        short = {leaf for leaf, known in last.items() if alone and known <= targeted}
        return sorted({_leaf(name) if _leaf(name) in short else name for name in names})


def _shortened(own: Mapping[str, int], every: Mapping[str, int]) -> dict[str, int]:
    """Ranks by the last part of a path, where all modules that end so have the same."""
    by_leaf: dict[str, set[int]] = defaultdict(set)
    for name, rank in every.items():
        by_leaf[_leaf(name)].add(rank)
    return {
        (_leaf(name) if len(by_leaf[_leaf(name)]) == 1 else name): rank
        for name, rank in own.items()
    }


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _whole(value: float) -> float:
    """A whole number as such, as PEFT writes it."""
    return int(value) if value == int(value) else value
