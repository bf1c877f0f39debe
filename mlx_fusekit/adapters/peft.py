"""PEFT's adapter folders: ``adapter_config.json`` beside ``adapter_model.safetensors``.

A linear's ``lora_A`` is ``[rank, columns]`` and its ``lora_B`` ``[rows, rank]``; an embedding's
``lora_embedding_A`` is ``[rank, tokens]`` and its ``lora_embedding_B`` ``[columns, rank]``. Of all
experts in one parameter, ``lora_A`` is ``[experts * rank, columns]`` with the expert slowest, and
``lora_B`` ``[rows, rank * experts]`` with the expert fastest. What was saved as a whole
(``modules_to_save``, biases) stands there by its own name.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mlx_fusekit.adapters.fitting import base_warnings, closest, refuse_vocabulary
from mlx_fusekit.adapters.low_rank import fitted
from mlx_fusekit.adapters.peft_names import ModulesOf, is_of_another_tower, parsed
from mlx_fusekit.adapters.peft_settings import PeftSettings
from mlx_fusekit.adapters.updates import Adapter, FullUpdate, Update
from mlx_fusekit.adapters.values import read_finite
from mlx_fusekit.adapters.whole import put_whole
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.belongings import ADAPTER_CONFIG_NAME as CONFIG_NAME
from mlx_fusekit.checkpoint.header import Header, TensorRef
from mlx_fusekit.checkpoint.json_text import shown
from mlx_fusekit.errors import AdapterError
from mlx_fusekit.formats.floats import Float32

_WHERE = "fuse into the model that the adapter was trained on"
_PAIRS = (("lora_A", "lora_B"), ("embedding_A", "embedding_B"))


@dataclass(frozen=True)
class PeftAdapter:
    """PEFT's kind of :class:`~mlx_fusekit.adapters.updates.AdapterFolder`."""

    folder: Path
    settings: PeftSettings
    header: Header

    @classmethod
    def of(cls, settings: PeftSettings, header: Header) -> "PeftAdapter":
        """An adapter from what was read of its folder.

        Raises:
            AdapterError: naming what is wrong, and the cure.
        """
        if header.tensors:
            settings.check()
        adapter = cls(settings.path.parent, settings, header)
        if not any(
            leaf in _PAIRS[0] + _PAIRS[1] for leaves in adapter.modules.values() for leaf in leaves
        ):
            raise AdapterError(f"{header.file}: holds no LoRA tensors; train the adapter first")
        return adapter

    @property
    def config(self) -> Mapping[str, Any]:
        """``adapter_config.json``."""
        return self.settings.config

    @cached_property
    def kind(self) -> str:
        """``lora`` or ``dora``; what the file holds says which."""
        has = any("magnitude" in leaves for leaves in self.modules.values())
        return "dora" if has else "lora"

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
        """Modules that have a tensor in it, as transformers names them."""
        return tuple(self.modules)

    @property
    def target_tensors(self) -> set[str]:
        """Names of the base's tensors that the adapter changes, where the base calls them so."""
        return {
            f"{module}.{'bias' if set(leaves) == {'bias'} else 'weight'}"
            for module, leaves in self.modules.items()
        }

    @property
    def trained_on(self) -> str | None:
        """The base's name, where it is recorded."""
        return self.settings.trained_on

    @property
    def num_layers(self) -> int | None:
        """PEFT records none."""
        return None

    @property
    def rank(self) -> int | None:
        """Of modules that have none of their own."""
        return self.settings.rank

    @property
    def scale(self) -> float:
        """The factor of the update of modules that have none of their own."""
        return self.settings.scale

    @property
    def notes(self) -> tuple[str, ...]:
        """PEFT's settings leave nothing open."""
        return ()

    @property
    def mlx_lm_config(self) -> None:
        """None: mlx-lm does not read these files."""
        return None

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, TensorRef]]:
        """Tensors by the module's path in transformers and by what they are.

        Raises:
            AdapterError: for a tensor that is none of PEFT's, or one whose pair is missing.
        """
        modules: dict[str, dict[str, TensorRef]] = defaultdict(dict)
        for name, tensor in self.header.tensors.items():
            found = parsed(name)
            if found is None or found.leaf == "lora_B.bias":
                what = (
                    "a bias of lora_B, which fusing cannot keep" if found else "none that PEFT has"
                )
                raise AdapterError(f"{self.header.file}: tensor {shown(name)} is {what}")
            if found.leaf == "tokens":
                raise AdapterError(
                    f"{self.header.file}: {found.module} has trained rows of single tokens "
                    "(trainable_token_indices), which this version does not fuse; merge it with "
                    "PEFT (merge_and_unload)"
                )
            if found.leaf in modules[found.module]:
                raise AdapterError(
                    f"{self.header.file}: {shown(found.module)} has {found.leaf} twice; it holds "
                    "more than one adapter: save the one to fuse by itself"
                )
            modules[found.module][found.leaf] = tensor
        for module, leaves in modules.items():
            for first, second in _PAIRS:
                lonely = "magnitude" in leaves and not leaves.keys() & {"lora_A", "embedding_A"}
                if lonely or (first in leaves) != (second in leaves):
                    have = next(iter(leaves.values())).name
                    raise AdapterError(
                        f"{self.header.file}: {shown(module)} has {shown(have)} without its "
                        "pair; the adapter was not saved whole"
                    )
        return MappingProxyType(modules)

    def bind(self, base: BaseModel, base_id: str | None = None, *, scaled: bool = True) -> Adapter:
        """See :meth:`mlx_fusekit.adapters.updates.AdapterFolder.bind`."""
        return _Binding(self, base, scaled).adapter(base_warnings(self.trained_on, base_id))

    def factor(self, module: str, *, scaled: bool) -> float:
        """What a module's update is multiplied with."""
        own, common = self.settings.scale_of(module), self.scale
        if scaled:
            return own
        return 1.0 if own == common or not common else own / common


