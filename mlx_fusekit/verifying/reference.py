"""What a fused model is compared with: base and adapter unmerged, or any other model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.adapters.updates import Adapter
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.progress import Progress, StepProgress, of_step
from mlx_fusekit.running.adapted import run_adapted
from mlx_fusekit.running.exact import MEMORY_SHARE
from mlx_fusekit.running.loading import run_model
from mlx_fusekit.running.model import RunningModel
from mlx_fusekit.texts.data import read_sequences
from mlx_fusekit.texts.generate import generate_sequences
from mlx_fusekit.texts.items import Features
from mlx_fusekit.texts.sequences import TokenSequence, derived_seed
from mlx_fusekit.verifying.structure import (
    Check,
    check_no_adapter,
    check_same_model,
    check_structure,
)

#: Reference and fused model are in memory at the same time.
EACH_SHARE = MEMORY_SHARE / 2


@dataclass(frozen=True)
class Reference:
    """What the fused model is compared with.

    Attributes:
        running: with its adapter, if there is one.
        adapters: names of the adapters.
        weights: what each one's update is multiplied by.
        checks: of the fused model's files.
        warnings: one line each.
        author: who wrote the text when none is given.
        features: keys that a file's text may have beside mlx-lm's own.
        alone: each adapter by itself, bound to the base.
        combine: how several were combined; None of a sum.
    """

    running: RunningModel
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    author: str
    features: tuple[Features, ...] = ()
    alone: tuple[Adapter, ...] = ()
    combine: Mapping[str, Any] | None = None

    def text(
        self, data: str | Path | None, tokens: int, seed: int, progress: Progress | None
    ) -> Sequence[TokenSequence]:
        """The text to compare on.

        Args:
            data: a file; None for text that the reference writes.
            tokens: about how many.
            seed: of the text, of which calibration draws other from the same number.
            progress: told while text is written.
        """
        own = derived_seed(seed, "verify")
        tokenizer = self.running.tokenizer
        if data is not None:
            features = (*self.features, Features())
            return read_sequences(Path(data), tokenizer, features=features, tokens=tokens, seed=own)
        return generate_sequences(
            self.running.model, tokenizer, tokens=tokens, seed=own, progress=progress
        )


def teacher(
    named: NamedSources, fused: Checkpoint | None, progress: StepProgress | None
) -> Reference:
    """Base and adapter as mlx-lm runs them; the fused model's files are checked against them.

    Args:
        named: base and adapters.
        fused: where its files can be compared.
        progress: told while they are.
    """
    sources = named.open()
    checks: tuple[Check, ...] = ()
    if fused is not None:
        flags = f"--model {named.model.public_name}", f"--fused {fused.folder}"
        check_same_model(sources.base, fused, *flags)
        told = of_step(progress, "comparing files")
        checks = check_structure(sources.base, sources.adapter, fused, told)
    running = run_adapted(named.model, sources.adapter, memory_share=EACH_SHARE)
    warnings = (*sources.base.warnings, *sources.adapter.warnings, *_warnings(fused))
    features = tuple(Features.trained_on(adapter.config) for adapter in sources.opened)
    names, weights = sources.adapter_names, sources.weights
    return Reference(
        running,
        names,
        weights,
        checks,
        warnings,
        "base+adapter",
        features,
        sources.alone,
        sources.combination.as_json(),
    )


def any_model(source: LocalFolder, fused: Checkpoint | None) -> Reference:
    """Another model."""
    running = run_model(source, memory_share=EACH_SHARE)
    checks = (check_no_adapter(fused),) if fused is not None else ()
    return Reference(running, (), (), checks, _warnings(fused), "the reference")


def _warnings(fused: Checkpoint | None) -> tuple[str, ...]:
    return fused.warnings if fused is not None else ()
