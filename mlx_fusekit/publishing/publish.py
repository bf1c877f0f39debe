"""Publishing: a fused model's folder to the Hugging Face Hub, with a card that tells what it is.

Everything that can be refused on this machine is refused before the Hub is asked, and everything
that the Hub refuses before anything is sent. The folder itself is never written to: what is
uploaded is laid out beside it, as links to its files.
"""

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_fusekit.checkpoint.belongings import CARD_NAME
from mlx_fusekit.checkpoint.folder import is_adapter
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME
from mlx_fusekit.errors import CheckpointError, ConfigurationError, HubError
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.publishing import upload as hub_upload
from mlx_fusekit.publishing.card import Card, CardFacts, write_card
from mlx_fusekit.publishing.evidence import read_evidence
from mlx_fusekit.publishing.files import LeftOut, PublishedFile, PublishedModel
from mlx_fusekit.publishing.licenses import License, languages_of
from mlx_fusekit.reading import is_file, is_folder
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.files import write_new
from mlx_fusekit.writing.staging import temporary_folder

_MAIN = "main"


@dataclass(frozen=True)
class PublishReport:
    """What publishing did, or with ``dry_run`` would do.

    Attributes:
        repo: ``owner/name``; in a dry run the name the user gave.
        private: whether only people with access to it see it.
        files: what was uploaded, by name in the repository, the card among them.
        left_out: what stayed in the folder, and why.
        removed: weight files of another model that were in the repository.
        bytes: of all files; the Hub does not take again what it has.
        card: the text of ``README.md``.
        license: identifier; None where it is not known.
        verified: whether a report was given in which ``verify`` found that the fine-tune was kept.
        commit: its id; None in a dry run, as ``commit_url`` and ``pull_request_url``.
    """

    repo: str
    revision: str | None
    private: bool
    files: tuple[PublishedFile, ...]
    left_out: tuple[LeftOut, ...]
    removed: tuple[str, ...]
    bytes: int
    card: str
    license: str | None
    verified: bool
    commit: str | None = None
    commit_url: str | None = None
    pull_request_url: str | None = None
    dry_run: bool = False
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


def publish(
    path: str | Path,
    repo: str,
    *,
    public: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    verify_report: str | Path | None = None,
    bench_report: str | Path | None = None,
    license: str | None = None,  # noqa: A002 - the Hub's word for it
    trust_remote_code: bool = False,
    dry_run: bool = False,
    progress: StepProgress | None = None,
    licence: str | None = None,
    sources: Collection[Path] = (),
) -> PublishReport:
    """Upload a fused model, and its GGUF files if there are any, with a model card.

    An interrupted upload is continued by calling it again: what has arrived is not sent twice.
    The token is huggingface_hub's (``HF_TOKEN``, or the one that ``hf auth login`` stored).

    Args:
        path: the model's folder, or one of GGUF files alone.
        repo: ``owner/name``, or ``name`` for one of the user's own; made where it is not there.
        public: let everybody see it; a repository that exists keeps its visibility.
        create_pr: open a pull request instead of committing.
        revision: branch to commit to, which is made where it is not there; by default main.
        commit_message: of the commit, and title of the pull request.
        verify_report: file with the output of ``verify --json``, for the card.
        bench_report: file that ``bench --json`` wrote, for the card.
        license: the Hub's identifier of the model's license; by default that of the card that is
            there, of the base's card, be it on the Hub or in a folder, or of a LICENSE file in the
            folder.
        trust_remote_code: upload the model's own ``*.py`` files too.
        dry_run: write the card and list the files; reads cards on the Hub, and uploads nothing.
        progress: called with the step, and how many bytes of it are done and there are in all.
            huggingface_hub draws bars of its own on a terminal.
        licence: ``license``, as it was spelt before.
        sources: folders of base and adapters, of which no file may tell either where they lie.

    Raises:
        ConfigurationError: for a flag or report that does not fit.
        CheckpointError: for a folder that is no complete, fused model, that tells a path of this
            machine or a token, or that is changed meanwhile.
        HubError: when the Hub refuses or cannot be reached.
        OutputError: when there is no room in the temporary folder.
    """
    start = time.perf_counter()
    hub_upload.check_name(repo)
    _check_branch(revision, create_pr)
    identifier = licence if license is None else license
    asked = None if identifier is None else License.asked(identifier)
    model = PublishedModel.open(_folder(path), trust_remote_code=trust_remote_code, sources=sources)
    evidence = read_evidence(model, repo, verify_report, bench_report)
    own_card = _own_card(model)
    # Nothing was asked of the Hub so far.
    repo_id = repo if dry_run else hub_upload.check_access(repo, create_pr=create_pr)
    there = _card_there(repo_id, revision, needed=not dry_run)
    card = there if own_card is None else own_card
    facts = _with_origin(
        CardFacts(repo_id, model, evidence, asked, trust_remote_code=trust_remote_code), card
    )
    warnings = (*_warnings(facts, card), *_replaced(own_card, there))
    written = write_card(facts, card)
    model.refuse_private(CARD_NAME, written)
    report = _planned(facts, written, revision, public, warnings)
    if not dry_run:
        report = _upload(model, report, public, create_pr, commit_message, progress)
    return replace(report, seconds=time.perf_counter() - start)


