"""Writing to the Hugging Face Hub: who we are, the repository, and the upload itself.

huggingface_hub does the work: it finds the token, retries, and sends only what the Hub has not.
What it raises becomes a :class:`HubError` of one line without a token in it.
"""

import contextlib
import glob
import logging
import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fusekit.checkpoint.belongings import CARD_NAME
from mlx_fusekit.errors import ConfigurationError, HubError
from mlx_fusekit.hub import patience
from mlx_fusekit.reading import read_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

#: What mlx-lm reads all of: one of another upload that stayed would be loaded with the model.
_WEIGHTS = re.compile(r"model[^/]*\.safetensors|model\.safetensors\.index\.json")
_TOKEN = re.compile(r"hf_\w+")
_QUERY = re.compile(r"\?[^\s'\"]+")
_LONGEST = 300
_LARGEST_CARD = 10_000_000
_AGAIN = "`mlx-fusekit publish` goes on from there: what has arrived is not sent twice"
_CURES = {
    400: "",
    401: "log in with `hf auth login`, or check HF_TOKEN",
    402: "see the billing of your account",
    403: "your token or account may not write there, or its storage is full; check their rights",
    404: "check the name, and that your token may see it",
    409: "somebody else is changing it; try again",
    413: "a file is larger than the Hub takes",
    429: "too many requests; wait a little, and try again",
}


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What an upload made.

    Attributes:
        commit: its id.
        commit_url: where it is.
        pull_request_url: of the pull request, where one was asked for.
        removed: weight files of another model that were in the repository.
        warnings: what the Hub says of the card.
    """

    commit: str
    commit_url: str
    pull_request_url: str | None
    removed: tuple[str, ...]
    warnings: tuple[str, ...]


def check_name(repo: str, what: str = "--repo") -> None:
    """Refuse what no repository can be called; asks nobody.

    Args:
        repo: ``owner/name``, or ``name`` for one of the user's own.
        what: the flag to name in a message.

    Raises:
        ConfigurationError: with what is wrong with it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigurationError(
            f"{what} {repo}: not a name for a repository; give owner/name, of letters, digits, "
            "'-', '_' and '.', with none of '--' and '..'"
        ) from error


def check_access(repo: str, *, create_pr: bool = False, what: str = "--repo") -> str:
    """Ask the Hub whose token this is, and refuse one that cannot write.

    Args:
        repo: ``owner/name``, or ``name`` for one of the user's own.
        create_pr: whether only a pull request is to be opened, which others' repositories take too.
        what: the flag to name in a message.

    Returns:
        ``owner/name``.

    Raises:
        ConfigurationError: when the name is none.
        HubError: when there is no token, the Hub does not take it, or it may not write there.
    """
    check_name(repo, what)
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(
            f"{what} {repo}: you are not logged in; run `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        )
    with _as_hub_errors(f"{what} {repo}"):
        account = _api().whoami()
    name = _at(account, "name")
    if not isinstance(name, str):
        raise HubError(f"{what} {repo}: the Hub did not say whose token this is; try again later")
    if _at(account, "auth", "accessToken", "role") == "read":
        raise HubError(
            f"{what} {repo}: your token may only read; make one that may write at "
            "https://huggingface.co/settings/tokens"
        )
    owner, slash, _ = repo.rpartition("/")
    if not slash:
        return f"{name}/{repo}"
    organizations = _at(account, "orgs")
    listed = organizations if isinstance(organizations, list) else []
    owners = [name, *(_at(organization, "name") for organization in listed)]
    if owner not in owners and not create_pr:
        raise HubError(
            f"{what} {repo}: you are {name}, and {owner} is not among your organizations; publish "
            f"as {name}/{repo.rpartition('/')[2]}, or offer it with --create-pr"
        )
    return repo


def read_card(repo_id: str, revision: str | None = None) -> str | None:
    """The card of a model on the Hub; None where there is no such model, or no card.

    Args:
        repo_id: ``owner/name``.
        revision: a branch; where it has none, the card of the main branch counts.

    Raises:
        HubError: when the Hub does not tell whether there is one.
    """
    from huggingface_hub import get_token, hf_hub_download

    token = get_token() is not None
    with _as_hub_errors(repo_id):
        for wanted in dict.fromkeys((revision, None)):
            if _api().file_exists(repo_id, CARD_NAME, revision=wanted, token=token):
                # Not from the cache: what was written on the Hub since would be overwritten.
                path = hf_hub_download(
                    repo_id, CARD_NAME, revision=wanted, token=token, force_download=True
                )
                return _card_text(repo_id, Path(path))
    return None


def open_repository(repo_id: str, *, public: bool, revision: str | None = None) -> bool:
    """Find or make a model repository, and a branch of it.

    Args:
        repo_id: ``owner/name``.
        public: whether everybody may see it.
        revision: a branch that is made where it is not there; None is the main one.

    Returns:
        Whether it is private.

    Raises:
        HubError: when it cannot be made, or is public and ``public`` is false.
    """
    with _as_hub_errors(repo_id):
        api = _api()
        info = _find(api, repo_id)
        if info is None:
            api.create_repo(repo_id, private=not public, exist_ok=True)
            info = _find(api, repo_id)
        if info is not None and not isinstance(info.private, bool):
            raise HubError(f"{repo_id}: the Hub does not say who can see it; try again later")
        if info is not None and not info.private and not public:
            raise HubError(
                f"{repo_id}: exists, and everybody can see it; add --public to publish there all "
                "the same, or choose another name"
            )
        if revision is not None and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return info is None or info.private is True


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    create_pr: bool = False,
    revision: str | None = None,
) -> Uploaded:
    """Upload all files of a folder in one commit, or in a few where there are very many.

    Weight files in the repository that the folder has not are removed: mlx-lm would load them too.

    Raises:
        HubError: with the cure; what has arrived is not sent again by another run.
    """
    with (
        _as_hub_errors(repo_id, _AGAIN),
        _without_addresses(),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        api = _api()
        ours = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        removed = _foreign_weights(api.list_repo_files(repo_id, revision=revision), ours)
        made = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            create_pr=create_pr,
            revision=revision,
            delete_patterns=[glob.escape(name) for name in removed] or None,
        )
    said = dict.fromkeys(_readable(str(warning.message)) for warning in caught)
    if not isinstance(made.oid, str) or not isinstance(made.commit_url, str):
        raise HubError(f"{repo_id}: the Hub does not say what it committed; see whether it did")
    return Uploaded(made.oid, made.commit_url, made.pr_url, removed, tuple(said))


