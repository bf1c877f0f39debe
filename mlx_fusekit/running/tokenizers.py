"""Tokenizers of strangers' folders: loaded as mlx-lm does, and tried out before minutes of work."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from mlx_lm.utils import load_tokenizer

from mlx_fusekit.checkpoint.belongings import has_tokenizer
from mlx_fusekit.checkpoint.folder import optional_json
from mlx_fusekit.checkpoint.json_text import MOST_OF_TOKENIZER, shown
from mlx_fusekit.checkpoint.mistaken import mistaken_file
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.texts.templates import limit_templates
from mlx_fusekit.texts.tokens import guard_tokenizer, told_in_a_line

_CURE = "download the model again, with its tokenizer"
#: mlx-lm and transformers make lists as long as the largest id, whatever ids there are.
_LARGEST_ID = 10_000_000
#: Each added token costs transformers time; models that speak have up to 65,536, one a sound.
_MOST_ADDED = 100_000
_LONGEST_ADDED = 10_000
_MOST_GROWTH = 1000
_SETTINGS = "tokenizer_config.json"
#: What transformers reads of a folder, each a JSON object.
_FILES = ("tokenizer.json", _SETTINGS, "special_tokens_map.json", "added_tokens.json", "vocab.json")


def tokenizer_of(source: LocalFolder, config: Mapping[str, Any], rows: int | None = None) -> Any:
    """mlx-lm's ``TokenizerWrapper`` of a folder, guarded against its chat templates and itself.

    Args:
        source: the folder.
        config: its ``config.json``.
        rows: token ids of its model are below it; None where no model is known.

    Raises:
        CheckpointError: when the folder holds none that transformers can read, only with code that
            is not trusted, or one that does not work or is of another model.
    """
    folder = source.path
    try:
        with told_in_a_line(folder, "cannot be loaded", f"update transformers, or {_CURE}"):
            check_tokenizer_files(folder)
            ends = _end_ids(folder, config)
            # Said in so many words: left open, transformers asks on the terminal whether to run
            # code.
            extra = {"trust_remote_code": source.trusted}
            tokenizer = load_tokenizer(folder, extra, eos_token_ids=ends)
            limit_templates(tokenizer, folder)
    except CheckpointError as error:
        raise CheckpointError(_told(source, config, error)) from error
    guard_tokenizer(tokenizer, folder, rows)
    return tokenizer


def _told(source: LocalFolder, config: Mapping[str, Any], error: CheckpointError) -> str:
    """Why a tokenizer cannot be loaded, and what to do."""
    folder = source.path
    names = ("tokenizer.json", _SETTINGS, "tokenizer.model")
    stand_ins = {folder / name: mistaken_file(folder / name) for name in names}
    for file, told in stand_ins.items():
        if told:
            return f"{file}: {told}"
    if not source.trusted and _has_tokenizer_code(folder, config):
        return f"{folder}: its tokenizer is code of its own, which needs --trust-remote-code"
    if not has_tokenizer(folder):
        return f"{folder}: its tokenizer cannot be loaded (there is none); {_CURE}"
    return str(error)


def _has_tokenizer_code(folder: Path, config: Mapping[str, Any]) -> bool:
    try:
        blocks = (config, optional_json(folder, _SETTINGS) or {})
    except CheckpointError:
        blocks = (config, {})
    maps = (block.get("auto_map") for block in blocks)
    return any(isinstance(names, dict) and "AutoTokenizer" in names for names in maps)


def check_tokenizer_files(folder: Path) -> None:
    """Refuse what transformers would fail at in words of its own, or take all memory for.

    And that by which it would read files that are not the folder's.

    Raises:
        CheckpointError: naming the file.
    """
    for name in _FILES:
        file = folder / name
        if name == "vocab.json" and (folder / "tokenizer.json").exists():
            continue
        content = optional_json(folder, name, **MOST_OF_TOKENIZER)
        if content is None:
            continue
        largest = max(_ids(name, content), default=0)
        if largest > _LARGEST_ID:
            raise CheckpointError(
                f"{file}: has the token id {shown(largest)}, far more than any model has tokens; "
                f"{_CURE}"
            )
        if name == _SETTINGS:
            _check_paths(file, content)
        if name == "tokenizer.json":
            _check_added(file, content.get("added_tokens"))
            _check_growth(file, content)


def _check_paths(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse settings that make transformers read another file, wherever it lies.

    Its classes get the settings as arguments and hand them on: what stands in the place of a table
    of tokens is a path to tokenizers, and SentencePiece has an argument for one.
    """
    named = {key: [settings.get(key)] for key in ("vocab", "merges")}
    first, pieces = settings.get("init_inputs"), settings.get("sp_model_kwargs")
    named["init_inputs"] = first if isinstance(first, list) else [first]
    named["sp_model_kwargs"] = [pieces.get("model_file")] if isinstance(pieces, dict) else []
    versions = settings.get("fast_tokenizer_files")
    named["fast_tokenizer_files"] = [
        name
        for name in (versions if isinstance(versions, list) else ())
        if isinstance(name, str) and PurePath(name).name != name
    ]
    for key, values in named.items():
        path = next((value for value in values if isinstance(value, str)), None)
        if path is not None:
            raise CheckpointError(
                f"{file}: {key} names the file {shown(path)}, which transformers would read, "
                f"wherever it lies; remove {key}"
            )


