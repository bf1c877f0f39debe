"""Calibration that was cut off goes on, to the same bytes."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.exportable import make_exportable
from support.teachers import ARCHITECTURES, make_case, random_text
from support.tiny import make_adapter

from mlx_fusekit import fuse
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.errors import OutputError
from mlx_fusekit.fusing.fuse import prepare_fuse
from mlx_fusekit.requantize.calibrated import Calibration
from mlx_fusekit.requantize.journal import Journal
from mlx_fusekit.requantize.solved import SolvedWeights
from mlx_fusekit.requantize.walk import token_batches
from mlx_fusekit.running.streamed import StreamedModel
from mlx_fusekit.writing.work import Work, kept_work, work_path

TEXT = random_text(6, longest=30)
MEASURED = token_batches(random_text(3, longest=30, seed=1))


@dataclass
class Stop:
    """Interrupts when so many modules were solved; ``step`` of a fuse where it is named."""

    after: int
    step: str | None = None
    seen: list[Any] = field(default_factory=list)

    def __call__(self, *told: Any) -> None:
        self.seen.append(told)
        if (self.step is None or told[0] == self.step) and told[-2] == self.after:
            raise KeyboardInterrupt


def same(one: SolvedWeights, other: SolvedWeights) -> bool:
    assert one.results == other.results
    assert one.experts.keys() == other.experts.keys()
    for path, experts in one.experts.items():
        for mine, theirs in zip(experts, other.experts[path], strict=True):
            assert mine.scale_dtype == theirs.scale_dtype
            assert mine.global_scale == theirs.global_scale
            for name in ("codes", "scales", "biases"):
                np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    return True


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "lfm2", "cohere"])
def test_a_walk_goes_on_behind_its_last_layer(name: str, streamed: bool, tmp_path: Path) -> None:
    config, keys = ARCHITECTURES[name]
    case = make_case(tmp_path, config, keys)

    def calibration(journal: Journal | None) -> Calibration:
        parts: Any = {"measured": MEASURED, "journal": journal}
        if not streamed:
            return Calibration(case.plan, case.teacher, TEXT, **parts)
        sources = NamedSources.find(case.base, case.adapter).open()
        model = StreamedModel(sources.model, sources.adapter)
        parts |= {"streamed": model, "spill": True}
        return Calibration(case.plan, model.running, TEXT, **parts)

    whole = calibration(None)
    whole.run()
    assert whole.finals is not None
    modules = len(case.plan.merged)
    resumed = []
    stops = (1, modules - 1, modules) if name == "llama" else (modules - 1,)
    for after in stops:
        (tmp_path / "work").mkdir()
        for attempt in (after, None):
            work = Work(tmp_path / "work")
            again = calibration(Journal(work, "walk"))
            if attempt is not None:
                with pytest.raises(KeyboardInterrupt):
                    again.run(Stop(attempt))
            else:
                again.run()
        resumed.append(again.resumed)
        assert same(whole.solved, again.solved)
        assert whole.groups == again.groups
        assert again.finals is not None
        for states in ("teacher", "student", "base"):
            pairs = zip(getattr(whole.finals, states), getattr(again.finals, states), strict=True)
            assert all(np.array_equal(np.array(a.get()), np.array(b.get())) for a, b in pairs)
        shutil.rmtree(tmp_path / "work")
    assert all(0 < number < modules for number in resumed[-2:])
    if name == "llama":
        assert resumed[0] == 0
        assert resumed[1] == resumed[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("resume")
    base = make_exportable(folder / "base")
    return base, make_adapter(folder / "adapter", base, num_layers=2)


def run(sources: tuple[Path, Path], target: Path, stop: Stop | None = None, **options: Any) -> Any:
    return fuse(*sources, target, calibration_tokens=300, progress=stop, **options)


STEP = "re-quantizing"


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_an_interrupted_fuse_goes_on_to_the_same_bytes(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = run(sources, tmp_path / "whole")
    modules = sum(whole.modules.values())
    target, work = tmp_path / "some" / "fused", work_path(tmp_path / "some" / "fused")
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run(sources, target, Stop(modules - 1, STEP))
    (note,) = interrupt.value.__notes__
    assert "modules are kept in" in note
    assert str(work) in note
    assert "--no-resume" in note
    assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == [work.name]

    stop = Stop(-1)
    report = run(sources, target, stop)
    assert not any(told[0] == "generating text" for told in stop.seen)
    assert report.calibration.resumed_modules > 0
    assert any("resumed an interrupted run" in warning for warning in report.warnings)
    assert content(target) == content(tmp_path / "whole")
    assert not work.exists()
    assert "resumed_modules" not in (target / "fusekit.json").read_text()


def test_an_interrupt_before_anything_was_solved_leaves_nothing(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run(sources, tmp_path / "some" / "fused", Stop(1, STEP))
    assert not getattr(interrupt.value, "__notes__", [])
    assert list(tmp_path.iterdir()) == []


def interrupted(sources: tuple[Path, Path], target: Path) -> None:
    whole = sum(prepare_fuse(*sources, target).report().modules.values())
    with pytest.raises(KeyboardInterrupt):
        run(sources, target, Stop(whole - 1, STEP))


def test_work_from_other_inputs_is_refused_and_kept(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    target = tmp_path / "fused"
    base, adapter = (Path(shutil.copytree(p, tmp_path / p.name)) for p in sources)
    text = tmp_path / "text.txt"
    text.write_text("some text that is long enough for a few tokens " * 40)
    interrupted((base, adapter), target)
    before = content(work_path(target))
    other = make_adapter(tmp_path / "other", base, num_layers=2, seed=5)
    for changed, what in (
        ({"adapter": other}, "adapter"),
        ({"seed": 1}, "set of flags"),
        ({"max_kl": 0.5}, "set of flags"),
        ({"calibration": text}, "set of flags"),
    ):
        named = (base, changed.pop("adapter", adapter))
        with pytest.raises(OutputError, match=f"with another {what}; .*--no-resume"):
            run(named, target, **changed)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(OutputError, match="with another base"):
        run((base, adapter), target)
    assert content(work_path(target)) == before
    assert not target.exists()

    report = run((base, adapter), target, resume=False)
    assert report.calibration.resumed_modules == 0
    assert not work_path(target).exists()
    run((base, adapter), tmp_path / "whole")
    assert content(target) == content(tmp_path / "whole")


def test_text_that_was_changed_since_is_noticed(sources: tuple[Path, Path], tmp_path: Path) -> None:
    text, target = tmp_path / "text.txt", tmp_path / "fused"
    text.write_text("some text that is long enough for a few tokens " * 40)
    modules = sum(prepare_fuse(*sources, target).report().modules.values())
    with pytest.raises(KeyboardInterrupt):
        run(sources, target, Stop(modules - 1, STEP), calibration=text)
    text.write_text("other text that is long enough for a few tokens " * 40)
    with pytest.raises(OutputError, match="with another calibration text"):
        run(sources, target, calibration=text)


def test_two_runs_do_not_work_on_one_target(sources: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "fused"
    with kept_work(target, {}, True), pytest.raises(OutputError, match="another run"):
        run(sources, target)
    run(sources, target)


@pytest.mark.parametrize("damage", ["rows", "record", "states", "inputs"])
def test_damaged_work_is_done_again(
    sources: tuple[Path, Path], tmp_path: Path, damage: str
) -> None:
    run(sources, tmp_path / "whole")
    target = tmp_path / "fused"
    interrupted(sources, target)
    found = [p for p in work_path(target).rglob("*") if p.is_file() and p.name.startswith(damage)]
    assert found
    for path in found:
        bits = path.read_bytes()
        path.write_bytes(bits[:-1] + bytes([bits[-1] ^ 1]))
    run(sources, target)
    assert content(target) == content(tmp_path / "whole")
