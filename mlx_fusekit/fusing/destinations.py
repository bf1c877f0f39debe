"""Where a fused model goes on to, when that was asked for: a GGUF file, the Hub."""

import contextlib
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mlx_fusekit.checkpoint.base import BaseModel
from mlx_fusekit.checkpoint.belongings import Step, belongs
from mlx_fusekit.errors import FusekitError
from mlx_fusekit.fusing.options import FuseOptions
from mlx_fusekit.fusing.report import FuseReport
from mlx_fusekit.progress import StepProgress

_FLAG = "--upload-repo"


def check(
    base: BaseModel, target: Path, options: FuseOptions, sources: Iterable[Path]
) -> tuple[str, ...]:
    """Refuse what can be refused without a network, before anything is fused.

    Args:
        base: what the fused model will be like.
        target: its folder.
        options: what was asked for.
        sources: folders that are read: the base and the adapters.

    Returns:
        Warnings, one line each.

    Raises:
        FusekitError: for a model that cannot be exported, a file that must not be written, or what
            no repository can be called.
    """
    notes = []
    if options.export_gguf:
        from mlx_fusekit.gguf.exporting import check_export
        from mlx_fusekit.gguf.file.target import gguf_target

        file = _gguf_file(target, options)
        check_export(base, options.outtype)
        gguf_target(file, overwrite=options.overwrite, sources=tuple(sources)).check()
        if options.upload_repo is not None and file.resolve().parent != target.resolve():
            notes.append(f"--gguf-path {file}: is not in {target}, and is not uploaded")
    if options.upload_repo is not None:
        from mlx_fusekit.publishing.upload import check_name

        check_name(options.upload_repo, _FLAG)
    return tuple(notes)


def check_texts(
    sources: Sequence[Path], copied: Collection[str], target: Path, options: FuseOptions
) -> None:
    """Refuse files of the base that would not be uploaded, before anything is fused.

    Args:
        sources: folders of the base, and of the adapters.
        copied: names of the base's files that go along.
        target: folder of the fused model.
        options: what was asked for.

    Raises:
        CheckpointError: naming the file and what it tells of this machine.
    """
    if options.upload_repo is not None:
        from mlx_fusekit.publishing.files import refuse_private_files
        from mlx_fusekit.publishing.private import Private

        # Code comes along only where it is trusted.
        names = [name for name in copied if belongs(name, Step.PUBLISH, trust_remote_code=True)]
        private = Private.of_machine(target, *sources)
        refuse_private_files(sources[0], ["config.json", *names], private)


def check_upload(options: FuseOptions) -> None:
    """Refuse a repository that cannot be written to; asks the Hub.

    Raises:
        HubError: with the cure.
    """
    if options.upload_repo is not None:
        from mlx_fusekit.publishing.upload import check_access

        check_access(options.upload_repo, what=_FLAG)


def bring(
    report: FuseReport,
    options: FuseOptions,
    *,
    sources: Sequence[Path],
    trusted: bool,
    progress: StepProgress | None,
) -> FuseReport:
    """Export and upload what was fused.

    Args:
        report: of the fuse.
        options: what was asked for.
        sources: folders of the base, and of the adapters.
        trusted: whether the model's own code may run, and goes along.
        progress: told of the export.

    Returns:
        The report, with what came of it.

    Raises:
        FusekitError: with a line that says where the fused model is.
    """
    target = Path(report.save_path)
    if options.export_gguf:
        from mlx_fusekit.gguf.exporting import export_gguf

        with _saying(f"the fused model is in {target}, without a GGUF file"):
            exported = export_gguf(
                target,
                _gguf_file(target, options),
                outtype=options.outtype,
                overwrite=options.overwrite,
                trust_remote_code=trusted,
                progress=progress,
            )
        report = replace(report, gguf=exported)
    if options.upload_repo is None:
        return report
    if not report.passed:
        line = _how_to_publish(target, options.upload_repo)
        kept = "does not hold" if report.calibration else "was not measured"
        note = f"not uploaded, since --max-kl {kept}; {line}"
        return replace(report, warnings=(*report.warnings, note))
    return _uploaded(report, target, options.upload_repo, sources, trusted=trusted)


def _uploaded(
    report: FuseReport, target: Path, repo: str, sources: Sequence[Path], *, trusted: bool
) -> FuseReport:
    from mlx_fusekit.publishing.publish import publish

    with _saying(_how_to_publish(target, repo)):
        published = publish(target, repo, trust_remote_code=trusted, sources=sources)
    warnings = (*report.warnings, *published.warnings)
    return replace(report, published=published, warnings=warnings)


@contextlib.contextmanager
def _saying(line: str) -> Iterator[None]:
    """Whatever ends the block, its message says too what is there."""
    try:
        yield
    except FusekitError as error:
        raise type(error)(f"{error}; {line}") from error
    except KeyboardInterrupt as error:
        error.add_note(line)
        raise


def _gguf_file(target: Path, options: FuseOptions) -> Path:
    return target / Path(options.gguf_path).expanduser()


def _how_to_publish(target: Path, repo: str) -> str:
    command = shlex.join(["mlx-fusekit", "publish", "--path", str(target), "--repo", repo])
    return f"the fused model is in {target}, and `{command}` uploads it"
