"""What each task lost when several adapters were combined into one model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mlx_fusekit import figures
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.progress import StepProgress, of_step
from mlx_fusekit.running.adapted import adapted_alone
from mlx_fusekit.tables import Table
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.parity import Model, Variant, compare
from mlx_fusekit.verifying.reference import Reference


@dataclass(frozen=True)
class TaskParity:
    """A fused model against base and one adapter alone, on the text of that adapter's task.

    KL is KL(base + this adapter || model) in nats a token. Exact match is None without answers.

    Attributes:
        adapter: its name.
        data: the file of its text.
        tokens: how many were scored.
        kl_mean: of the fused model.
        kl_mean_ci95: bounds of its 95 % interval; None of too little text for one.
        kl_base_mean: of the base.
        top1_agreement: share of the tokens where the fused model has the adapter's arg-max.
        exact_match_alone: share of the ``answers`` that base and this adapter give exactly.
    """

    adapter: str
    data: str
    tokens: int
    answers: int
    kl_mean: float
    kl_mean_ci95: tuple[float, float] | None
    kl_base_mean: float
    top1_agreement: float
    top1_agreement_base: float
    exact_match_alone: float | None
    exact_match_fused: float | None
    exact_match_base: float | None


def check_data(data: Sequence[str], adapters: int) -> None:
    """Several texts are one for each adapter.

    Raises:
        ConfigurationError: where their numbers differ.
    """
    if len(data) > 1 and len(data) != adapters:
        raise ConfigurationError(
            f"--data: {len(data)} files and {adapters} adapters; give one file, or one for each "
            "adapter in their order"
        )


def measure_tasks(
    truth: Reference,
    fused: Model,
    data: Sequence[str],
    texts: Sequence[Sequence[TokenSequence]],
    progress: StepProgress | None,
) -> tuple[TaskParity, ...]:
    """Compare on each task's text with base and its adapter alone.

    Args:
        truth: base and all adapters.
        fused: the model that is judged.
        data: the texts' files, one for each adapter; nothing is measured of a single one.
        texts: what is in them.
        progress: told of each.
    """
    if len(data) < 2:
        return ()
    running, found = truth.running, []
    for name, adapter, file, text in zip(truth.adapters, truth.alone, data, texts, strict=True):
        alone = Variant(running.model, partial(adapted_alone, running, adapter))
        base = Variant(running.model, running.without_adapter)
        told = of_step(progress, f"comparing with {name} alone")
        measured = compare(alone, {"fused": fused, "base": base}, text, progress=told)
        ours, bare = measured["fused"], measured["base"]
        found.append(
            TaskParity(
                adapter=name,
                data=file,
                tokens=len(ours.kl),
                answers=len(ours.answers),
                kl_mean=ours.kl_mean,
                kl_mean_ci95=ours.kl_mean_ci95,
                kl_base_mean=bare.kl_mean,
                top1_agreement=ours.top1_agreement,
                top1_agreement_base=bare.top1_agreement,
                exact_match_alone=ours.exact_match_reference,
                exact_match_fused=ours.exact_match,
                exact_match_base=bare.exact_match,
            )
        )
    return tuple(found)


def tasks_table(tasks: Sequence[TaskParity]) -> Table:
    """A line for each task: from the base, the fused model, to its adapter alone."""
    header = ("task", "KL base", "KL fused", "top-1", "exact match: base", "fused", "adapter alone")
    return Table(
        "Against each adapter alone, on its own text",
        header,
        [_row(asdict(task)) for task in tasks],
    )


def _row(task: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        task["adapter"],
        figures.nats(task["kl_base_mean"]),
        figures.nats(task["kl_mean"]),
        figures.share(task["top1_agreement"]),
        *(figures.share(task[f"exact_match_{model}"]) for model in ("base", "fused", "alone")),
    )
