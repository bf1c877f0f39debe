"""The files that describe a model's tokenizer, read as data: no code of the folder ever runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_fusekit.checkpoint.belongings import TEMPLATES_FOLDER, is_hidden
from mlx_fusekit.checkpoint.folder import optional_json
from mlx_fusekit.checkpoint.json_text import LARGEST_TOKENIZER, MOST_OF_A_TOKENIZER
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.tokens import AddedToken
from mlx_fusekit.reading import exists, read_bytes, resolve_inside

Json = Mapping[str, Any]

#: Bytes of a chat template; real ones have up to some ten thousand.
_LARGEST_TEMPLATE = 1_000_000
_TOO_LARGE = "too large for a chat template; put back the one that the model came with"
#: Tokenizers from which transformers makes ``tokenizer.json``.
_CONVERTIBLE = ("tekken.json", "vocab.json")
_CURE = "download the model again, with its tokenizer"


@dataclass(frozen=True)
class TokenizerFiles:
    """What a model folder says about its tokenizer.

    Attributes:
        folder: the model folder.
        tokenizer: ``tokenizer.json``, or None.
        pieces: path of SentencePiece's ``tokenizer.model``, or None.
        settings: ``tokenizer_config.json``, over ``special_tokens_map.json``.
        generation: ``generation_config.json``.
        config: ``config.json``.
    """

    folder: Path
    tokenizer: Json | None
    pieces: Path | None
    settings: Json
    generation: Json
    config: Json

    @classmethod
    def read(cls, folder: Path) -> "TokenizerFiles":
        """Read what there is.

        Raises:
            CheckpointError: when there is no tokenizer, or a file is malformed.
        """
        pieces = folder / "tokenizer.model"
        files = cls(
            folder,
            _optional(folder, "tokenizer.json"),
            resolve_inside(folder, pieces.name) if exists(pieces) else None,
            {
                **(_optional(folder, "special_tokens_map.json") or {}),
                **(_optional(folder, "tokenizer_config.json") or {}),
            },
            _optional(folder, "generation_config.json") or {},
            _optional(folder, "config.json") or {},
        )
        if files.tokenizer is None and files.pieces is None:
            other = next((name for name in _CONVERTIBLE if exists(folder / name)), None)
            if other is not None:
                place = repr(str(folder))
                raise CheckpointError(
                    f"{folder / other}: a tokenizer of this form cannot be exported; transformers "
                    "writes tokenizer.json: "
                    f"AutoTokenizer.from_pretrained({place}).save_pretrained({place})"
                )
            raise CheckpointError(
                f"{folder}: has neither tokenizer.json nor tokenizer.model; {_CURE}"
            )
        return files

    @property
    def file(self) -> Path:
        """The file that names the tokens, for messages."""
        name = "tokenizer.model" if self.tokenizer is None else "tokenizer.json"
        return self.folder / name

    @cached_property
    def model(self) -> Json:
        """The ``model`` block of ``tokenizer.json``; empty without that file."""
        return {} if self.tokenizer is None else _block(self.tokenizer, "model", self.file)

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Ids of the model's own tokens by their spelling, from ``tokenizer.json``.

        Raises:
            CheckpointError: when an id is not a number or is used twice.
        """
        table = self.model.get("vocab")
        if not isinstance(table, dict) or not table:
            raise CheckpointError(f"{self.file}: model.vocab holds no tokens; {_CURE}")
        owners: dict[int, str] = {}
        for text, token_id in table.items():
            if not _is_id(token_id) or token_id in owners:
                raise CheckpointError(
                    f"{self.file}: model.vocab gives token {text!r} the id {token_id!r}, which is "
                    f"no free id; {_CURE}"
                )
            owners[token_id] = text
        return table

    @cached_property
    def merges(self) -> tuple[tuple[str, str], ...]:
        """Merges of a BPE model, first learned first; both ways of writing them.

        Raises:
            CheckpointError: for a merge that is not a pair of known tokens.
        """
        merges = self.model.get("merges")
        if not isinstance(merges, list):
            raise CheckpointError(f"{self.file}: model.merges is no list; {_CURE}")
        pairs = []
        for merge in merges:
            parts = merge.split(" ") if isinstance(merge, str) else merge
            known = isinstance(parts, list) and all(
                isinstance(part, str) and part in self.vocabulary for part in parts
            )
            if not known or len(parts) != 2 or "".join(parts) not in self.vocabulary:
                raise CheckpointError(
                    f"{self.file}: merge {merge!r} does not join two tokens into a third; {_CURE}"
                )
            pairs.append((parts[0], parts[1]))
        return tuple(pairs)

    @cached_property
    def added(self) -> tuple[AddedToken, ...]:
        """Added tokens by id, from ``tokenizer.json`` and the older files, in this order.

        As in Hugging Face's library, the first id of a text counts.

        Raises:
            CheckpointError: for an id that already belongs to another text.
        """
        ids = dict(self.vocabulary) if self.tokenizer else {}
        owners = {token_id: text for text, token_id in ids.items()}
        found: dict[int, AddedToken] = {}
        for file, token in self._added():
            if ids.setdefault(token.text, token.token_id) != token.token_id:
                continue
            if owners.setdefault(token.token_id, token.text) == token.text:
                found.setdefault(token.token_id, token)
            elif file == "tokenizer.json":
                raise CheckpointError(
                    f"{self.folder / file}: added token {token.text!r} has id {token.token_id}, "
                    f"which is that of {owners[token.token_id]!r}; {_CURE}"
                )
        return tuple(found[token_id] for token_id in sorted(found))

    def _added(self) -> Iterator[tuple[str, AddedToken]]:
        """Every mention of an added token and its file; earlier ones count."""
        for entry in (self.tokenizer or {}).get("added_tokens") or ():
            yield "tokenizer.json", self._token("tokenizer.json", entry, entry.get("id"))
        decoder = self.settings.get("added_tokens_decoder") or {}
        for token_id, entry in decoder.items():
            number = int(token_id) if str(token_id).isdecimal() else None
            yield "tokenizer_config.json", self._token("tokenizer_config.json", entry, number)
        for text, token_id in (_optional(self.folder, "added_tokens.json") or {}).items():
            entry = {"content": text, "special": text in self.named_texts}
            yield "added_tokens.json", self._token("added_tokens.json", entry, token_id)

    def _token(self, file: str, entry: Any, token_id: Any) -> AddedToken:
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not _is_id(token_id):
            raise CheckpointError(f"{self.folder / file}: added token {entry!r} is none; {_CURE}")
        greedy = any(entry.get(key) for key in ("lstrip", "rstrip", "single_word"))
        special = bool(entry.get("special"))
        normalized = bool(entry.get("normalized", not special))
        return AddedToken(token_id, text, special, normalized, greedy)

    @cached_property
    def named_texts(self) -> frozenset[str]:
        """Texts of all tokens that the settings give a role."""
        roles = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
        return frozenset(text for role in roles if (text := self.role_text(role)) is not None)

    def role_text(self, role: str) -> str | None:
        """The text of the token with a role ("bos", "eos", ...), from the settings."""
        value = self.settings.get(f"{role}_token")
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """Chat templates by name, "default" among them; as transformers reads them.

        ``chat_template.jinja`` and its companions win over ``tokenizer_config.json``.
        """
        main = self.folder / "chat_template.jinja"
        more = sorted((self.folder / TEMPLATES_FOLDER).glob("*.jinja"))
        named = {"default": main} if exists(main) else {}
        named |= {path.stem: path for path in more if not is_hidden(path)}
        if named:
            return {name: self._text(path) for name, path in named.items()}
        value = self.settings.get("chat_template")
        if value is None:
            value = (_optional(self.folder, "chat_template.json") or {}).get("chat_template")
        if isinstance(value, str):
            value = {"default": value}
        if isinstance(value, dict):
            value = [{"name": name, "template": text} for name, text in value.items()]
        if len(str(value)) > _LARGEST_TEMPLATE:
            raise CheckpointError(f"{self.folder / 'tokenizer_config.json'}: {_TOO_LARGE}")
        try:
            return {str(entry["name"]): str(entry["template"]) for entry in value or ()}
        except (TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder / 'tokenizer_config.json'}: chat_template is neither a template "
                f"nor a list of named ones; {_CURE}"
            ) from error

    def _text(self, path: Path) -> str:
        real = resolve_inside(self.folder, path.relative_to(self.folder).as_posix())
        try:
            return read_bytes(real, _LARGEST_TEMPLATE).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def steps(block: Json | None, members: str) -> list[Json]:
    """The steps of a normalizer, pre-tokenizer or post-processor, its sequences laid flat.

    Args:
        block: as in ``tokenizer.json``, or None.
        members: the key of a sequence's list, as "pretokenizers".
    """
    if not isinstance(block, dict):
        return []
    if block.get("type") != "Sequence":
        return [block]
    return [step for member in block.get(members) or () for step in steps(member, members)]


def _optional(folder: Path, name: str) -> dict[str, Any] | None:
    return optional_json(
        folder, name, most_bytes=LARGEST_TOKENIZER, most_values=MOST_OF_A_TOKENIZER
    )


def _block(tokenizer: Json, key: str, file: Path) -> Json:
    value = tokenizer.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: has no {key}; {_CURE}")
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
