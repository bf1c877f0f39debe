"""Bases and adapters of ``scale.py``, made at first use, and what is known of them beforehand."""

import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preserve_results import Case

from mlx_fusekit import samples
from mlx_fusekit.fusing.fuse import prepare_fuse
from mlx_fusekit.inspecting import AdapterFacts, inspect
from mlx_fusekit.merging.plan import FusePlan
from mlx_fusekit.requantize.effort import shapes_of
from mlx_fusekit.requantize.needs import memory_needs
from mlx_fusekit.requantize.options import CALIBRATION_TOKENS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import fetch_qwen2
import fetch_smollm2
from packages import default_cache
from train_adapter import AdapterFolders, Recipe, ensure_adapter

TASKS = ("sql", "style")
#: Learning rate and iterations by size. At these rates updates are below a step of the 4-bit grid.
RECIPES = {"135m": (1e-4, 100), "0.5b": (3e-5, 50), "1.5b": (3e-5, 25)}
#: ``sample`` is the model embedded in the package, with its own adapter.
SIZES = ("sample", *RECIPES)
RANK = Recipe.rank


@dataclass(frozen=True)
class Subject:
    """A base, and an adapter of it by what it was trained with.

    Attributes:
        size: SmolLM2 is 135m, Qwen2.5-Coder 0.5b and 1.5b.
        rate: learning rate; None for that of the size.
    """

    size: str
    task: str = "sql"
    rank: int = RANK
    rate: float | None = None

    @property
    def name(self) -> str:
        """As rows are called."""
        if self.size == "sample":
            return "sample"
        return f"{self.size}-{self.task}-r{self.rank}-{self.recipe.learning_rate:g}"

    @property
    def recipe(self) -> Recipe:
        """Of its training."""
        rate, iterations = RECIPES[self.size]
        rate = self.rate or rate
        return Recipe(task=self.task, iters=iterations, rank=self.rank, learning_rate=rate)

    @property
    def adapter(self) -> Path:
        """Where its adapter is, or will be."""
        if self.size == "sample":
            return samples.adapter_path()
        name, rank = self.recipe.default_name(), "" if self.rank == RANK else f"-r{self.rank}"
        if self.size != "135m":
            name = name.replace("smollm2", f"qwen2.5-coder-{self.size}")
        return default_cache() / f"{name}{rank}"

    def case(self) -> Case:
        """Base, adapter and texts; downloads and trains what is missing."""
        if self.size == "sample":
            return Case(
                self.name,
                samples.model_path(),
                samples.adapter_path(),
                samples.train_data_path(),
                samples.evaluation_data_path(),
                {},
            )
        fetch = fetch_qwen2.fetch
        folders = fetch_smollm2.fetch() if self.size == "135m" else fetch(self.size.upper())
        trained = ensure_adapter(self.recipe, model=folders.four_bit, out=self.adapter)
        return _case(self.name, folders.four_bit, trained)


def _case(name: str, base: Path, trained: AdapterFolders) -> Case:
    train, test = (trained.data / f"{split}.jsonl" for split in ("train", "test"))
    return Case(name, base, trained.adapter, train, test, {})


def planned(base: Path, adapter: Path) -> FusePlan:
    """What a fuse into the base's format would do; nothing is read but headers."""
    nowhere = adapter.with_name("no-such-folder")
    return prepare_fuse(base, adapter, nowhere, requantize="nearest").plan


def facts_of(case: Case, tokens: int | None) -> dict[str, Any]:
    """The size of the update, the shapes, and the memory that calibrating is said to need."""
    plan = planned(case.base, case.adapter)
    return {
        "steps": steps_of_update(case),
        "shapes": shapes_of(plan),
        "needs": asdict(memory_needs(plan, tokens or CALIBRATION_TOKENS)),
    }


def steps_of_update(case: Case) -> float:
    """RMS of the update over the RMS of the base's grid step, the median over modules."""
    found = inspect(case.adapter, model=case.base)
    assert isinstance(found, AdapterFacts), "an adapter's folder"
    return statistics.median(d.delta_steps for d in found.deltas if d.delta_steps is not None)


def streaming_memory(base: Path, adapter: Path, tokens: int | None) -> int:
    """Bytes for ``--memory`` with which one layer at a time is in memory.

    Raises:
        SystemExit: when that would take as much as all layers.
    """
    needs = memory_needs(planned(base, adapter), tokens or CALIBRATION_TOKENS)
    if needs.streamed >= needs.resident:
        raise SystemExit(f"{base}: a layer at a time takes as much memory as all at once")
    return (needs.streamed + needs.resident) // 2
