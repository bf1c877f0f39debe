"""Several fuses of one base, carried out: those that are not calibrated in one pass over it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlx_fusekit.errors import FusekitError
from mlx_fusekit.fusing import folder
from mlx_fusekit.fusing.one_pass import Output, write_models
from mlx_fusekit.fusing.prepared import PreparedFuse, counted, nothing_to_requantize
from mlx_fusekit.fusing.report import FuseReport
from mlx_fusekit.fusing.shared import Shared
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.requantize.nearest import nearest
from mlx_fusekit.writing.staging import staged


@dataclass
class Together:
    """Fuses on their way.

    Attributes:
        fuses: all of them.
        failed: of those that failed, why.
        clone, workers, progress: as of :meth:`PreparedEach.run`.
        done: reports of those that are finished.
    """

    fuses: Mapping[str, PreparedFuse]
    failed: dict[str, str]
    clone: bool
    workers: int | None
    progress: StepProgress | None
    done: dict[str, FuseReport] = field(default_factory=dict)

    def write(self, target: Path) -> None:
        """Write all models into a folder that is there."""
        (first, *_) = self.fuses.values()
        plans = [fuse.plan for fuse in self.fuses.values()]
        folder.check_disk(plans, target, target, clone=self.clone)
        with folder.Hashing({"base": first.base_files}) as hashing:
            shared = Shared(first.sources.model, lambda: hashing.result()["base"])
            together: dict[int, dict[str, PreparedFuse]] = {}
            for name, fuse in self.fuses.items():
                if not fuse.calibrates:
                    together.setdefault(id(fuse.plan.base), {})[name] = fuse
            try:
                for fuses in together.values():
                    self._pass_over(fuses, shared)
                for name, fuse in self.fuses.items():
                    if fuse.calibrates:
                        with self._telling(name):
                            self.done[name] = fuse.run(
                                clone=self.clone,
                                workers=self.workers,
                                progress=self.progress,
                                shared=shared,
                            )
            except KeyboardInterrupt as error:
                if self.done:
                    finished = f"{', '.join(self.done)} in {target} finished before"
                    error.add_note(f"{finished}; nothing half-made was left behind")
                raise

    def _pass_over(self, fuses: Mapping[str, PreparedFuse], shared: Shared) -> None:
        """Fuse without calibrating, in one pass over the base."""
        start = time.perf_counter()
        with ExitStack() as stack:
            begun = {}
            for name, fuse in fuses.items():
                own = stack.enter_context(ExitStack())
                with self._telling(name):
                    begun[name] = _Begun(fuse, own)
            write_models(
                [one.output for one in begun.values()],
                workers=self.workers,
                clone=self.clone,
                progress=counted(sum(f.plan.output_bytes for f in fuses.values()), self.progress),
            )
            for name, one in begun.items():
                with self._telling(name):
                    report = one.finish(shared, start)
                    self.done[name] = one.fuse.bring(report, self.progress)

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        """Note of what does not end well why it did not, and go on behind the block."""
        try:
            yield
        except FusekitError as error:
            self.failed[name] = str(error)


class _Begun:
    """A fuse whose weights are written with those of others.

    Args:
        fuse: what was planned.
        stack: holds its staging folder; that takes the target's place when the stack ends well.
    """

    def __init__(self, fuse: PreparedFuse, stack: ExitStack) -> None:
        self.fuse, self._stack = fuse, stack
        self._hashing = stack.enter_context(folder.Hashing(fuse.adapter_files))
        self._staging = stack.enter_context(staged(fuse.target))
        requantizer = nothing_to_requantize if fuse.strategy is None else nearest
        self.output = Output(fuse.plan, self._staging, requantizer)

    def finish(self, shared: Shared, start: float) -> FuseReport:
        """Write what lies beside the weights, and put the folder in its place.

        Args:
            shared: what others have too.
            start: when the pass began.

        Raises:
            FusekitError: why there is no such model.
        """
        with self._stack:
            if self.output.failure is not None:
                raise self.output.failure
            digests = {**self._hashing.result(), "base": shared.digests()}
            self.fuse.complete(self._staging, digests)
        seconds = time.perf_counter() - start
        return self.fuse.report(cloned=self.output.cloned, seconds=seconds, dry_run=False)