def _check_added(file: Path, added: Any) -> None:
    """Refuse more or longer added tokens than any model needs."""
    if not isinstance(added, list):
        return
    if len(added) > _MOST_ADDED:
        raise CheckpointError(f"{file}: has {len(added)} added tokens, too many; {_CURE}")
    texts = (entry.get("content") for entry in added if isinstance(entry, dict))
    longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
    if longest > _LONGEST_ADDED:
        raise CheckpointError(f"{file}: has an added token of {longest} characters; {_CURE}")


def _check_growth(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse steps that together make a long text of each character, until memory is full."""
    for key in ("normalizer", "decoder"):
        growth, steps = 1, [content.get(key)]
        while steps:
            step = steps.pop()
            if isinstance(step, list):
                steps += step
            elif isinstance(step, dict):
                steps += [step.get(name) for name in ("normalizers", "decoders")]
                put = (step.get(name) for name in ("content", "prepend"))
                growth *= max(1, *(len(text) for text in put if isinstance(text, str)), 1)
            if growth > _MOST_GROWTH:
                raise CheckpointError(
                    f"{file}: its {key} makes a text more than {_MOST_GROWTH} times as long; "
                    f"{_CURE}"
                )


def _ids(name: str, content: Mapping[str, Any]) -> Iterator[int]:
    """The token ids that a file names, as far as they are numbers."""
    if name in ("vocab.json", "added_tokens.json"):
        yield from (token for token in content.values() if type(token) is int)
    elif name == _SETTINGS:
        named = content.get("added_tokens_decoder")
        yield from (int(key) for key in named or () if isinstance(key, str) and key.isdecimal())
    elif name == "tokenizer.json":
        model, added = content.get("model"), content.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            yield from (token for token in vocabulary.values() if type(token) is int)
        entries = added if isinstance(added, list) else []
        ids = (entry.get("id") for entry in entries if isinstance(entry, dict))
        yield from (token for token in ids if type(token) is int)


def _end_ids(folder: Path, config: Mapping[str, Any]) -> list[int] | None:
    """The token ids that end a text, as ``config.json`` has them; None where it has no word."""
    ends = config.get("eos_token_id")
    if ends is None:
        return None
    tokens = [token for token in (ends if isinstance(ends, list) else [ends]) if token is not None]
    for token in tokens:
        is_number = isinstance(token, int | float) and not isinstance(token, bool)
        if not (is_number and token % 1 == 0):
            raise CheckpointError(
                f"{folder / 'config.json'}: eos_token_id is {shown(ends)}; it must be a token id "
                "or a list of them; download the model again"
            )
    return [int(token) for token in tokens]
