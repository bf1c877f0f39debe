"""Which files belong to a model: the one list that downloading, copying and publishing read.

The rule: what lies in a base's folder was put there by its owner, so all text data of it is taken
along, under whatever name a tokenizer's class looks for it; code is only where it is trusted, and
pickles and hidden files never. In a folder on this machine a training set or a secret may lie as
well, so from there only files are published that have the names of a model's files.
"""

import enum
import fnmatch
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath

from mlx_fusekit.checkpoint.mistaken import lfs_pointer, mistaken_file, not_json
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.reading import exists, is_folder, not_regular, resolve_inside

#: Of a folder that is an adapter, whatever trained it.
ADAPTER_CONFIG_NAME = "adapter_config.json"
#: Its weights, as mlx-lm and as PEFT call them.
ADAPTER_WEIGHTS, PEFT_WEIGHTS = "adapters.safetensors", "adapter_model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CARD_NAME = "README.md"
MODELFILE_NAME = "Modelfile"
#: Where mlx-lm's tokenizers look for chat templates besides the first.
TEMPLATES_FOLDER = "additional_chat_templates"


class Step(enum.Flag):
    """What is done with files of a kind."""

    DOWNLOAD = enum.auto()  #: from the base's repository on the Hub
    COPY = enum.auto()  #: unchanged from the base's folder into the fused model's
    PUBLISH = enum.auto()  #: from the fused model's folder to the Hub
    ALL = DOWNLOAD | COPY | PUBLISH


@dataclass(frozen=True, slots=True)
class Kind:
    """Files that serve one purpose.

    Attributes:
        purpose: in a few words.
        patterns: of their names, relative to the folder.
        steps: what is done with them.
        expected: that they are not copied goes without saying: the fused model has its own.
        trusted: all of this is done only where the model's code is trusted.
    """

    purpose: str
    patterns: tuple[str, ...]
    steps: Step
    expected: bool = False
    trusted: bool = False

    def taken(self, step: Step, *, trust_remote_code: bool) -> bool:
        """Whether a step takes them."""
        return step in self.steps and (trust_remote_code or not self.trusted)

    def is_read(self, *, trust_remote_code: bool) -> bool:
        """Whether somebody reads them where they lie, or copies them."""
        return self.expected or self.taken(Step.COPY, trust_remote_code=trust_remote_code)


_BESIDE_TEXT, _WEIGHTS = "images and sound", "weights"
#: Of a file beside the weights, in bytes; the largest tokenizers have a tenth of it.
_LARGEST = 1_000_000_000
#: Names that a tokenizer is loaded from; ``tokenizer_config.json`` may name one in code.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken", "tekken.json")

