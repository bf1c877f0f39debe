"""What must not leave this machine: where things lie on it, and tokens of the Hub.

A path counts as this machine's when it leads to the user's home, the temporary folder, the current
folder, the Hub's cache or the model, or to a folder that one of these lies in. Of a folder that
others may have as well (``/tmp``, ``/mnt/data``), only what lies in it now counts, and what every
machine has (``/usr``) does not.
"""

import contextlib
import getpass
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Self
from urllib.parse import quote, unquote

from mlx_fusekit.checkpoint.belongings import matches

#: Below them lies the system's own, of which licenses and templates speak.
_SYSTEM = (
    *("usr", "var", "etc", "opt", "bin", "sbin", "lib", "lib64", "dev", "proc", "sys", "run"),
    *("boot", "nix", "snap", "private", "System", "Library", "Applications"),
)
#: Folders that every machine has: what lies in one now is this machine's.
_SHARED = ("/tmp", "/var/tmp", "/private/tmp", "/private/var/tmp")  # noqa: S108 - not used as such
#: Accounts of images and of examples, whose names tell nothing.
_ANYBODY = ("root", "user", "ubuntu", "admin", "runner")
#: A separator: of a path, of Windows, escaped in JSON, percent-encoded.
_SLASH = r"(?:/|\\u00(?:2[fF]|5[cC])|\\(?!u[0-9a-fA-F]{4})|%2[fF]|%5[cC])++"
#: A path begins where no name goes on, or after an escape, a compiler's flag or a host's name.
_START = (
    r"(?:(?<![^\W_])(?<![.~/\\])|(?<=\\[nrtbf])|(?<=-[ILF])"
    r"|(?<=%[0-9a-fA-F]{2})(?<!%2[fF])(?<!%5[cC])"
    r"|[fF][iI][lL][eE]:[/\\]{2}[\w.-]+|[/\\]mnt[/\\][a-z])"
)
#: A name ends where no letter or digit goes on, be it after a dot.
_END = r"(?![^\W_]|[_.-]+[^\W_])"
_REST = re.compile(r"[^\s\"'<>|`()\[\]{},;]*")
_TOKEN = re.compile(r"hf_(?<![A-Za-z0-9_]hf_)[A-Za-z0-9]{30,}")
_SHORTEST_TOKEN, _FEWEST_LETTERS = 8, 8
_SHOWN = 80
#: Where the tokens of a tokenizer are listed, which are no paths.
_TABLES = {"tokenizer*.json": ("model.vocab", "model.merges"), "tekken.json": ("vocab",)}
_TABLE_FILES = ("vocab.json", "vocab.txt", "merges.txt", "*.vocab", "*.tiktoken", "tiktoken.model")


