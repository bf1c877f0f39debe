"""Which files of a model folder are published, and which stay.

By the list of what belongs to a model, so that a checkpoint, a training set or a secret that lies
beside it is never uploaded by mistake.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_fusekit.checkpoint.belongings import (
    ADAPTER_CONFIG_NAME,
    CARD_NAME,
    INDEX_NAME,
    MODELFILE_NAME,
    TEMPLATES_FOLDER,
    TOKENIZERS,
    Step,
    belongs,
    data_files,
    matches,
)
from mlx_fusekit.checkpoint.folder import Checkpoint, index_fault, optional_json
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME, as_text
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.publishing.foreign_text import public_source
from mlx_fusekit.publishing.private import Private
from mlx_fusekit.reading import is_file, is_folder, read_bytes, resolve_inside

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
_WEIGHTS = (".safetensors", ".gguf")
_LARGEST_TEXT = 10_000_000
_LARGEST_FILE = 200_000_000
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
        private: what none of its files may tell.
        states: of its files when they were checked.
    """

    folder: Path
    files: tuple[PublishedFile, ...]
    left_out: tuple[LeftOut, ...]
    recipe: Mapping[str, Any] | None
    formats: Mapping[str, int]
    ggufs: tuple[GgufFile, ...]
    warnings: tuple[str, ...]
    private: Private
    states: Mapping[str, "_State"] = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: Path, *, trust_remote_code: bool = False, sources: Collection[Path] = ()
    ) -> "PublishedModel":
        """Check a folder, and choose its files; reads headers and settings only.

        Args:
            folder: a model that mlx-lm loads, with GGUF files or without; or GGUF files alone.
            trust_remote_code: whether the model's own ``*.py`` go along.
            sources: folders that it was made of, of which its files may not tell either.

        Raises:
            CheckpointError: when it is not complete, is not fused, or would tell a path.
        """
        # Before anything is read: what is checked below is what lies there now, or later is not.
        states = _states(folder)
        private = Private.of_machine(folder, *sources)
        ggufs = _read_ggufs(folder, private)
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
            recipe=optional_json(folder, RECIPE_NAME),
            formats=_formats(checkpoint),
            ggufs=ggufs,
            warnings=tuple(_warnings(checkpoint, files)),
            private=private,
            states=states,
        )
        return model._checked(checkpoint)

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
        if not is_file(path):
            return None
        resolve_inside(self.folder, CARD_NAME)
        return _read_text(path)

    @property
    def public_recipe(self) -> str | None:
        """``fusekit.json`` without folders of this machine; None where the file itself has none."""
        calibration = (self.recipe or {}).get("calibration")
        source = calibration.get("source") if isinstance(calibration, dict) else None
        if self.recipe is None or not isinstance(calibration, dict) or not isinstance(source, str):
            return None
        shown = public_source(source).strip("`")
        if shown == source:
            return None
        return as_text({**self.recipe, "calibration": {**calibration, "source": shown}})

    def refuse_private(self, name: str, content: str) -> None:
        """Refuse a text that is written for the Hub, where it tells what is private here.

        Raises:
            CheckpointError: naming the file and what it tells.
        """
        told = self.private.in_file(name, content.encode("utf-8", "surrogatepass"))
        _refuse(self.folder / name, told, "text as it would be published")

    def checked(self, name: str) -> bytes | None:
        """The content to publish of a file that was checked; None of weights, which stay in it.

        Raises:
            CheckpointError: when the file is another than the one that was checked.
        """
        path, state = self.folder / name, self.states.get(name)
        if name.endswith(_WEIGHTS):
            content, same = None, state is not None and _state(path) == state
        else:
            content = _read(self.folder, name)
            same = state is not None and _digest(content) == state.digest
        if not same:
            raise CheckpointError(
                f"{path}: was changed after it was checked, and nothing was uploaded; publish it "
                "again"
            )
        recipe = self.public_recipe if name == RECIPE_NAME else None
        return content if recipe is None else recipe.encode()

    def changed_weights(self) -> Path | None:
        """A file of weights that is another than the one that was checked."""
        weights = (name for name in self.names if name.endswith(_WEIGHTS))
        changed = (name for name in weights if _state(self.folder / name) != self.states.get(name))
        return next((self.folder / name for name in changed), None)

    def _checked(self, checkpoint: Checkpoint | None) -> "PublishedModel":
        """Itself, with what its files hold; refused where one tells what is private here."""
        states = dict(self.states)
        for name, header in (checkpoint.headers if checkpoint is not None else {}).items():
            _refuse(self.folder / name, self.private.in_values(header.metadata), "__metadata__")
        own_card = [CARD_NAME] if is_file(self.folder / CARD_NAME) else []
        for name in [*self.names, *own_card]:
            if name.endswith(_WEIGHTS):
                continue
            content = _read(self.folder, name)
            if name in states:
                states[name] = replace(states[name], digest=_digest(content))
            if name == RECIPE_NAME and (recipe := self.public_recipe) is not None:
                # Nobody should have to edit it by hand.
                content = recipe.encode()
            _refuse(self.folder / name, self.private.in_file(name, content))
        return replace(self, states=states)


@dataclass(frozen=True, slots=True)
class _State:
    """By what it is known whether a file is still the same.

    Attributes:
        digest: SHA-256 of its content; None of weights, which are too large to be read twice.
    """

    device: int
    inode: int
    size: int
    modified: int
    digest: bytes | None = None


def _state(path: Path) -> _State | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _states(folder: Path) -> dict[str, _State]:
    """Of all files of a model's folder; none where there is no folder."""
    if not folder.is_dir():
        return {}
    named = {path.relative_to(folder).as_posix(): _state(path) for path in data_files(folder)}
    return {name: state for name, state in named.items() if state is not None}


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _refuse(path: Path, told: str | None, where: str = "") -> None:
    if told is not None:
        part = f"its {where} " if where else ""
        raise CheckpointError(f"{path}: {part}tells {told}; remove it before publishing")


def refuse_private_files(folder: Path, names: Iterable[str], private: Private) -> None:
    """Refuse files of a base, none of them weights, that would not be published.

    Raises:
        CheckpointError: naming the file and what it tells.
    """
    for name in names:
        _refuse(folder / name, private.in_file(name, _read(folder, name)))


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
        if name == CARD_NAME or (is_folder(path) and name == TEMPLATES_FOLDER):
            continue
        if is_folder(path):
            left_out.append(LeftOut(f"{name}/", "a folder"))
        elif not is_file(path) or not goes:
            left_out.append(LeftOut(name, _reason(path.name)))
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


def _read_ggufs(folder: Path, private: Private) -> tuple[GgufFile, ...]:
    paths = sorted(folder.glob("*.gguf"))
    if not paths:
        return ()
    from mlx_fusekit.gguf.file.header import read_gguf_header

    found = []
    for path in paths:
        resolve_inside(folder, path.name)
        held: Counter[str] = Counter()
        header = read_gguf_header(path)
        _refuse(path, private.in_values(header.texts), "metadata")
        for tensor in header.tensors.values():
            held[tensor.ggml_type.name] += tensor.nbytes
        kind = held.most_common(1)[0][0] if held else "no tensors"
        found.append(GgufFile(path.name, path.stat().st_size, kind))
    return tuple(found)


def _read(folder: Path, name: str) -> bytes:
    """All of a file that is no weights."""
    path = resolve_inside(folder, name)
    try:
        return read_bytes(path, _LARGEST_FILE)
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from error


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, _LARGEST_TEXT).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error})") from error