class _Binding:
    """An adapter and a base, and what comes of the two."""

    def __init__(self, adapter: PeftAdapter, base: BaseModel, scaled: bool) -> None:
        self._adapter, self._base, self._scaled = adapter, base, scaled
        self._file = adapter.header.file
        self._names = ModulesOf(base)
        self._weights: dict[str, Update] = {}
        self._parameters: dict[str, FullUpdate] = {}
        self._notes: list[str] = []

    def adapter(self, warnings: tuple[str, ...]) -> Adapter:
        """The adapter in neutral form."""
        experts: dict[str, dict[int, tuple[Float32, Float32]]] = defaultdict(dict)
        for module, leaves in self._adapter.modules.items():
            if "lora_A" not in leaves:
                self._plain(module, leaves)
            elif (expert := self._names.expert(module)) is not None:
                self._refuse_beside_lora(module, leaves)
                up, down = self._matrices(module, leaves)
                with np.errstate(over="ignore"):  # which is told where they are put together
                    up = up * np.float32(self._factor(module))
                experts[expert.module][expert.number] = up, down
            elif (places := self._names.experts(module)) is not None:
                self._refuse_beside_lora(module, leaves)
                self._all_experts(module, leaves, places)
            else:
                self._plain(module, leaves)
        for module, found in experts.items():
            self._stacked(module, found)
        return Adapter(
            self._adapter.kind,
            MappingProxyType(self._weights),
            MappingProxyType(self._parameters),
            (*warnings, *self._notes),
        )

    def _plain(self, module: str, leaves: Mapping[str, TensorRef]) -> None:
        """A module of its own."""
        place = self._names.plain(module)
        if place is None:
            raise AdapterError(f"{self._file}: {self._stranger(module)}")
        if "lora_A" in leaves:
            up, down = self._matrices(module, leaves)
            magnitude = read_finite(leaves["magnitude"]) if "magnitude" in leaves else None
            self._put(place, up[None], down[None], _shapes(leaves), self._factor(module), magnitude)
        if "embedding_A" in leaves:
            if "magnitude" in leaves:
                self._refuse_beside_lora(module, leaves)
            up, down = read_finite(leaves["embedding_A"]).T, read_finite(leaves["embedding_B"]).T
            self._check_rank(module, up.shape[-1])
            self._put(place, up[None], down[None], _shapes(leaves), self._factor(module))
        if "base weight" in leaves and leaves["base weight"].shape[:1] != self._rows(place):
            refuse_vocabulary(
                self._file,
                self._base,
                place,
                self._base.tensors[f"{place}.weight"],
                leaves["base weight"].shape[0],
            )
        for leaf in ("weight", "bias"):
            if leaf in leaves:
                name, tensor = f"{place}.{leaf}", leaves[leaf]
                put_whole(self._base, name, tensor, self._file, self._weights, self._parameters)

    def _refuse_beside_lora(self, module: str, leaves: Mapping[str, TensorRef]) -> None:
        more = sorted(set(leaves) - {"lora_A", "lora_B"})
        if more:
            what = "DoRA" if "magnitude" in leaves else more[0]
            raise AdapterError(
                f"{self._file}: {shown(module)} has {what}, which this version does not fuse into "
                "experts or embeddings; merge the adapter with PEFT (merge_and_unload)"
            )

    def _rows(self, place: str) -> tuple[int, ...]:
        return tuple(self._base.tensors[f"{place}.weight"].shape[:1])

    def _matrices(self, module: str, leaves: Mapping[str, TensorRef]) -> tuple[Float32, Float32]:
        """``[rows, rank]`` and ``[rank, columns]``."""
        down, up = read_finite(leaves["lora_A"]), read_finite(leaves["lora_B"])
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise AdapterError(
                f"{self._file}: {shown(module)} has {_shapes(leaves)}; lora_A must be "
                "[rank, columns] and lora_B [rows, rank]"
            )
        self._check_rank(module, up.shape[1])
        return up, down

    def _factor(self, module: str) -> float:
        return self._adapter.factor(module, scaled=self._scaled)

    def _check_rank(self, module: str, rank: int) -> None:
        told = self._adapter.settings.rank_of(module)
        if told != rank:
            raise AdapterError(
                f"{self._file}: {shown(module)} has rank {rank}, but {CONFIG_NAME} says {told}, "
                "which its scale is made of; correct r or rank_pattern there"
            )

    def _put(
        self,
        place: str,
        up: Float32,
        down: Float32,
        have: str,
        scale: float,
        magnitude: Float32 | None = None,
    ) -> None:
        """Note the update of a module of the base; ``have`` says what the file has of it."""
        if place in self._weights:
            raise AdapterError(f"{self._file}: has {place} twice, under two names; remove one")
        update, note = fitted(
            self._base,
            place,
            up,
            down,
            magnitude,
            scale=scale,
            file=self._file,
            have=have,
            cure=f"correct lora_alpha in {CONFIG_NAME}",
        )
        self._weights[place] = update
        self._notes += [note] if note else []

    def _all_experts(
        self, module: str, leaves: Mapping[str, TensorRef], places: Mapping[str, str]
    ) -> None:
        """The experts of one parameter, of which gate and up may be one."""
        gate, down_place = places["gate_proj"], places["down_proj"]
        experts, rows = self._base.tensors[f"{gate}.weight"].shape[:2]
        width = self._base.tensors[f"{down_place}.weight"].shape[1]
        # Rows and columns of either, and what MLX has in its place.
        either: dict[str, tuple[tuple[int, int], tuple[str, ...]]] = {
            "gate_up_proj": ((2 * rows, width), ("gate_proj", "up_proj")),
            "down_proj": ((width, rows), ("down_proj",)),
        }
        a, b = read_finite(leaves["lora_A"]), read_finite(leaves["lora_B"])
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % experts:
            raise AdapterError(
                f"{self._file}: {shown(module)} has {_shapes(leaves)}, which is not of the base's "
                f"{experts} experts; {_WHERE}"
            )
        rank = a.shape[0] // experts
        shape = (b.shape[0], a.shape[1])
        parameter = next((name for name, (known, _) in either.items() if known == shape), None)
        if parameter is None:
            raise AdapterError(
                f"{self._file}: {shown(module)} has {_shapes(leaves)}, which fits neither the "
                f"base's gate_up_proj nor its down_proj of {experts} experts; {_WHERE}"
            )
        name = f"{module.replace('.base_layer', '')}.{parameter}"
        self._check_rank(name, rank)
        down = a.reshape(experts, rank, a.shape[1])
        up = b.reshape(b.shape[0], rank, experts).transpose(2, 0, 1)
        scale = self._factor(name)
        _, parts = either[parameter]
        for part, share in zip(parts, np.split(up, len(parts), axis=1), strict=True):
            self._put(places[part], share, down, _shapes(leaves), scale)

    def _stacked(self, place: str, found: Mapping[int, tuple[Float32, Float32]]) -> None:
        """Experts that have matrices of their own; those without stay as they are."""
        experts = self._base.tensors[f"{place}.weight"].shape[0]
        rank = max(up.shape[1] for up, _ in found.values())
        rows, columns = (sizes.pop() for sizes in self._sizes(place, found, experts))
        up = np.zeros((experts, rows, rank), np.float32)
        down = np.zeros((experts, rank, columns), np.float32)
        for number, (own_up, own_down) in found.items():
            up[number, :, : own_up.shape[1]] = own_up
            down[number, : own_down.shape[0]] = own_down
        have = f"lora_A {[rank, columns]}, lora_B {[rows, rank]} of single experts"
        self._put(place, up, down, have, scale=1.0)

    def _sizes(
        self, place: str, found: Mapping[int, tuple[Float32, Float32]], experts: int
    ) -> tuple[set[int], set[int]]:
        """The one number of rows and of columns that the experts have."""
        rows = {up.shape[0] for up, _ in found.values()}
        columns = {down.shape[1] for _, down in found.values()}
        if max(found) >= experts or len(rows) > 1 or len(columns) > 1:
            raise AdapterError(
                f"{self._file}: expert {max(found)} of {place} does not fit the base's "
                f"{experts} experts; {_WHERE}"
            )
        return rows, columns

    def _stranger(self, module: str) -> str:
        if is_of_another_tower(module):
            return (
                f"{shown(module)} belongs to a part for images or sound, which mlx-lm does not "
                "run; train an adapter of the text model alone"
            )
        return (
            f"{shown(module)} is no module of the base model{closest(module, self._base)}; {_WHERE}"
        )


def _shapes(leaves: Mapping[str, TensorRef]) -> str:
    return ", ".join(f"{leaf} {list(ref.shape)}" for leaf, ref in sorted(leaves.items()))