@dataclass(frozen=True)
class Private:
    """What is private on this machine.

    Attributes:
        places: folders of which no path may be told.
        shared: folders of which only paths to what lies there now may not, with its names.
        users: names of the account.
        token: of the Hub.
    """

    places: frozenset[str]
    shared: Mapping[str, frozenset[str]]
    users: frozenset[str] = frozenset()
    token: str | None = None

    @classmethod
    def of_machine(cls, *folders: Path) -> Self:
        """What is private here.

        Args:
            folders: that are private besides, with the folders that they lie in.
        """
        homes = {*_spellings("~"), *_account_homes()} - {"/"}
        own = {s for folder in (*map(str, folders), _hub_cache()) for s in _spellings(folder)}
        # PWD is how the current folder was called, where that leads through links.
        where = [os.curdir, os.environ.get("PWD", os.curdir), _temporary()]
        lying = own | {spelling for folder in where for spelling in _spellings(folder)}
        held = {str(parent) for place in lying for parent in PurePath(place).parents}
        deep = {p for p in lying if len(_parts(p)) > 2}
        deep |= {p for p in held if len(_parts(p)) > 2 and not _is_system(p)}
        deep |= {p for p in own if len(_parts(p)) == 2 and not _is_system(p)}
        known = (deep | homes) - set(_SHARED)
        shared = {p for p in lying | held if p != "/" and not _is_system(p)} - known
        shared |= set(_SHARED)
        users = {_account(), *(PurePath(home).name for home in homes)}
        return cls(
            places=frozenset(known),
            # The longest first; of one in another, its own names count.
            shared={
                place: frozenset(n for n in _names_in(place) if f"{place}/{n}" not in shared)
                for place in sorted(shared, reverse=True)
            },
            users=frozenset(users - {"", *_ANYBODY}),
            token=_hub_token(),
        )

    def in_text(self, text: str) -> str | None:
        """The first that a text has, in words with the line; None for nothing."""
        return None if (found := self._first(text)) is None else _in_line(text, *found)

    def in_file(self, name: str, content: bytes) -> str | None:
        """The first that a file has, in words with its line or JSON key; None for nothing.

        Args:
            name: of the file. A vocabulary is not searched: its entries are no paths.
            content: all of it, in whatever form; where it is not JSON it is taken for text.
        """
        if matches(name, _TABLE_FILES):
            return None
        if name.endswith(".json"):
            with contextlib.suppress(ValueError, RecursionError):
                # As pairs: a key that is there twice is uploaded twice.
                value = json.loads(content, object_pairs_hook=_Pairs)
                tables = [keys for pattern, keys in _TABLES.items() if matches(name, (pattern,))]
                return self.in_values(value, tables[0] if tables else ())
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
        return self.in_text(content.decode(encoding, "replace"))

    def in_values(self, value: Any, tables: Collection[str] = ()) -> str | None:
        """The first that a JSON value has among its strings and keys; None for nothing.

        Args:
            tables: keys, in dotted form, of values that are not looked into.
        """
        for where, text in _strings(value, tables):
            if (found := self._first(text)) is not None:
                return f"{found[0]}, at {self._key(where)}" if where else found[0]
        return None

    def _key(self, where: str) -> str:
        """A key as it may be shown, which may be a token itself."""
        hidden = _TOKEN.sub("hf_…", where if self.token is None else where.replace(self.token, "…"))
        return json.dumps(hidden[:_SHOWN], ensure_ascii=not hidden.isprintable())

    def _first(self, text: str) -> tuple[str, int] | None:
        """In words, and the place in the text."""
        if self.token is not None and (start := text.find(self.token)) >= 0:
            return "your token of the Hub", start
        for token in _TOKEN.finditer(text):
            # Fewer are a row of x in an example.
            if len(set(token[0])) >= _FEWEST_LETTERS:
                return "a token of the Hub (hf_…)", token.start()
        for pattern in self._patterns:
            for path in pattern.finditer(text):
                if self._is_here(path):
                    return f"a path of this machine ({_shown(text, path.start())})", path.start()
        return None

    def _is_here(self, path: re.Match[str]) -> bool:
        """Whether a path below a shared folder leads to what lies there."""
        place = next((name for name in path.groupdict() if path[name] is not None), None)
        if place is None:
            return True
        names = self._shared_names[place]
        return {unquote(path[place]), unquote(path[place]).rstrip("._-")} & names != set()

    @cached_property
    def _shared_names(self) -> Mapping[str, frozenset[str]]:
        return {f"in{i}": names for i, names in enumerate(self.shared.values())}

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        users = [_spelled_name(user) for user in sorted(self.users)]
        shapes = [
            # Of `/root` alone nothing is learned.
            _spelled(place) + (_END if len(_parts(place)) > 1 else rf"{_SLASH}[._]?[^\W_]")
            for place in sorted(self.places)
        ]
        shapes += [rf"{_SLASH}(?:home|Users){_SLASH}{user}{_END}" for user in users]
        beneath = [
            rf"{_spelled(place)}{_SLASH}(?P<in{i}>[^\s/\\\"'<>|`()\[\]{{}},;:]+)"
            for i, place in enumerate(self.shared)
        ]
        patterns = [f"{_START}(?:{'|'.join(some)})" for some in (shapes, beneath) if some]
        if users:
            patterns.append(rf"(?<!\w)~(?:{'|'.join(users)})(?={_SLASH})")
        return tuple(map(re.compile, patterns))


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written."""


def _strings(value: Any, tables: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every string and key of a JSON value, with the dotted key that it lies at."""
    rest: list[tuple[str, Any]] = [("", value)]
    while rest:
        where, item = rest.pop()
        if isinstance(item, str):
            yield where, item
        elif isinstance(item, _Pairs | Mapping):
            pairs = item.items() if isinstance(item, Mapping) else item
            keyed = [(f"{where}.{key}".removeprefix("."), key, held) for key, held in pairs]
            yield from ((place, key) for place, key, _ in keyed)
            rest += [(place, held) for place, _, held in reversed(keyed) if place not in tables]
        elif isinstance(item, list | tuple):
            rest += [(where, held) for held in reversed(item)]


