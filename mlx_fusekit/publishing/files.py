"""Which files of a model folder are published, and which stay.

By the list of what belongs to a model, so that a checkpoint, a training set or a secret that lies
beside it is never uploaded by mistake.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit.checkpoint.belongings import (
    CARD_NAME,
    MODELFILE_NAME,
    TEMPLATES_FOLDER,
    TOKENIZERS,
    Step,
    belongs,
    data_files,
    matches,
)
from mlx_fusekit.checkpoint.folder import (
    ADAPTER_CONFIG_NAME,
    INDEX_NAME,
    Checkpoint,
    index_fault,
    read_json,
    resolve_inside,
)
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME
from mlx_fusekit.errors import CheckpointError

#: Why a file stays, by the first pattern that its name matches.
_REASONS = {
    ".*": "hidden",
    "*.py": "code; it goes along with --trust-remote-code",
    ADAPTER_CONFIG_NAME: "of an adapter",
    "*adapters.safetensors": "of an adapter",
    "adapter_model.*": "of an adapter",
    "*optimizer*": "a state of training",
    "*scheduler*": "a state of training",
    "training_args*": "a state of training",
    "*.bin": "pickled, or not a model's",
    "*.p[tk]*": "pickled, or not a model's",
    "*.npz": "pickled, or not a model's",
}
_OTHER_REASON = "not part of a model"
_ADAPTER_LEAVES = ("lora_a", "lora_b", "lora_A", "lora_B")
#: Files that people and tools wrote, in which a path of this machine may be.
_TEXTS = ("*config.json", RECIPE_NAME, MODELFILE_NAME, CARD_NAME)
_LARGEST_TEXT = 10_000_000
_FROM = re.compile(r'^\s*FROM\s+"*(.+?)"*\s*$', re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file that is uploaded, by its name in the repository."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that stays, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file.

    Attributes:
        type: of the tensors that most of its bytes are in.
    """

    name: str
    bytes: int
    type: str


@dataclass(frozen=True)
class PublishedModel:
    """A model folder, found complete, that can be published.

    Attributes:
        folder: where it lies.
        files: what is uploaded, the card aside.
        left_out: what stays.
        recipe: ``fusekit.json``; None where there is none.
        formats: number of weight matrices by their quantization; empty of a GGUF-only folder.
        ggufs: its GGUF files.
        warnings: one line each.
    """

    folder: Path
    files: tuple[PublishedFile, ...]
    left_out: tuple[LeftOut, ...]
    recipe: Mapping[str, Any] | None
    formats: Mapping[str, int]
    ggufs: tuple[GgufFile, ...]
    warnings: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, *, trust_remote_code: bool = False) -> "PublishedModel":
        """Check a folder, and choose its files; reads headers and settings only.

        Args:
            folder: a model that mlx-lm loads, with GGUF files or without; or GGUF files alone.
            trust_remote_code: whether the model's own ``*.py`` go along.

        Raises:
            CheckpointError: when it is not complete, is not fused, or would tell a path.
        """
        ggufs = _read_ggufs(folder)
        only_gguf = ggufs and not any(
            path.name == "config.json" or path.match("model*.safetensors")
            for path in folder.iterdir()
        )
        checkpoint = None if only_gguf else _open_fused(folder, trust_remote_code)
        weights = {
            *(() if checkpoint is None else checkpoint.headers),
            *(gguf.name for gguf in ggufs),
        }
        held = {} if checkpoint is None else checkpoint.files
        stale = index_fault(folder, held)
        files, left_out = _sort(folder, weights, stale, trust_remote_code)
        model = cls(
            folder=folder,
            files=files,
            left_out=left_out,
            recipe=_optional(folder / RECIPE_NAME),
            formats=_formats(checkpoint),
            ggufs=ggufs,
            warnings=tuple(_warnings(checkpoint, files)),
        )
        model._check_paths()
        return model

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files that are uploaded, the card aside."""
        return tuple(file.name for file in self.files)

    @property
    def has_mlx(self) -> bool:
        """Whether mlx-lm can load it."""
        return "config.json" in self.names

    @property
    def card(self) -> str | None:
        """The text of the folder's own ``README.md``."""
        path = self.folder / CARD_NAME
        if not path.is_file():
            return None
        resolve_inside(self.folder, CARD_NAME)
        return _read_text(path)

    def _check_paths(self) -> None:
        """Refuse to publish where on this machine something lies."""
        for name in (*self.names, CARD_NAME):
            path = self.folder / name
            # The recipe is cleaned instead: nobody should have to edit it by hand.
            if name == RECIPE_NAME or not matches(name, _TEXTS) or not path.is_file():
                continue
            told = next(_paths_of_this_machine(path, self.folder), None)
            if told is not None:
                raise CheckpointError(
                    f"{path}: tells a path of this machine ({told}); remove it before publishing"
                )


