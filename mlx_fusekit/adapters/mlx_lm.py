"""mlx-lm's adapter folders: ``adapter_config.json`` beside ``adapters.safetensors``.

The tensors are those of ``mlx_lm.tuner``: ``<module>.lora_a``, ``<module>.lora_b`` and DoRA's
``<module>.m``, or for full fine-tunes the parameters themselves.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlx_fusekit.adapters.fitting import (
    base_warnings,
    check_targeted,
    closest,
)
from mlx_fusekit.adapters.ignoring import Ignored
from mlx_fusekit.adapters.low_rank import factor, fitted
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.mlx_lm_settings import AdapterSettings
from mlx_fusekit.adapters.towers import why_not_run
from mlx_fusekit.adapters.updates import Adapter, FullUpdate, Update
from mlx_fusekit.adapters.values import read_finite
from mlx_fusekit.adapters.whole import put_whole
from mlx_fusekit.checkpoint.base import BaseModel, TensorSource
from mlx_fusekit.checkpoint.belongings import ADAPTER_CONFIG_NAME as CONFIG_NAME
from mlx_fusekit.checkpoint.header import Header, TensorRef
from mlx_fusekit.errors import AdapterError

_LORA_LEAVES = ("lora_a", "lora_b")
_DORA_LEAVES = ("lora_a", "lora_b", "m")
#: What mlx-vlm's own layers, up to its version 0.4, called the same matrices.
_MLX_VLM_LEAVES = {"A": "lora_a", "B": "lora_b"}
_FUSED_PROJECTION = re.compile(r"\.lora_[ab]\.\d+$")


@dataclass(frozen=True)
class MlxLmAdapter:
    """mlx-lm's kind of :class:`~mlx_fusekit.adapters.updates.AdapterFolder`."""

    folder: Path
    settings: AdapterSettings
    header: Header
    ignored: Ignored

    @classmethod
    def of(cls, settings: AdapterSettings, header: Header, ignored: Ignored) -> "MlxLmAdapter":
        """An adapter from what was read of its folder.

        Raises:
            AdapterError: naming what is wrong, and the cure.
        """
        if not header.tensors:
            raise AdapterError(f"{header.file}: holds no tensors; train the adapter first")
        adapter = cls(settings.path.parent, settings, header, ignored)
        _ = adapter.kind
        return adapter

    @property
    def config(self) -> Mapping[str, Any]:
        """``adapter_config.json``."""
        return self.settings.config

    @property
    def kind(self) -> str:
        """``lora``, ``dora`` or ``full``."""
        return self.settings.kind

    @property
    def files(self) -> tuple[Path, ...]:
        """What the adapter is made of."""
        return self.settings.path, self.header.file

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """As they are stored, by name."""
        return self.header.tensors

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules that have a tensor in it."""
        whole = self.header.tensors if self.kind == "full" else self.whole
        modules = [] if self.kind == "full" else [*self.modules]
        return tuple(dict.fromkeys([*modules, *(name.rpartition(".")[0] for name in whole)]))

    @property
    def scale(self) -> float:
        """The factor of LoRA's and DoRA's update, of modules that have none of their own."""
        return self.settings.scale

    @property
    def rank(self) -> int | None:
        """Of LoRA's and DoRA's matrices, where it is recorded."""
        return None if self.kind == "full" else self.settings.rank

    @property
    def num_layers(self) -> int | None:
        """How many of the last layers were adapted, where it is recorded."""
        return self.settings.num_layers

    @property
    def trained_on(self) -> str | None:
        """The base's name, where it is recorded."""
        return self.settings.trained_on

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the settings were read, one line each."""
        return (*self.settings.notes, *self.ignored.notes(self.folder.name))

    @property
    def mlx_lm_config(self) -> dict[str, Any] | None:
        """``adapter_config.json`` as today's mlx-lm reads it, for the tensors that are there.

        None of what mlx-lm since 0.32 does not load: whole values beside matrices, and ranks that
        differ; and where some are ignored, since it would read the whole file.
        """
        if self.ignored.modules:
            return None
        if self.kind == "full":
            return {"fine_tune_type": "full"}
        ranks = {min(leaves["lora_b"].shape[-2:], default=0) for leaves in self.modules.values()}
        if self.whole or len(ranks) > 1:
            return None
        rank = self.settings.rank
        parameters = {"rank": rank, "scale": self.scale, "dropout": 0.0, "keys": [*self.modules]}
        return {"fine_tune_type": self.kind, "num_layers": 1, "lora_parameters": parameters}

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, TensorRef]]:
        """LoRA and DoRA tensors by module path and leaf name.

        Raises:
            AdapterError: for a tensor that is none of an adapter's, or one whose pair is missing.
        """
        leaves = _DORA_LEAVES if self.kind == "dora" else _LORA_LEAVES
        modules: dict[str, dict[str, TensorRef]] = defaultdict(dict)
        for name, tensor in self.header.tensors.items():
            module, _, leaf = name.rpartition(".")
            leaf = _MLX_VLM_LEAVES.get(leaf, leaf)
            if name in self.whole.values():
                continue
            if leaf not in leaves or not module:
                raise AdapterError(f"{self.header.file}: {self._stranger(name)}")
            if leaf in modules[module]:
                raise AdapterError(
                    f"{self.header.file}: {module} has {leaf} twice, under mlx-lm's name and "
                    "mlx-vlm's; remove one"
                )
            modules[module][leaf] = tensor
        for module, tensors in modules.items():
            if missing := next((leaf for leaf in leaves if leaf not in tensors), None):
                raise AdapterError(
                    f"{self.header.file}: {module}.{missing} is missing beside "
                    f"{next(iter(tensors.values())).name}; the adapter was not saved whole"
                )
        return modules

    @cached_property
    def whole(self) -> Mapping[str, str]:
        """Names of tensors that take the place of the base's, by the base's names.

        mlx-lm loads them beside LoRA's matrices; of a linear that has those, it finds the bias
        one level deeper.
        """
        names = self.header.tensors
        adapted = {name.removesuffix(".lora_a") for name in names if name.endswith(".lora_a")}
        found = {}
        for name in names if adapted else ():
            module, _, leaf = name.rpartition(".")
            outer = module.removesuffix(".linear")
            if leaf == "bias" and outer in adapted:
                found[f"{outer}.bias"] = name
            elif leaf in ("weight", "bias") and module not in adapted:
                found[name] = name
        return MappingProxyType(found)

    def _stranger(self, name: str) -> str:
        """Why a tensor cannot be in this adapter."""
        if _FUSED_PROJECTION.search(name):
            return (
                f"{name!r} belongs to an adapter of projections that afm7 fuses into one, which "
                "mlx-lm trains but does not load again; train with lora_parameters.keys that "
                "leave them out"
            )
        leaves = _DORA_LEAVES if self.kind == "dora" else _LORA_LEAVES
        return (
            f"tensor {name!r} is not one that a {self.kind} adapter of mlx-lm has "
            f"({', '.join(leaves)}); check fine_tune_type in {CONFIG_NAME}"
        )

    @property
    def target_tensors(self) -> set[str]:
        """Names of the base's tensors that the adapter changes."""
        if self.kind == "full":
            return set(self.header.tensors)
        return {f"{module}.weight" for module in self.modules} | set(self.whole)

    def bind(self, base: BaseModel, base_id: str | None = None, *, scaled: bool = True) -> Adapter:
        warnings = [*self.notes, *base_warnings(self.settings.trained_on, base_id)]
        if self.kind == "full":
            weights, parameters = self._bind_whole(base, {n: n for n in self.header.tensors})
            return Adapter(self.kind, weights, parameters, tuple(warnings))
        check_targeted(self.settings, self.header.file, self.modules, base)
        updates, parameters = self._bind_whole(base, self.whole)
        for module, tensors in self.modules.items():
            updates[module], note = self._bind_low_rank(base, module, tensors, scaled=scaled)
            warnings += [note] if note else []
        self._check_ranks(updates)
        found = MappingProxyType(updates), MappingProxyType(parameters)
        return Adapter(self.kind, *found, tuple(warnings))

    def _bind_low_rank(
        self, base: BaseModel, module: str, tensors: Mapping[str, TensorRef], *, scaled: bool
    ) -> tuple[Update, str | None]:
        """A module's update, and what the user should know of it."""
        weight = base.tensors.get(f"{module}.weight")
        if weight is None:
            if why := why_not_run(tensors["lora_a"].name, module):
                raise AdapterError(f"{self.header.file}: {why}")
            raise AdapterError(
                f"{self.header.file}: {module} is no module of the base model"
                f"{closest(module, base)}; fuse into the model the adapter was trained on"
            )
        a, b = tensors["lora_a"], tensors["lora_b"]
        up_ref, down_ref = (a, b) if _is_embedding(module, weight, a, b) else (b, a)
        up, down = (read_finite(ref) for ref in (up_ref, down_ref))
        if up.ndim == 2:
            # A linear keeps lora_a as [columns, rank] and lora_b as [rank, rows]; an embedding
            # lora_a as [rows, rank] and lora_b as [rank, columns]; experts are as we want them.
            if up_ref is b:
                up, down = up.T, down.T
            up, down = up[None], down[None]
        elif up.ndim != 3:
            raise AdapterError(
                f"{self.header.file}: {b.name} has shape {list(b.shape)}; want 2 or 3 axes"
            )
        magnitude = read_finite(tensors["m"]) if "m" in tensors else None
        update, note = fitted(
            base,
            module,
            up,
            down,
            magnitude,
            scale=factor(self.settings.scale_of(module), self.scale, scaled=scaled),
            file=self.header.file,
            have=", ".join(f"{leaf} {list(ref.shape)}" for leaf, ref in sorted(tensors.items())),
            cure=f"correct 'scale' in {CONFIG_NAME}",
        )
        return update, note

    def _check_ranks(self, updates: Mapping[str, Update]) -> None:
        """Refuse settings of other matrices.

        One number cannot say the ranks of modules that differ, and mlx-lm loads those all the same.
        """
        ranks = {
            module: update.rank
            for module, update in updates.items()
            if isinstance(update, LowRankUpdate)
        }
        for module, rank in ranks.items():
            declared = self.settings.rank_of(module)
            alike = len(set(ranks.values())) == 1 or declared != self.settings.rank
            if declared is not None and declared != rank and (alike or not rank):
                raise AdapterError(
                    f"{self.header.file}: {module} has rank {rank}, but {CONFIG_NAME} says "
                    f"{declared}; correct 'rank' there"
                )

    def _bind_whole(
        self, base: BaseModel, names: Mapping[str, str]
    ) -> tuple[dict[str, Update], dict[str, FullUpdate]]:
        """Values that take the place of the base's, by the base's names."""
        weights: dict[str, Update] = {}
        parameters: dict[str, FullUpdate] = {}
        for name, stored in names.items():
            tensor = replace(self.header.tensors[stored], name=name)
            put_whole(base, name, tensor, self.header.file, weights, parameters)
        return weights, parameters


def _is_embedding(module: str, weight: TensorSource, a: TensorRef, b: TensorRef) -> bool:
    """Whether lora_a is ``[rows, rank]`` and lora_b ``[rank, columns]``, as an embedding's are.

    The shapes decide, save for a square weight: there the name does.
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or len(weight.shape) != 2:
        return False
    rows = weight.shape[0]
    as_linear, as_embedding = b.shape[1] == rows, a.shape[0] == rows
    if as_linear and as_embedding:
        leaf = module.rpartition(".")[2]
        return "emb" in leaf or leaf in ("wte", "wpe")
    return as_embedding
