"""From what a user names, a folder or a Hugging Face Hub id, to a local folder."""

import contextlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fusekit.checkpoint.belongings import download_patterns
from mlx_fusekit.checkpoint.recipe import holds_its_name
from mlx_fusekit.errors import HubError
from mlx_fusekit.reading import exists, is_file
from mlx_fusekit.writing import calls

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PUBLIC_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


#: How long an answer may stay out, in seconds.
_TIMEOUT = 300.0


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A model's or adapter's folder on this machine.

    Attributes:
        repo_id: its id on the Hub, when it came from there.
        revision: the commit, when it came from the Hub.
        trusted: whether model code that lies in it may run.
    """

    path: Path
    repo_id: str | None = None
    revision: str | None = None
    trusted: bool = False

    @property
    def identity(self) -> str:
        """Hub id, or the path as the user gave it: what an adapter says it was trained on."""
        return self.repo_id or str(self.path)

    @property
    def public_name(self) -> str:
        """Hub id, or the folder's own name: never a path of this machine."""
        return self.repo_id or self.path.resolve().name


def hub_id(value: Any) -> str | None:
    """A Hub id, ``owner/name``; None for anything else, and so for every absolute path."""
    return value if isinstance(value, str) and _PUBLIC_ID.fullmatch(value) else None


def resolve(
    name: str | Path, *, revision: str | None = None, what: str = "--model", code: bool = False
) -> LocalFolder:
    """The local folder of a path or Hub id; downloads what is missing.

    huggingface_hub's own rules hold for the cache (``HF_HOME``), the token (``HF_TOKEN``) and
    offline work (``HF_HUB_OFFLINE``).

    Args:
        name: a folder, or a Hub id like "mlx-community/Llama-3.2-1B-Instruct-4bit".
        revision: branch, tag or commit; for Hub ids only.
        what: the flag to name in a message.
        code: whether ``*.py`` files are wanted, and may run.

    Raises:
        HubError: with the cure, when there is no such folder or repository.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise HubError(f"{what} {name}: there is no such user; check the name") from error
    if is_file(path):
        raise HubError(f"{what} {name}: is a file; {_folder_of(path)}")
    if exists(path):
        if revision is not None:
            raise HubError(
                f"--revision {revision}: {path} is a folder and has no revisions; drop the flag"
            )
        return replace(_known_snapshot(path), trusted=code)
    if not _REPO_ID.fullmatch(str(name)):
        defaults = {"--model": "mlx_model", "--adapter-path": "adapters"}
        default = defaults.get(what) == str(name)
        advice = f"; that is the default: name yours with {what}" * default
        raise HubError(f"{what} {name}: neither a folder here nor a Hub id (owner/name){advice}")
    return replace(_download(str(name), revision, what, code), trusted=code)


def _folder_of(file: Path) -> str:
    """What to give in the place of a file."""
    if file.suffix.lower() == ".gguf":
        return "a GGUF file cannot be used here; give the folder of the model in safetensors format"
    return f"give the folder that it lies in, {file.parent}"


def _known_snapshot(path: Path) -> LocalFolder:
    """A folder; its Hub id and revision when it is a snapshot in the Hub's cache."""
    real = path.resolve()
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        repo_id = "/".join(real.parent.parent.name.split("--")[1:])
        return LocalFolder(path, repo_id, real.name)
    return LocalFolder(path)


def _download(repo_id: str, revision: str | None, what: str, code: bool) -> LocalFolder:
    from huggingface_hub import errors, snapshot_download

    patterns = download_patterns(trust_remote_code=code)
    at = f" at revision {revision}" if revision else ""
    try:
        before = _blobs(repo_id)
        with patience():
            path = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise HubError(
            f"{what} {repo_id}: access is gated; ask for it on the model's page, "
            "then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{what} {repo_id}: no such folder here and no such repository on the Hub; "
            "check the name, and log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"--revision {revision}: {repo_id} has no such revision; check the name"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refusal(what, repo_id, error.__cause__) from error
        raise HubError(
            f"{what} {repo_id}{at}: not in the local cache, and the Hub cannot be reached; "
            "connect (or unset HF_HUB_OFFLINE), or give a folder"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(what, repo_id, error) from error
    # The bases are the HTTP library's error, which is no OSError, and OSError.
    except errors.HfHubHTTPError.__bases__ as error:  # type: ignore[misc]
        raise HubError(f"{what} {repo_id}: could not be downloaded ({_cause(error)})") from error
    except errors.HFValidationError as error:
        raise HubError(f"{what} {repo_id}: no name of a repository; check it") from error
    except Exception as error:  # huggingface_hub takes the form of an answer for granted
        raise HubError(
            f"{what} {repo_id}: the Hub's answer makes no sense ({type(error).__name__}); try "
            "again later, or check HF_ENDPOINT"
        ) from error
    _check_arrived(path, before, f"{what} {repo_id}")
    return LocalFolder(path, repo_id, path.name)


def _check_arrived(snapshot: Path, before: Collection[str], what: str) -> None:
    """Refuse, and remove, a file that is not what the Hub lists; huggingface_hub looks at sizes.

    Args:
        snapshot: of links to blobs; large ones are named by their SHA-256.
        before: names of the blobs that were there before the download.
    """
    for path in sorted(snapshot.rglob("*")):
        blob = path.resolve()
        if blob.parent.name != "blobs" or blob.name in before or not is_file(blob):
            continue
        if not holds_its_name(blob):
            calls.unlink(path)
            calls.unlink(blob)
            raise HubError(
                f"{what}: {path.relative_to(snapshot)} arrived damaged (its hash is not the one "
                "that the Hub lists), and was removed; run it again to download it anew"
            )


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Let huggingface_hub wait for each answer for a while, and not without end."""
    from huggingface_hub import get_session

    # Not as the session's timeout: most requests are made with none, explicitly.
    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks.get("request", ()), _bound]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def _bound(request: Any) -> None:
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        kind: _TIMEOUT if limits.get(kind) is None else limits[kind]
        for kind in ("connect", "read", "write", "pool")
    }


def _cause(error: BaseException) -> str:
    """The system's words, and its file, or the kind of error; the text may hold addresses."""
    if not isinstance(error, OSError) or not error.strerror:
        return type(error).__name__
    return error.strerror + (f": {error.filename}" if error.filename else "")


def _blobs(repo_id: str) -> frozenset[str]:
    """Names of the files that the cache has of a repository, be they complete or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    return frozenset(path.name for path in folder.glob("blobs/*"))


def _refusal(what: str, repo_id: str, error: "HfHubHTTPError") -> HubError:
    """What the Hub's answer means; its own text may hold addresses, so it is not repeated."""
    status = error.response.status_code
    cure = {
        401: "log in with `hf auth login`, or check HF_TOKEN",
        403: "your token may not read it; check its rights",
        404: "check the name",
        429: "too many requests; wait a little",
    }.get(status, "try again later")
    return HubError(f"{what} {repo_id}: the Hub answered {status}; {cure}")
