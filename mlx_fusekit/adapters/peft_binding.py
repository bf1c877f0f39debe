"""From what a PEFT adapter holds to updates of a base's modules."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mlx_fusekit.adapters.base_rows import base_rows
from mlx_fusekit.adapters.fitting import closest, refuse_vocabulary
from mlx_fusekit.adapters.low_rank import factor, fitted
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.peft_names import ModulesOf
from mlx_fusekit.adapters.peft_settings import PeftSettings
from mlx_fusekit.adapters.towers import why_not_run
from mlx_fusekit.adapters.updates import Adapter, FullUpdate, Update
from mlx_fusekit.adapters.values import read_finite
from mlx_fusekit.adapters.whole import put_whole
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.belongings import ADAPTER_CONFIG_NAME as CONFIG_NAME
from mlx_fusekit.checkpoint.class_values import ClassValues
from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.checkpoint.json_text import shown
from mlx_fusekit.checkpoint.sanitized import ArrayTensor
from mlx_fusekit.errors import AdapterError, CheckpointError
from mlx_fusekit.formats.floats import Float32

_WHERE = "fuse into the model that the adapter was trained on"
#: What mlx-lm's classes call the matrix of the input's tokens, and that of the output's.
_EMBEDDINGS = (
    *("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "token_embeddings"),
    *("embeddings", "embedding", "embed_in", "embed"),
)
_HEADS = ("lm_head", "embed_out", "output", "ff_out")
#: Of the matrix that says which rows of an embedding are replaced.
_MOST_CHOSEN = 1 << 26


class Binding:
    """An adapter and a base, and what comes of the two.

    Args:
        settings: of the adapter.
        file: of its weights, for messages.
        modules: its tensors, by the module's path in transformers and by what they are.
        base: what it is merged into.
        scaled: whether updates have the scale multiplied in.
    """

    def __init__(
        self,
        settings: PeftSettings,
        file: Path,
        modules: Mapping[str, Mapping[str, TensorRef]],
        base: BaseModel,
        scaled: bool,
    ) -> None:
        self._settings, self._file, self._modules = settings, file, modules
        self._base, self._scaled = base, scaled
        self._names, self._class = ModulesOf(base), ClassValues(base.config)
        self._weights: dict[str, Update] = {}
        self._parameters: dict[str, FullUpdate] = {}
        self._notes: list[str] = []

    def adapter(self, kind: str, warnings: tuple[str, ...]) -> Adapter:
        """The adapter in neutral form.

        Raises:
            AdapterError: for what does not fit the base.
        """
        experts: dict[str, dict[int, tuple[Float32, Float32]]] = defaultdict(dict)
        for module, leaves in self._modules.items():
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
            kind,
            MappingProxyType(self._weights),
            MappingProxyType(self._parameters),
            (*warnings, *self._notes),
        )

    def _plain(self, module: str, leaves: Mapping[str, TensorRef]) -> None:
        """A module of its own."""
        place = self._names.plain(module)
        if place is None:
            return self._elsewhere(module, leaves)
        if "weight" in leaves and leaves.keys() & {"lora_A", "embedding_A", "tokens"}:
            raise AdapterError(
                f"{self._file}: {shown(module)} has trained matrices and a whole weight beside "
                "them; merge the adapter with PEFT (merge_and_unload)"
            )
        if "tokens" in leaves:
            self._tokens(place, module, leaves)
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
        if (original := leaves.get("base weight")) is not None:
            target = self._base.tensors[f"{place}.weight"]
            if original.shape[:1] != target.shape[:1]:
                refuse_vocabulary(self._file, self._base, place, target, original.shape[0])
            self._notes.append(
                f"{original.name} is left out: it is the embedding that the adapter was put on"
            )
        self._tell_tied(place)
        for leaf in ("weight", "bias"):
            if leaf in leaves:
                self._whole(f"{place}.{leaf}", leaves[leaf])
        return None

    def _whole(self, name: str, tensor: TensorRef) -> None:
        """A value that takes the place of the base's, which some classes of mlx-lm change."""
        self._refuse_normalized(name)
        value = None
        if self._class.changes(name):
            try:
                values = self._class.converted(name, read_finite(tensor))
            except CheckpointError as error:
                raise AdapterError(f"{self._file}: {shown(tensor.name)}: {error}") from error
            value = ArrayTensor(tensor.name, "F32", values.shape, values)
        file, weights, parameters = self._file, self._weights, self._parameters
        put_whole(self._base, name, tensor, file, weights, parameters, value)

    def _tell_tied(self, place: str) -> None:
        """Warn where a changed embedding is the head too: unmerged, PEFT leaves the head alone."""
        weight = self._base.tensors.get(f"{place}.weight")
        if weight is None or len(weight.shape) != 2:
            return
        is_input = place.rpartition(".")[2] in _EMBEDDINGS
        if is_input and not any(map(self._names.plain, _HEADS)):
            self._notes.append(
                f"{place} is also the base's head: the head changes with it, as when PEFT merges"
            )

    def _elsewhere(self, module: str, leaves: Mapping[str, TensorRef]) -> None:
        """What the base has in several modules, or in another's place."""
        parts = self._names.parts(module)
        if set(leaves) <= {"lora_A", "lora_B", "magnitude"} and parts:
            up, down = self._matrices(module, leaves)
            rows = [self._base.tensors[f"{part}.weight"].shape[0] for part in parts]
            if sum(rows) != len(up):
                raise AdapterError(
                    f"{self._file}: {shown(module)} has {_shapes(leaves)}, and the base's "
                    f"{', '.join(parts)} have {sum(rows)} rows; {_WHERE}"
                )
            ends = np.cumsum(rows)[:-1]
            norms: list[Float32 | None] = [None] * len(parts)
            if "magnitude" in leaves:
                norms = [*np.split(read_finite(leaves["magnitude"]).reshape(-1), ends)]
            for part, share, norm in zip(parts, np.split(up, ends), norms, strict=True):
                have, scale = _shapes(leaves), self._factor(module)
                self._put(part, share[None], down[None], have, scale, norm)
            return None
        if module.rpartition(".")[2] == "lm_head" and set(leaves) == {"weight"}:
            return self._tied_head(leaves["weight"])
        raise AdapterError(f"{self._file}: {self._stranger(module, leaves)}")

    def _tied_head(self, tensor: TensorRef) -> None:
        """Of a base whose head is its embedding: the head that PEFT saves beside that."""
        others = (
            leaves["weight"]
            for leaves in self._modules.values()
            if "weight" in leaves and leaves["weight"].name != tensor.name
        )
        if not any(_same_values(tensor, other) for other in others):
            raise AdapterError(
                f"{self._file}: {shown(tensor.name)} is a head of its own, and the base uses its "
                "embedding as one; merge the adapter with PEFT (merge_and_unload)"
            )
        self._notes.append(
            f"{tensor.name} is left out: the base has no head of its own and uses its embedding"
        )

    def _tokens(self, place: str, module: str, leaves: Mapping[str, TensorRef]) -> None:
        """Rows of an embedding that were trained by themselves."""
        tensor, tokens = leaves["tokens"], self._settings.tokens_of(module)
        new, rows = read_finite(tensor), self._base.tensors[f"{place}.weight"].shape[0]
        if not tokens or new.ndim != 2 or len({*tokens}) != len(new) or len(tokens) != len(new):
            raise AdapterError(
                f"{self._file}: {shown(tensor.name)} {list(tensor.shape)} does not fit "
                f"trainable_token_indices in {CONFIG_NAME}; correct that, each once"
            )
        if max(tokens) >= rows:
            raise AdapterError(
                f"{self._file}: changes token {max(tokens)}, and {place} of the base has {rows} "
                f"rows; {_WHERE}"
            )
        if rows * len(tokens) > _MOST_CHOSEN:
            raise AdapterError(
                f"{self._file}: {shown(tensor.name)} has {len(tokens)} tokens, which are too many "
                "for their rows to be replaced; merge the adapter with PEFT (merge_and_unload)"
            )
        chosen = np.zeros((rows, len(tokens)), np.float32)
        chosen[tokens, np.arange(len(tokens))] = 1.0
        factors, before = self._row_factors(place), base_rows(self._base, place, tokens)
        if before.shape != new.shape:
            raise AdapterError(
                f"{self._file}: {shown(tensor.name)} has {new.shape[1]} columns, and {place} of "
                f"the base {before.shape[1]}; {_WHERE}"
            )
        scale = 1.0 if self._scaled or not self._settings.scale else 1 / self._settings.scale
        new = new if factors is None else new * factors[tokens, None]
        have = _shapes(leaves)
        self._put(place, chosen[None], (new - before)[None], have, scale, multiplied=True)

    def _refuse_beside_lora(self, module: str, leaves: Mapping[str, TensorRef]) -> None:
        more = sorted(set(leaves) - {"lora_A", "lora_B"})
        if more:
            what = "DoRA" if "magnitude" in leaves else more[0]
            raise AdapterError(
                f"{self._file}: {shown(module)} has {what}, which is not fused into experts or "
                "embeddings; merge the adapter with PEFT (merge_and_unload)"
            )

    def _rows(self, place: str) -> tuple[int, ...]:
        """Number of a weight's rows, and of experts before it where it is of several."""
        return tuple(self._base.tensors[f"{place}.weight"].shape[:-1])

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
        """What a module's update is multiplied with."""
        own, common = self._settings.scale_of(module), self._settings.scale
        return factor(own, common, scaled=self._scaled)

    def _check_rank(self, module: str, rank: int) -> None:
        told = self._settings.rank_of(module)
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
        *,
        multiplied: bool = False,
    ) -> None:
        """Note the update of a module of the base.

        Args:
            place: path of the module.
            up: ``[experts, rows, rank]``.
            down: ``[experts, rank, columns]``.
            have: what the file has of it, for messages.
            scale: to multiply ``up`` with.
            magnitude: of DoRA, ``[rows]``.
            multiplied: whether it is of the weight as mlx-lm's class has it.
        """
        if place in self._weights:
            raise AdapterError(f"{self._file}: has {place} twice, under two names; remove one")
        self._refuse_normalized(f"{place}.weight")
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
        self._weights[place] = update if multiplied else self._multiplied(place, update)
        self._notes += [note] if note else []

    def _multiplied(self, place: str, update: LowRankUpdate) -> LowRankUpdate:
        """An update of transformers' weight as one of what mlx-lm's class makes of that."""
        factors = self._row_factors(place)
        if factors is None:
            return update
        norms = None if update.magnitude is None else update.magnitude * np.abs(factors)
        return replace(update, up=update.up * factors[None, :, None], magnitude=norms)

    def _row_factors(self, place: str) -> Float32 | None:
        return self._class.row_factors(f"{place}.weight", self._rows(place)[-1])

    def _refuse_normalized(self, name: str) -> None:
        if self._class.normalizes(name):
            raise AdapterError(
                f"{self._file}: mlx-lm normalizes {name} of a {self._base.config['model_type']} "
                "model, so that the trained head would not be what runs; leave it out with "
                "--ignore '*lm_head'"
            )

    def _all_experts(
        self, module: str, leaves: Mapping[str, TensorRef], places: Mapping[str, str]
    ) -> None:
        """The experts of one parameter, of which gate and up may be one."""
        sizes = self._sizes_of_parameters(places)
        experts = self._rows(places["gate_proj"])[0]
        a, b = read_finite(leaves["lora_A"]), read_finite(leaves["lora_B"])
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % experts:
            raise AdapterError(
                f"{self._file}: {shown(module)} has {_shapes(leaves)}, which is not of the base's "
                f"{experts} experts; {_WHERE}"
            )
        rank = a.shape[0] // experts
        down = a.reshape(experts, rank, a.shape[1])
        up = b.reshape(b.shape[0], rank, experts).transpose(2, 0, 1)
        if self._turned:
            up, down = down.swapaxes(1, 2), up.swapaxes(1, 2)
        shape = (up.shape[1], down.shape[2])
        parameter = next((name for name, known in sizes.items() if known == shape), None)
        if parameter is None:
            raise AdapterError(
                f"{self._file}: {shown(module)} has {_shapes(leaves)}, which fits neither the "
                f"base's gate_up_proj nor its down_proj of {experts} experts; {_WHERE}"
            )
        name = f"{module.replace('.base_layer', '')}.{parameter}"
        self._check_rank(name, rank)
        shares = {"down_proj": up}
        if parameter == "gate_up_proj":
            half = len(up[0]) // 2
            gate, other = (
                (up[:, ::2], up[:, 1::2])
                if self._names.gate_and_up_by_turns
                else (up[:, :half], up[:, half:])
            )
            shares = {"gate_proj": gate, "up_proj": other}
        for part, share in shares.items():
            self._put(places[part], share, down, _shapes(leaves), self._factor(name))

    def _sizes_of_parameters(self, places: Mapping[str, str]) -> dict[str, tuple[int, int]]:
        """Rows and columns of one expert's in either parameter that transformers has of them."""
        inner, width = (self._rows(places[name])[-1] for name in ("gate_proj", "down_proj"))
        return {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}

    @cached_property
    def _turned(self) -> bool:
        """Whether lora_A is of the outputs of the experts, and lora_B of their inputs.

        PEFT takes a parameter for ``[experts, out, in]`` where its module does not say other;
        before 0.19 it took all for ``[experts, in, out]``. An adapter has all in one order, and the
        sizes of one that is not square tell which.
        """
        for module, leaves in self._modules.items():
            places = self._names.experts(module) if "lora_A" in leaves else None
            if places is not None:
                known = self._sizes_of_parameters(places).values()
                shape = leaves["lora_B"].shape[:1] + leaves["lora_A"].shape[-1:]
                if shape not in known and shape[::-1] in known:
                    return True
        return False

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

    def _stranger(self, module: str, leaves: Mapping[str, TensorRef]) -> str:
        if module.rpartition(".")[2] == "lm_head":
            return (
                "changes lm_head, and the base has none of its own: its head is its embedding; "
                "merge the adapter with PEFT (merge_and_unload)"
            )
        if why := why_not_run(next(iter(leaves.values())).name, module):
            return why
        return (
            f"{shown(module)} is no module of the base model{closest(module, self._base)}; {_WHERE}"
        )


def _same_values(one: TensorRef, other: TensorRef) -> bool:
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same and np.array_equal(one.read(), other.read())


def _shapes(leaves: Mapping[str, TensorRef]) -> str:
    return ", ".join(f"{leaf} {list(ref.shape)}" for leaf, ref in sorted(leaves.items()))