def _at(value: Any, *keys: str) -> Any:
    """What lies at a path in an answer of the Hub; None where it has another form."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _card_text(repo_id: str, path: Path) -> str:
    try:
        return read_bytes(path, _LARGEST_CARD).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = "no text in UTF-8" if isinstance(error, ValueError) else error.strerror
        raise HubError(f"{repo_id}: its {CARD_NAME} is {why}; put it right on the Hub") from error


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    # True: the user's token is sent even where HF_HUB_DISABLE_IMPLICIT_TOKEN is set.
    return HfApi(token=True, library_name="mlx-fusekit")


def _find(api: "HfApi", repo_id: str) -> "ModelInfo | None":
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


def _foreign_weights(there: Collection[str], ours: Collection[str]) -> tuple[str, ...]:
    """Weights in the repository that would be loaded together with ours."""
    if not any(_WEIGHTS.fullmatch(name) for name in ours):
        return ()
    return tuple(name for name in sorted(there) if _WEIGHTS.fullmatch(name) and name not in ours)


@contextlib.contextmanager
def _as_hub_errors(repo: str, again: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into one line, with ``again`` where trying again helps."""
    from huggingface_hub import errors

    try:
        with patience():
            yield
    except HubError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"{repo}: HF_HUB_OFFLINE is set; unset it to publish") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo}: has no such revision; check --revision") from error
    # Whatever it is: huggingface_hub takes the form of an answer for granted.
    except Exception as error:
        raise HubError(f"{repo}: {_explained(error, again)}") from error


def _explained(error: BaseException, again: str) -> str:
    """The Hub's answer, a file of ours, or the connection: what an error comes from."""
    from huggingface_hub.errors import HfHubHTTPError

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    answered = ((link, status) for link in chain if (status := _status(link)) is not None)
    if (refused := next(answered, None)) is not None:
        return _refusal(*refused, again)
    bottom = chain[-1]
    said = _readable(str(bottom)) or type(bottom).__name__
    if isinstance(bottom, FileNotFoundError | PermissionError):
        return said
    # The bases are the HTTP library's error, which is no OSError, and OSError.
    failures = (*HfHubHTTPError.__bases__, RuntimeError)
    if any(isinstance(link, failures) and not isinstance(link, RecursionError) for link in chain):
        return "; ".join(filter(None, (f"the connection to the Hub failed ({said})", again)))
    shown = _readable(f"{type(error).__name__}: {error}")
    return f"the Hub's answer makes no sense ({shown}); {again or 'try again later'}"


def _status(error: BaseException) -> int | None:
    """Of the answer that an error is about."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _refusal(error: Any, status: int, again: str) -> str:
    said = _readable(str(getattr(error, "server_message", None) or ""))
    cure = _CURES.get(status, "try again later")
    if status == 429 and (seconds := error.response.headers.get("Retry-After", "")).isdigit():
        cure = f"too many requests; wait {seconds} seconds, and try again"
    elif status >= 500 and again:
        cure = again
    answer = f"the Hub answered {status}" + (f" ({said})" if said else "")
    return "; ".join(filter(None, (answer, cure)))


def _readable(text: str) -> str:
    """One line of moderate length without anything secret."""
    line = _QUERY.sub("", _TOKEN.sub("hf_…", " ".join(text.split())))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def _clean(record: logging.LogRecord) -> bool:
    record.msg, record.args = _readable(record.getMessage()), ()
    return True


@contextlib.contextmanager
def _without_addresses() -> Iterator[None]:
    """Let huggingface_hub's log tell what it retries, without the signatures in its addresses."""
    with contextlib.ExitStack() as stack:
        # A filter of the logger would not see what its children log.
        for handler in logging.getLogger("huggingface_hub").handlers:
            handler.addFilter(_clean)
            stack.callback(handler.removeFilter, _clean)
        yield
