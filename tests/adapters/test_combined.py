"""TIES and DARE against plain NumPy that was written from the papers, in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.exportable import make_exportable
from support.tiny import EXPERTS, LINEARS, LLAMA, QWEN3_MOE, make_adapter

from mlx_fusekit import fuse, verify
from mlx_fusekit.adapters import combined
from mlx_fusekit.adapters.combination import METHODS, Combination
from mlx_fusekit.adapters.combine import combine
from mlx_fusekit.adapters.combined import CombinedUpdate
from mlx_fusekit.adapters.matrices import LowRankUpdate
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.adapters.updates import Adapter
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.errors import AdapterError, ConfigurationError
from mlx_fusekit.formats.floats import to_float32

E, R, C = 2, 24, 40
WEIGHTS = (1.0, 0.5, -0.75)


def parts(ranks: tuple[int, ...] = (4, 2, 7)) -> tuple[LowRankUpdate, ...]:
    found = []
    for seed, rank in enumerate(ranks):
        random = np.random.default_rng(seed)
        up, down = random.normal(size=(E, R, rank)), random.normal(size=(E, rank, C))
        found.append(LowRankUpdate(up.astype(np.float32), down.astype(np.float32)))
    return tuple(found)


def update(how: Combination, updates: tuple[LowRankUpdate, ...] | None = None) -> CombinedUpdate:
    return CombinedUpdate(updates or parts(), WEIGHTS, (0, 1, 2), how, "a.b")


def exact(part: LowRankUpdate, expert: int) -> np.ndarray:
    return part.up[expert].astype(np.float64) @ part.down[expert].astype(np.float64)


def elected(sparse: list[np.ndarray], weights: tuple[float, ...]) -> np.ndarray:
    """The weighted mean of the elements whose sign is that of the weighted sum."""
    out = np.zeros_like(sparse[0])
    for at in np.ndindex(out.shape):
        weighted = [w * d[at] for w, d in zip(weights, sparse, strict=True)]
        sign = 1 if sum(weighted) >= 0 else -1
        agree = [i for i, value in enumerate(weighted) if np.sign(value) == sign]
        below = sum(weights[i] for i in agree)
        out[at] = sum(weighted[i] for i in agree) / (below or 1)
    return out


def test_ties_is_the_papers() -> None:
    ours = update(Combination("ties", 0.3))
    for expert in range(E):
        sparse = []
        for part in ours.parts:
            delta = exact(part, expert)
            smallest = np.sort(np.abs(delta).ravel())[::-1][int(0.3 * delta.size) - 1]
            sparse.append(np.where(np.abs(delta) >= smallest * (1 - 1e-6), delta, 0))
        np.testing.assert_allclose(ours.delta(expert, 0, R), elected(sparse, WEIGHTS), atol=1e-5)


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_dare_keeps_a_random_share_made_larger(method: str) -> None:
    ours = update(Combination(method, 0.25, seed=3))
    for expert in range(E):
        kept = [ours.sparse(i, expert, 0, R) != 0 for i in range(3)]
        assert 0.15 < np.mean(kept) < 0.35
        assert not np.array_equal(kept[0], kept[1])
        sparse = [
            np.where(k, exact(p, expert) / 0.25, 0) for k, p in zip(kept, ours.parts, strict=True)
        ]
        expected = (
            elected(sparse, WEIGHTS)
            if method == "dare-ties"
            else sum(w * d for w, d in zip(WEIGHTS, sparse, strict=True))
        )
        np.testing.assert_allclose(ours.delta(expert, 0, R), expected, atol=1e-4)


def test_dare_draws_uniformly() -> None:
    wide = LowRankUpdate(np.ones((1, 512, 1), np.float32), np.ones((1, 1, 1001), np.float32))
    ours = CombinedUpdate((wide,), (1.0,), (0,), Combination("dare", 0.1), "m")
    kept = ours.delta(0, 0, 512) != 0
    # Five standard deviations of a binomial share.
    assert abs(kept.mean() - 0.1) < 5 * np.sqrt(0.09 / kept.size)
    assert abs(kept.mean(axis=0) - 0.1).max() < 6 * np.sqrt(0.09 / 512)
    assert abs(kept.mean(axis=1) - 0.1).max() < 6 * np.sqrt(0.09 / 1001)
    assert abs(np.corrcoef(kept[:-1].ravel(), kept[1:].ravel())[0, 1]) < 0.01
    assert ours.delta(0, 0, 512).max() == np.float32(1) / np.float32(0.1)


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties"])
def test_rows_do_not_depend_on_what_else_is_asked_for(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = update(Combination(method, 0.4))
    whole = ours.delta(1, 0, R)
    monkeypatch.setattr(combined, "_BLOCK_ELEMENTS", 3 * C)
    again = update(Combination(method, 0.4))
    pieces = [again.delta(1, first, min(first + 5, R)) for first in range(0, R, 5)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_what_is_drawn_depends_on_seed_and_module_alone() -> None:
    one = update(Combination("dare", 0.5, seed=1)).delta(0, 0, R)
    np.testing.assert_array_equal(one, update(Combination("dare", 0.5, seed=1)).delta(0, 0, R))
    assert not np.array_equal(one, update(Combination("dare", 0.5, seed=2)).delta(0, 0, R))
    other = CombinedUpdate(parts(), WEIGHTS, (0, 1, 2), Combination("dare", 0.5, seed=1), "a.c")
    assert not np.array_equal(one, other.delta(0, 0, R))


@pytest.mark.parametrize("method", ["dare", "sum"])
def test_all_elements_are_the_sum(method: str) -> None:
    """And what only some adapters change is theirs alone."""
    first, second, _ = parts()
    adapters = [
        (Adapter("lora", {"a": first, "b": second}, {}), 0.5),
        (Adapter("lora", {"a": second}, {}), 2.0),
    ]
    density = None if method == "sum" else 1.0
    found = combine(adapters, Combination(method, density)).weights
    deltas = {
        name: u.delta(1, 0, R) if isinstance(u, CombinedUpdate) else u.up[1] @ u.down[1]
        for name, u in found.items()
        if isinstance(u, LowRankUpdate | CombinedUpdate)
    }
    np.testing.assert_allclose(deltas["a"], 0.5 * exact(first, 1) + 2 * exact(second, 1), atol=1e-5)
    np.testing.assert_allclose(deltas["b"], 0.5 * exact(second, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "slerp"}, "--combine slerp: choose sum, ties"),
        ({"density": 0.5}, "--density 0.5: a sum keeps all"),
        ({"method": "ties", "density": 0.0}, "--density 0: must be a share"),
        ({"method": "dare", "density": float("nan")}, "--density nan: must be a share"),
        ({"method": "ties", "density": 1.5}, "--density 1.5: must be"),
    ],
)
def test_senseless_settings_are_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Combination(**asked)  # type: ignore[arg-type]


# --- end to end ---------------------------------------------------------------------------------


def folders(tmp_path: Path, kind: str, **quantization: Any) -> tuple[Path, list[str]]:
    config = QWEN3_MOE if kind == "experts" else LLAMA
    keys = [*EXPERTS, "lm_head"] if kind == "experts" else [*LINEARS, "model.embed_tokens"]
    base = make_exportable(tmp_path / "base", config, **quantization)
    first = make_adapter(tmp_path / "first", base, keys=keys, rank=4, seed=1)
    second = make_adapter(tmp_path / "second", base, keys=keys[2:], rank=8, scale=3.0, seed=2)
    return base, [str(first), f"{second}:0.5"]


@pytest.mark.parametrize("kind", ["linears", "experts"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "sum"])
def test_the_fused_model_is_the_combined_teacher(tmp_path: Path, method: str, kind: str) -> None:
    base, adapters = folders(tmp_path, kind)
    fused = tmp_path / "fused"
    report = fuse(
        base, adapters, fused, combine=method, density=0.4, dequantize=True, dtype="float32"
    )
    assert report.combine == {
        "method": method,
        "density": 0.4,
        "seed": 0 if method.startswith("dare") else None,
    }
    found = verify(base, adapters, fused, max_tokens=256)
    assert found.combine == report.combine, "as fusekit.json tells"
    assert found.kl_mean < 1e-6 < found.kl_base_mean  # type: ignore[operator]
    plain = verify(base, adapters, fused, combine="sum", max_tokens=256)
    assert plain.combine is None
    assert plain.kl_mean > 1e-4


def test_each_rows_delta_is_written(tmp_path: Path) -> None:
    base, adapters = folders(tmp_path, "linears", bits=None)
    sources = NamedSources.find(base, adapters, combination=Combination("ties", 0.2)).open()
    fuse(base, adapters, tmp_path / "fused", combine="ties", density=0.2, dtype="float32",
         dequantize=True)  # fmt: skip
    before, after = (Checkpoint.open(folder).tensors for folder in (base, tmp_path / "fused"))
    for module, change in sources.adapter.weights.items():
        assert isinstance(change, CombinedUpdate)
        old, new = (
            to_float32(t.read(), t.dtype)
            for t in (before[f"{module}.weight"], after[f"{module}.weight"])
        )
        np.testing.assert_allclose(new - old, change.delta(0, 0, len(new)), atol=1e-6)


def test_calibrating_takes_the_combined_teacher(tmp_path: Path) -> None:
    """And memory that holds no update of full size changes nothing."""
    from mlx_fusekit.running import combined as running

    base, adapters = folders(tmp_path, "linears")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three four five six seven eight nine ten"}\n' * 30)
    for name in ("held", "anew"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "anew":
                patch.setattr(running, "memory_bytes", lambda: 0)
            fuse(base, adapters, tmp_path / name, combine="ties", calibration=text)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("held", "anew"))
    assert one == other
    found = verify(base, adapters, tmp_path / "held", max_tokens=512)
    assert found.recovered is not None
    assert found.recovered > 0.5


def test_a_text_for_each_adapter_tells_what_its_task_lost(tmp_path: Path) -> None:
    base, adapters = folders(tmp_path, "linears")
    fuse(base, adapters, tmp_path / "fused", combine="ties", requantize="nearest")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(f'{{"prompt": "{name} {i}", "completion": "{i} {name}"}}\n' for i in range(9))
        )
    data = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    report = verify(base, adapters, tmp_path / "fused", data=data)
    assert [(task.adapter, Path(task.data).name) for task in report.tasks] == [
        ("first", "a.jsonl"),
        ("second", "b.jsonl"),
    ]
    assert sum(task.answers for task in report.tasks) == report.answers == 18
    alone = verify(base, adapters[0], tmp_path / "fused", data=data[0])
    assert report.tasks[0].kl_mean == pytest.approx(alone.kl_mean, rel=1e-3)
    assert report.tasks[0].kl_base_mean == pytest.approx(alone.kl_base_mean, rel=1e-3)
    with pytest.raises(ConfigurationError, match="2 files and 1 adapters"):
        verify(base, adapters[0], tmp_path / "fused", data=data)


def test_what_is_no_lora_is_not_combined(tmp_path: Path) -> None:
    base, adapters = folders(tmp_path, "linears")
    dora = make_adapter(tmp_path / "dora", base, kind="dora")
    with pytest.raises(AdapterError, match="a dora adapter cannot be weighted or combined"):
        fuse(base, [*adapters, dora], tmp_path / "fused", combine="ties")
    with pytest.raises(ConfigurationError, match="--combine ties: combines several adapters"):
        fuse(base, adapters[0], tmp_path / "fused", combine="ties")
    assert not (tmp_path / "fused").exists()