def _open_fused(folder: Path, trust_remote_code: bool) -> Checkpoint:
    checkpoint = Checkpoint.open(folder, trust_remote_code=trust_remote_code)
    adapter = next(
        (name for name in checkpoint.tensors if name.rpartition(".")[2] in _ADAPTER_LEAVES), None
    )
    if adapter is not None:
        raise CheckpointError(
            f"{checkpoint.tensors[adapter].file}: has {adapter!r} of an adapter, which mlx-lm does "
            "not load with a model; fuse it first"
        )
    return checkpoint


def _formats(checkpoint: Checkpoint | None) -> Mapping[str, int]:
    if checkpoint is None:
        return {}
    specs = (checkpoint.quantization(module) for module in checkpoint.quantized_modules)
    return dict(Counter(str(spec) for spec in specs).most_common())


def _warnings(checkpoint: Checkpoint | None, files: Collection[PublishedFile]) -> Iterator[str]:
    names = [file.name for file in files]
    if checkpoint is not None:
        yield from checkpoint.warnings
    if RECIPE_NAME not in names:
        yield f"there is no {RECIPE_NAME}: the card cannot say what was fused, and how"
    if checkpoint is not None and not any(matches(name, TOKENIZERS) for name in names):
        yield "there is no tokenizer, without which mlx_lm.load does not load the model"


def _sort(
    folder: Path, weights: Collection[str], stale: str | None, trust_remote_code: bool
) -> tuple[tuple[PublishedFile, ...], tuple[LeftOut, ...]]:
    """What goes, and what stays; the card is neither."""
    files, left_out = [], []
    for path in data_files(folder):
        name = path.relative_to(folder).as_posix()
        goes = name in weights or belongs(name, Step.PUBLISH, trust_remote_code=trust_remote_code)
        if name == CARD_NAME or (path.is_dir() and name == TEMPLATES_FOLDER):
            continue
        if path.is_dir():
            left_out.append(LeftOut(f"{name}/", "a folder"))
        elif not path.is_file() or not goes:
            left_out.append(LeftOut(name, _reason(name)))
        elif name == INDEX_NAME and stale is not None:
            left_out.append(LeftOut(name, f"out of date: {stale}"))
        elif name == MODELFILE_NAME and (reason := _modelfile_fault(path, weights)):
            left_out.append(LeftOut(name, reason))
        else:
            files.append(PublishedFile(name, resolve_inside(folder, name).stat().st_size))
    return tuple(files), tuple(left_out)


def _reason(name: str) -> str:
    found = (reason for pattern, reason in _REASONS.items() if matches(name, (pattern,)))
    return next(found, _OTHER_REASON)


def _modelfile_fault(path: Path, weights: Collection[str]) -> str | None:
    """Why Ollama could not use a Modelfile once it lies in the repository."""
    found = _FROM.search(_read_text(path))
    if found is None:
        return "has no FROM"
    name = found[1].removeprefix("./")
    return None if name in weights else "its FROM names no GGUF file beside it"


def _read_ggufs(folder: Path) -> tuple[GgufFile, ...]:
    paths = sorted(folder.glob("*.gguf"))
    if not paths:
        return ()
    from mlx_fusekit.gguf.file.header import read_gguf_header

    found = []
    for path in paths:
        resolve_inside(folder, path.name)
        held: Counter[str] = Counter()
        for tensor in read_gguf_header(path).tensors.values():
            held[tensor.ggml_type.name] += tensor.nbytes
        kind = held.most_common(1)[0][0] if held else "no tensors"
        found.append(GgufFile(path.name, path.stat().st_size, kind))
    return tuple(found)


def _paths_of_this_machine(path: Path, folder: Path) -> Iterator[str]:
    homes = {str(folder.resolve()), str(Path.home())} - {"/"}
    if path.suffix == ".json":
        for text in _strings(read_json(path)):
            if any(text == home or text.startswith(f"{home}/") for home in homes):
                yield text
    else:
        text = _read_text(path)
        yield from (f"{home}/…" for home in sorted(homes) if f"{home}/" in text)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _read_text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_TEXT:
        raise CheckpointError(f"{path}: too large for a text that people read")
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error})") from error
