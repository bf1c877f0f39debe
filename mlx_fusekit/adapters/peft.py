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

from mlx_fusekit.adapters.fitting import base_warnings
from mlx_fusekit.adapters.ignoring import Ignored
from mlx_fusekit.adapters.peft_binding import Binding
from mlx_fusekit.adapters.peft_names import parsed
from mlx_fusekit.adapters.peft_settings import PeftSettings
from mlx_fusekit.adapters.updates import Adapter
from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.header import Header, TensorRef
from mlx_fusekit.checkpoint.json_text import shown
from mlx_fusekit.errors import AdapterError

_NAMED = 3
_PAIRS = (("lora_A", "lora_B"), ("embedding_A", "embedding_B"))


@dataclass(frozen=True)
class PeftAdapter:
    """PEFT's kind of :class:`~mlx_fusekit.adapters.updates.AdapterFolder`."""

    folder: Path
    settings: PeftSettings
    header: Header
    ignored: Ignored

    @classmethod
    def of(cls, settings: PeftSettings, header: Header, ignored: Ignored) -> "PeftAdapter":
        """An adapter from what was read of its folder.

        Raises:
            AdapterError: naming what is wrong, and the cure.
        """
        if header.tensors:
            settings.check()
        adapter = cls(settings.path.parent, settings, header, ignored)
        found = {leaf for leaves in adapter.modules.values() for leaf in leaves}
        if not found & {"tokens", *_PAIRS[0], *_PAIRS[1]}:
            what = "holds no LoRA tensors; train the adapter first"
            if ignored.modules:
                what = "--ignore leaves no LoRA tensors of it; ignore less"
            raise AdapterError(f"{header.file}: {what}")
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
        """What the user should know of the adapter by itself, one line each."""
        return self.ignored.notes(self.folder.name)

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
        binding = Binding(self.settings, self.header.file, self.modules, base, scaled)
        warnings = (*self.notes, *base_warnings(self.trained_on, base_id), *self._incomplete(base))
        return binding.adapter(self.kind, warnings)

    def _incomplete(self, base: BaseModel) -> tuple[str, ...]:
        """What to tell where the settings name modules that the file has nothing of."""
        # Of three axes are experts, whom transformers has in parameters and not in modules.
        matrices = (n.removesuffix(".weight") for n, t in base.tensors.items() if len(t.shape) == 2)
        missing = self.settings.missing_targets(matrices, (*self.modules, *self.ignored.modules))
        if not missing:
            return ()
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        return (
            f"target_modules of {self.folder.name} names {', '.join(map(shown, missing[:_NAMED]))}"
            f"{more}, and its file has no tensor of such modules; it may not have been saved whole",
        )
