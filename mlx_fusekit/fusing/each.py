"""Many adapters, each fused into a model of its own, with one pass over their base."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_fusekit import hub
from mlx_fusekit.adapters.ignoring import check_patterns
from mlx_fusekit.adapters.opening import open_adapter
from mlx_fusekit.adapters.sources import AdapterChoice, NamedSources, choose_adapter
from mlx_fusekit.errors import ConfigurationError, FusekitError
from mlx_fusekit.fusing.named import saved_names
from mlx_fusekit.fusing.options import GGUF_NAME, FuseOptions
from mlx_fusekit.fusing.prepared import PreparedFuse, plan_named
from mlx_fusekit.fusing.report import FuseReport
from mlx_fusekit.fusing.shared import OpenedBase
from mlx_fusekit.fusing.together import Together
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.writing.staging import common_folder


@dataclass(frozen=True)
class EachReport:
    """What fusing several adapters did, or with ``dry_run`` would do.

    Attributes:
        save_path: the folder that the models' folders are in.
        reports: of the models, by the names of their folders.
        failed: of the adapters that no model came of, the line that says why, by name.
        seconds: in all.
    """

    save_path: str
    reports: Mapping[str, FuseReport]
    failed: Mapping[str, str]
    seconds: float
    dry_run: bool

    @property
    def passed(self) -> bool:
        """Whether the bound the user set is shown to hold for all models, if there is one."""
        return all(report.passed for report in self.reports.values())

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "each": [{"name": n, **report.as_json()} for n, report in self.reports.items()],
            "failed": [{"adapter": name, "error": line} for name, line in self.failed.items()],
            "save_path": self.save_path,
            "seconds": self.seconds,
            "dry_run": self.dry_run,
        }


@dataclass(frozen=True)
class PreparedEach:
    """Fuses of one base that were checked and planned; nothing has been written.

    Attributes:
        folder: that the models' folders will be in.
        fuses: by the names of their folders.
        failed: as of :class:`EachReport`.
    """

    folder: Path
    fuses: Mapping[str, PreparedFuse]
    failed: Mapping[str, str]

    def report(self) -> EachReport:
        """What will be done, from the plans alone."""
        reports = {name: fuse.report() for name, fuse in self.fuses.items()}
        return EachReport(str(self.folder), reports, self.failed, 0.0, dry_run=True)

    def run(
        self,
        *,
        clone: bool = True,
        workers: int | None = None,
        progress: StepProgress | None = None,
    ) -> EachReport:
        """Write the fused models; one that fails leaves the others.

        Args:
            clone: whether the file system may share unchanged blocks with the base.
            workers: threads; the result does not depend on their number.
            progress: called with the step, and how much of it is done and there is in all.

        Raises:
            FusekitError: with a line for the user, for what concerns all that are still to come.
        """
        start = time.perf_counter()
        run = Together(self.fuses, dict(self.failed), clone, workers, progress)
        if self.fuses:
            with common_folder(self.folder):
                run.write(self.folder)
        reports = {name: run.done[name] for name in self.fuses if name in run.done}
        seconds = time.perf_counter() - start
        return EachReport(str(self.folder), reports, run.failed, seconds, dry_run=False)


def prepare_each(
    model: str | Path,
    adapter_paths: Sequence[str | Path],
    save_path: str | Path,
    *,
    scale: float | None = None,
    ignore: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreparedEach:
    """Check everything that can be refused, and plan the fuses; writes nothing.

    Args: as :func:`fuse_each`.

    Raises:
        FusekitError: for what is wrong with the base or the options, or in the same way with every
            adapter. What is wrong with one of them is told by the result.
    """
    asked = FuseOptions(**options)
    _check(asked, adapter_paths, scale)
    found = hub.resolve(model, revision=revision, code=trust_remote_code)
    errors: dict[str, FusekitError] = {}
    chosen: list[AdapterChoice] = []
    for given in map(str, adapter_paths):
        with _told_of(given, errors):
            chosen.append(choose_adapter(given))
    names = saved_names([choice.folder for choice in chosen])
    named = {
        name: NamedSources(found, (choice,), scale, ignore=tuple(ignore))
        for name, choice in zip(names, chosen, strict=True)
    }
    path = Path(save_path).expanduser()
    fuses = _planned(named, path, asked, errors)
    lines = {name: str(error) for name, error in errors.items()}
    if not fuses and len(set(lines.values())) == 1:
        raise next(iter(errors.values()))
    return PreparedEach(path, fuses, lines)


def fuse_each(
    model: str | Path,
    adapter_paths: Sequence[str | Path],
    save_path: str | Path,
    *,
    progress: StepProgress | None = None,
    **options: Any,
) -> EachReport:
    """Fuse each of several adapters into a model of its own, with one pass over the base.

    Each model has the bytes that :func:`mlx_fusekit.fuse` gives it, in a folder of its adapter's
    name. Where weights are rounded to nearest or dequantized, the base is read once for all; where
    they are calibrated, it is loaded once, and writes its general text once.

    Args:
        model: folder or Hub id of the base.
        adapter_paths: folders or Hub ids of the adapters; each may be followed by ``:WEIGHT`` to
            scale its update.
        save_path: the folder to make the models' folders in.
        progress: called with the step, and how much of it is done and there is in all.
        options: as of :func:`mlx_fusekit.fuse`; ``scale`` goes with one adapter, ``gguf_path`` is a
            name in each model's folder, and ``upload_repo`` and ``combine`` do not go here.

    Returns:
        The reports of the models, and of the adapters that failed the lines that say why.

    Raises:
        FusekitError: for what is wrong with the base or the options, or in the same way with every
            adapter; models that were finished stay.
    """
    prepared = prepare_each(model, adapter_paths, save_path, **options)
    return prepared.run(progress=progress)


def _check(asked: FuseOptions, adapters: Sequence[str | Path], scale: float | None) -> None:
    """Refuse what makes no sense of each adapter by itself."""
    if not adapters:
        raise ConfigurationError("--adapter-path: give at least one adapter")
    if not asked.combination.is_sum:
        raise ConfigurationError(
            f"--combine {asked.combine}: --each fuses every adapter by itself; drop one of the two"
        )
    if scale is not None and len(adapters) > 1:
        raise ConfigurationError(
            f"--scale {scale:g}: goes with one --adapter-path; weigh each of several with "
            "PATH:WEIGHT"
        )
    if asked.upload_repo is not None:
        raise ConfigurationError(
            f"--upload-repo {asked.upload_repo}: a repository holds one model, and --each makes "
            "several; upload each with `mlx-fusekit publish`"
        )
    if Path(asked.gguf_path).name != str(asked.gguf_path):
        raise ConfigurationError(
            f"--gguf-path {asked.gguf_path}: with --each, give a name without folders, which each "
            f"model's file has in its own, such as {GGUF_NAME}"
        )


def _planned(
    named: Mapping[str, NamedSources],
    path: Path,
    asked: FuseOptions,
    errors: dict[str, FusekitError],
) -> dict[str, PreparedFuse]:
    """The fuses that can be done; of the others, why not."""
    base, opened, fuses = OpenedBase(), {}, {}
    for name, of in named.items():
        with _told_of(name, errors):
            (choice,) = of.adapters
            opened[name] = open_adapter(choice.folder.path, scale=of.scale, ignore=of.ignore)
    if not errors and named:
        (first, *_) = named.values()
        check_patterns(first.ignore, ((found.ignored, found.paths) for found in opened.values()))
    folders = [folder for of in named.values() for folder in of.folders]
    for name, adapter in opened.items():
        of = named[name]
        with _told_of(name, errors):
            fuses[name] = plan_named(
                of,
                path / name,
                asked,
                partial(of.open, (adapter,), open_base=base),
                beside=folders,
            )
    return fuses


@contextmanager
def _told_of(name: str, errors: dict[str, FusekitError]) -> Iterator[None]:
    """Note what is wrong with an adapter, and go on behind the block."""
    try:
        yield
    except FusekitError as error:
        errors[name] = error
