"""Modules that the user leaves out of an adapter (``--ignore``)."""

import difflib
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from mlx_fusekit.adapters.peft_names import parsed
from mlx_fusekit.checkpoint.header import Header
from mlx_fusekit.checkpoint.json_text import shown
from mlx_fusekit.errors import AdapterError, ConfigurationError

_PEFT_PREFIX = "base_model.model."
#: Of mlx-lm's tensors, what follows the module's path.
_LEAF = re.compile(r"\.(?:weight|bias|lora_[ab](?:\.\d+)?|[mAB])$")


@dataclass(frozen=True)
class Ignored:
    """What was left out of an adapter.

    Attributes:
        patterns: those of the user's that matched something.
        modules: paths of the modules they matched.
    """

    patterns: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    def notes(self, adapter: str) -> tuple[str, ...]:
        """What to tell of it, with the adapter's name."""
        if not self.modules:
            return ()
        count = f"{len(self.modules)} module{'s' if len(self.modules) > 1 else ''}"
        example = shown(self.modules[0])
        return (f"--ignore leaves out {count} of {adapter} ({example}, for one)",)


def without_ignored(header: Header, patterns: Sequence[str]) -> tuple[Header, Ignored]:
    """An adapter's file without the modules that one of the patterns matches.

    A pattern is a shell's (``*``, ``?``, ``[...]``; case counts, and ``*`` goes across dots), and
    has to match the whole path of a module as the file names it, of PEFT's with or without
    ``base_model.model.`` before it. All tensors of a module go with it.

    Raises:
        AdapterError: where nothing is left.
    """
    module_of = {name: _module(name, header.tensors) for name in header.tensors}
    found = {
        module: tuple(pattern for pattern in patterns if _matches(pattern, module))
        for module in module_of.values()
    }
    modules = tuple(sorted(module for module, matching in found.items() if matching))
    if not modules:
        return header, Ignored()
    kept = {name: tensor for name, tensor in header.tensors.items() if not found[module_of[name]]}
    if not kept:
        raise AdapterError(
            f"{header.file}: --ignore leaves nothing of it; ignore less, or leave out the adapter"
        )
    used = tuple(p for p in patterns if any(p in matching for matching in found.values()))
    return replace(header, tensors=MappingProxyType(kept)), Ignored(used, modules)


def check_patterns(
    patterns: Sequence[str], adapters: Iterable[tuple[Ignored, Sequence[str]]]
) -> None:
    """Refuse a pattern that matches nothing.

    Args:
        patterns: the user's.
        adapters: of each, what was left out, and the modules that are left.

    Raises:
        ConfigurationError: naming the pattern, and the module whose name is the most like it.
    """
    ignored = [(found, paths) for found, paths in adapters]
    used = {pattern for found, _ in ignored for pattern in found.patterns}
    unused = next((pattern for pattern in patterns if pattern not in used), None)
    if unused is None:
        return
    modules = [path for found, paths in ignored for path in (*paths, *found.modules)]
    raise ConfigurationError(
        f"--ignore {unused!r}: matches no module of the adapter{_closest(unused, modules)}; "
        "correct the pattern, or drop it"
    )


def _module(name: str, beside: Container[str]) -> str:
    """Path of the module that a tensor belongs to, beside others."""
    found = parsed(name)
    module = found.module if found else _LEAF.sub("", name)
    outer = module.removesuffix(".linear")  # what mlx-lm's layers call what they are put around
    return outer if f"{outer}.lora_a" in beside else module


def _matches(pattern: str, module: str) -> bool:
    return fnmatchcase(module, pattern.removeprefix(_PEFT_PREFIX))


def _closest(pattern: str, modules: Iterable[str]) -> str:
    """The module of which a part is the most like a pattern, in words."""
    wanted = re.sub(r"[*?]", "", pattern.removeprefix(_PEFT_PREFIX)).strip(".")
    length = wanted.count(".") + 1
    runs: dict[str, str] = {}
    for module in modules:
        parts = module.split(".")
        for first in range(max(len(parts) - length, 0) + 1):
            runs.setdefault(".".join(parts[first : first + length]), module)
    match = difflib.get_close_matches(wanted, runs, n=1, cutoff=0.0)
    return f" (closest: {shown(runs[match[0]])})" if match else ""