def _in_line(text: str, what: str, start: int) -> str:
    line = text.count("\n", 0, start) + 1
    return f"{what}, in line {line}" if "\n" in text.rstrip("\n") else what


def _shown(text: str, start: int) -> str:
    """A path that begins there, on one line and of moderate length."""
    found = _REST.match(text, start)
    # The slashes of file:// are no part of it.
    path = re.sub(r"^(?:file:)?/+", "/", found[0] if found else "").rstrip(".")
    path = "".join(letter if letter.isprintable() else "?" for letter in path)
    return path if len(path) <= _SHOWN else f"{path[:_SHOWN]}…"


def _spelled(place: str) -> str:
    """A pattern of a folder, in every spelling."""
    return "".join(_SLASH + _spelled_name(part) for part in _parts(place))


def _spelled_name(name: str) -> str:
    forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    return f"(?:{'|'.join(''.join(map(_spelled_letter, form)) for form in sorted(forms))})"


def _spelled_letter(letter: str) -> str:
    percent = quote(letter, safe="", errors="surrogateescape")
    forms = {letter, percent, percent.lower() if len(percent) > 1 else percent}
    if not letter.isascii():
        forms |= {rf"\u{ord(letter):04x}", rf"\u{ord(letter):04X}"}
    elif letter == " ":
        forms.add(r"\ ")
    return f"(?:{'|'.join(map(re.escape, sorted(forms)))})" if len(forms) > 1 else re.escape(letter)


def _spellings(folder: str) -> set[str]:
    """A folder as it is called, and as it is found where that leads through links."""
    # Not of pathlib, which keeps `..`, and raises where there is no home.
    path = os.path.expanduser(folder)  # noqa: PTH111
    with contextlib.suppress(OSError):  # the current folder may be gone
        return {os.path.abspath(path), os.path.realpath(path)}  # noqa: PTH100
    return set()


def _parts(place: str) -> tuple[str, ...]:
    return PurePath(place).parts[1:]


def _is_system(place: str) -> bool:
    return _parts(place)[:1] != () and _parts(place)[0] in _SYSTEM


def _names_in(folder: str) -> frozenset[str]:
    with contextlib.suppress(OSError):
        return frozenset(path.name for path in Path(folder).iterdir())
    return frozenset()


def _account() -> str:
    # Without a name where the system knows none, as in some containers.
    with contextlib.suppress(OSError, KeyError, ImportError):
        return getpass.getuser()
    return ""


def _account_homes() -> set[str]:
    """The account's own home, where HOME says another."""
    with contextlib.suppress(KeyError, ImportError):
        import pwd

        return _spellings(pwd.getpwuid(os.getuid()).pw_dir)
    return set()


def _temporary() -> str:
    # There is none where the disk is full, say.
    with contextlib.suppress(OSError):
        return tempfile.gettempdir()
    return "/"


def _hub_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _hub_token() -> str | None:
    from huggingface_hub import get_token

    token = get_token()
    return token if token is not None and len(token) >= _SHORTEST_TOKEN else None