def _folder(path: str | Path) -> Path:
    """The folder of a model, as far as its kind tells."""
    folder = Path(path).expanduser()
    if is_file(folder):
        raise CheckpointError(
            f"--path {path}: is a file; give the folder that it lies in, {folder.parent}"
        )
    if not is_folder(folder):
        raise CheckpointError(f"--path {path}: there is no such folder; name that of a model")
    if is_adapter(folder) and not any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"--path {path}: is an adapter, not a model; publish what `mlx-fusekit fuse` makes of "
            "it and its base"
        )
    return folder


def _check_branch(revision: str | None, create_pr: bool) -> None:
    if create_pr and revision not in (None, _MAIN):
        raise ConfigurationError(
            f"--create-pr opens a pull request against {_MAIN}; drop --revision {revision}, or "
            "--create-pr"
        )


def _own_card(model: PublishedModel) -> Card | None:
    """The card in the folder, found fit to be written into."""
    if (text := model.card) is None:
        return None
    card = Card.parse(text, str(model.folder / CARD_NAME))
    card.with_section("")
    return card


def _with_origin(facts: CardFacts, card: Card | None) -> CardFacts:
    """The facts with license and languages: those asked for, of the card, or of the base."""
    own = card.metadata if card is not None else {}
    base = _base_card(facts.base_id)
    known = (
        facts.license
        or License.of_card(own)
        or License.of_card(base, facts.base_id)
        or License.of_card(facts.recorded_license, facts.base_id, facts.model.names)
        or License.of_files(facts.model.folder)
    )
    languages = tuple(languages_of(own) or languages_of(base))
    return replace(facts, license=known, languages=languages)


def _planned(
    facts: CardFacts, card: str, revision: str | None, public: bool, warnings: tuple[str, ...]
) -> PublishReport:
    """The report of a dry run."""
    files = (*facts.model.files, PublishedFile(CARD_NAME, len(card.encode())))
    return PublishReport(
        repo=facts.repo,
        revision=revision,
        private=not public,
        files=tuple(sorted(files, key=lambda file: file.name)),
        left_out=facts.model.left_out,
        removed=(),
        bytes=sum(file.bytes for file in files),
        card=card,
        license=facts.license.identifier if facts.license else None,
        verified=facts.evidence.verified,
        dry_run=True,
        warnings=warnings,
    )


def _warnings(facts: CardFacts, card: Card | None) -> Iterator[str]:
    yield from facts.model.warnings
    yield from facts.evidence.warnings
    if facts.model.public_recipe is not None:
        yield f"{RECIPE_NAME} is published without the folder of the calibration text"
    if facts.license is None:
        yield "the license is not known; name it with --license, as the base's asks for"
    if facts.base_id is None and (card is None or "base_model" not in card.metadata):
        yield (
            "the card names no base_model, since the base was no model on the Hub; write it into "
            f"the front matter of a {CARD_NAME} in the folder if there is one"
        )


def _replaced(own: Card | None, there: Card | None) -> Iterator[str]:
    if own is not None and there is not None and there.own_text != own.own_text:
        yield f"the text of {CARD_NAME} in the folder takes the place of the one on the Hub"


def _card_there(repo_id: str, revision: str | None, needed: bool) -> Card | None:
    """The card that the repository has, with the text that people wrote there.

    Args:
        needed: whether that text would be lost if the Hub does not answer now.
    """
    text = None
    with contextlib.suppress(*(() if needed else (HubError,))):
        text = hub_upload.read_card(repo_id, revision) if "/" in repo_id else None
    return None if text is None else Card.parse(text, f"{CARD_NAME} of {repo_id} on the Hub")


def _base_card(base_id: str | None) -> Mapping[str, Any]:
    """Front matter of the base's card; one that cannot be had or read says nothing."""
    with contextlib.suppress(HubError, CheckpointError):
        text = hub_upload.read_card(base_id) if base_id is not None else None
        return Card.parse(text or "").metadata
    return {}


def _upload(
    model: PublishedModel,
    report: PublishReport,
    public: bool,
    create_pr: bool,
    commit_message: str | None,
    progress: StepProgress | None,
) -> PublishReport:
    """Do what the report plans, and report it."""
    private = hub_upload.open_repository(report.repo, public=public, revision=report.revision)
    notes = []
    if public and private:
        notes.append(f"{report.repo} exists and is private, and stays so")
    if progress is not None:
        progress("uploading", 0, report.bytes)
    with temporary_folder() as staging:
        _lay_out(model, report.card, staging)
        made = hub_upload.upload(
            staging,
            report.repo,
            commit_message=commit_message or f"Upload {model.folder.resolve().name}",
            create_pr=create_pr,
            revision=report.revision,
        )
    if (changed := model.changed_weights()) is not None:
        raise CheckpointError(
            f"{changed}: was changed while it was uploaded, so that {made.commit_url} may have "
            "some of each; publish it again"
        )
    if progress is not None:
        progress("uploading", report.bytes, report.bytes)
    return replace(
        report,
        private=private,
        removed=made.removed,
        commit=made.commit,
        commit_url=made.commit_url,
        pull_request_url=made.pull_request_url,
        dry_run=False,
        warnings=(*report.warnings, *notes, *made.warnings),
    )


def _lay_out(model: PublishedModel, card: str, staging: Path) -> None:
    """What is uploaded, and nothing else: the texts that were checked, links to the weights."""
    for name in model.names:
        target = staging / name
        if not target.parent.exists():
            calls.make_folder(target.parent)
        if (content := model.checked(name)) is not None:
            write_new(target, content)
        else:
            calls.make_link(target, (model.folder / name).resolve())
    write_new(staging / CARD_NAME, card.encode())
