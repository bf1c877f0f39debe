"""The files of a model folder that are not weights: what comes along, what stays, and why."""

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from mlx_fusekit.checkpoint.folder import INDEX_NAME, resolve_inside

#: Data that a tokenizer, a chat template, a generation or a licence needs.
_DATA = (
    "*.json",
    "*.jsonl",
    "*.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.vocab",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "additional_chat_templates/*.jinja",
)
#: Written afresh, or describing another model than the fused one.
_OURS = ("config.json", INDEX_NAME, "fusekit.json", "adapter_config.json")
_SILENT = (".*", "model*.safetensors", *_OURS)


@dataclass(frozen=True, slots=True)
class Companions:
    """Files beside the weights.

    Attributes:
        copied: names relative to the folder, taken over unchanged.
        left_out: names of files that stay, for the user to know.
    """

    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def code(self) -> tuple[str, ...]:
        """Python files that were left out."""
        return tuple(name for name in self.left_out if name.endswith(".py"))


def find_companions(folder: Path, *, trust_remote_code: bool = False) -> Companions:
    """Decide which files of a model folder come along.

    Args:
        trust_remote_code: whether Python files do.

    Raises:
        CheckpointError: for a data file that is a link out of the folder.
    """
    patterns = (*_DATA, *(("*.py",) if trust_remote_code else ()))
    copied, left_out = [], []
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        name = path.relative_to(folder).as_posix()
        if _matches(name, _SILENT) or path.is_dir():
            continue
        if _matches(name, patterns):
            resolve_inside(folder, name)
            copied.append(name)
        else:
            left_out.append(name)
    return Companions(tuple(copied), tuple(left_out))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