#: A file is of the first kind that has a pattern for its name.
KINDS = (
    Kind("settings", ("config.json", INDEX_NAME), Step.DOWNLOAD | Step.PUBLISH, expected=True),
    # Which of them are published, their index or names say: see `Checkpoint.open`.
    Kind(_WEIGHTS, ("model*.safetensors",), Step.DOWNLOAD, expected=True),
    Kind("how it was fused", (RECIPE_NAME,), Step.DOWNLOAD | Step.PUBLISH, expected=True),
    Kind("generation", ("generation_config.json",), Step.ALL),
    Kind(
        "tokenizer",
        (
            "tokenizer*.json",
            "tokenizer*.model",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "vocab.txt",
            "*.vocab",
            "merges.txt",
            "tekken.json",
            "spiece.model",
            "sentencepiece*.model",
            "*.tiktoken",
            "tiktoken.model",
        ),
        Step.ALL,
    ),
    Kind(
        "chat template",
        ("chat_template*.json", "chat_template*.jinja", f"{TEMPLATES_FOLDER}/*.jinja"),
        Step.ALL,
    ),
    Kind(_BESIDE_TEXT, ("*processor_config.json",), Step.ALL),
    Kind("license", ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"), Step.ALL),
    Kind("code", ("*.py",), Step.ALL, trusted=True),
    Kind("model card", (CARD_NAME,), Step.DOWNLOAD),
    Kind("Ollama", (MODELFILE_NAME,), Step.PUBLISH),
    Kind("an adapter's settings", (ADAPTER_CONFIG_NAME,), Step.DOWNLOAD, expected=True),
    Kind("an adapter's weights", (ADAPTER_WEIGHTS, PEFT_WEIGHTS), Step.DOWNLOAD),
    Kind(
        "other data",
        ("*.json", "*.jsonl", "*.txt", "*.jinja", "*.model"),
        Step.DOWNLOAD | Step.COPY,
    ),
)


def belongs(name: str, step: Step, *, trust_remote_code: bool = False) -> bool:
    """Whether a step takes a file of this name, relative to its folder."""
    kind = _kind(name)
    return kind is not None and kind.taken(step, trust_remote_code=trust_remote_code)


def download_patterns(*, trust_remote_code: bool = False) -> list[str]:
    """What to take of a repository on the Hub, as huggingface_hub is told it."""
    return [
        pattern
        for kind in KINDS
        if kind.taken(Step.DOWNLOAD, trust_remote_code=trust_remote_code)
        for pattern in kind.patterns
    ]


def data_files(folder: Path) -> list[Path]:
    """What lies in a model's folder and among its chat templates, folders too, sorted."""
    return sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES_FOLDER}/*")])


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a name is of one of the patterns, large and small letters told apart."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Companions:
    """Files beside the weights.

    Attributes:
        copied: names relative to the folder, taken over unchanged.
        left_out: names of files that stay, for the user to know.
    """

    copied: tuple[str, ...]
    left_out: tuple[str, ...]


def check_files(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a model's folder in which something else lies in the place of a file.

    Also what only others read, as mlx-lm and transformers do, who would wait for a pipe, and follow
    a link wherever it leads.

    Args:
        folder: of the model or adapter.
        trust_remote_code: whether Python files are read.

    Raises:
        CheckpointError: for a pipe, socket, device or folder in a file's place, a link out of the
            folder or to nothing, and for a file that is too large for its kind.
    """
    for path in data_files(folder):
        name = path.relative_to(folder).as_posix()
        kind = _kind(name)
        if kind is None or not kind.is_read(trust_remote_code=trust_remote_code):
            continue
        real = resolve_inside(folder, name)
        if not_regular(path) or not exists(path):
            raise CheckpointError(f"{path}: {mistaken_file(path)}")
        if kind.purpose != _WEIGHTS and real.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path}: too large for a file beside the weights; remove it")


def find_companions(
    folder: Path, *, trust_remote_code: bool = False, text_only: bool = False
) -> Companions:
    """Decide which files of a model folder come along.

    Args:
        folder: of the model.
        trust_remote_code: whether Python files do.
        text_only: whether those for images and sound do not.

    Raises:
        CheckpointError: for a data file that is a link out of the folder or to nothing, or another
            file's stand-in.
    """
    copied, left_out = [], []
    for path in data_files(folder):
        name = path.relative_to(folder).as_posix()
        if is_hidden(path) or is_folder(path):
            continue
        kind = _kind(name)
        if (
            kind is not None
            and kind.taken(Step.COPY, trust_remote_code=trust_remote_code)
            and not (text_only and kind.purpose == _BESIDE_TEXT)
        ):
            resolve_inside(folder, name)
            told = mistaken_file(path, not_json if path.suffix == ".json" else lfs_pointer)
            if told is not None:
                raise CheckpointError(f"{path}: {told}")
            copied.append(name)
        elif kind is None or not kind.expected:
            left_out.append(name)
    return Companions(tuple(copied), tuple(left_out))


def has_tokenizer(folder: Path) -> bool:
    """Whether a file lies in a folder that a tokenizer is loaded from."""
    names = (*TOKENIZERS, "tokenizer_config.json")
    return any(matches(path.name, names) for path in folder.iterdir())


def is_hidden(path: PurePath) -> bool:
    """Whether a file is none of a model's: macOS puts ``._NAME`` by each on disks of others."""
    return path.name.startswith(".")


def _kind(name: str) -> Kind | None:
    if is_hidden(PurePath(name)):
        return None
    return next((kind for kind in KINDS if matches(name, kind.patterns)), None)
