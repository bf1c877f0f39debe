"""Low-rank factors, against NumPy's singular values in float64."""

from collections.abc import Iterator

import numpy as np
import pytest

from mlx_fusekit.factoring import RowBlocks, factor, factor_product, participation


def read(matrix: np.ndarray) -> RowBlocks:
    def blocks() -> Iterator[np.ndarray]:
        yield from np.array_split(matrix.astype(np.float32), 3)

    return RowBlocks(*matrix.shape, blocks)


def low_rank(rows: int, columns: int, rank: int, noise: float = 0.0) -> np.ndarray:
    random = np.random.default_rng([rows, columns, rank])
    made = random.standard_normal((rows, rank)) @ random.standard_normal((rank, columns))
    return made + noise * random.standard_normal((rows, columns))


#: Through the smaller Gram matrix of either side, and through a sketch.
SHAPES = [(90, 60), (60, 90), (2000, 1800), (1800, 2500)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_low_rank_comes_back(shape: tuple[int, int]) -> None:
    matrix = low_rank(*shape, rank=5)
    found = factor(read(matrix), rank=12)
    assert found.rank == 5, "no more than it has"
    assert found.kept == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(found.up @ found.down - matrix) < 2e-6 * np.linalg.norm(matrix)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    matrix = low_rank(*shape, rank=8, noise=0.3)
    found = factor(read(matrix), rank=8)
    values = np.linalg.svd(matrix, compute_uv=False)
    best = np.sqrt(np.square(values[8:]).sum())
    assert np.linalg.norm(found.up @ found.down - matrix) < 1.0001 * best
    assert found.energy == pytest.approx(np.square(values).sum(), rel=1e-5)
    assert found.kept == pytest.approx(np.square(values[:8]).sum() / found.energy, rel=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_as_few_ranks_as_keep_the_energy(energy: float) -> None:
    matrix = low_rank(120, 100, rank=40)
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = np.cumsum(np.square(values)) / np.square(values).sum()
    found = factor(read(matrix), energy=energy)
    assert found.rank == int(np.argmax(shares >= energy)) + 1
    assert found.kept >= energy


def test_a_sketch_grows_until_it_has_the_energy() -> None:
    matrix = low_rank(1700, 1600, rank=90)
    found = factor(read(matrix), energy=0.999)
    assert 80 <= found.rank <= 90
    assert found.kept >= 0.999


def test_the_same_seed_gives_the_same_factors() -> None:
    matrix = read(low_rank(1700, 1600, rank=4, noise=0.1))
    one, again, other = (factor(matrix, rank=4, seed=seed).up for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_product_is_factored_without_being_made() -> None:
    random = np.random.default_rng(0)
    up, down = (random.standard_normal(s).astype(np.float32) for s in ((70, 12), (12, 50)))
    values = np.linalg.svd(up.astype(np.float64) @ down, compute_uv=False)
    found = factor_product(up, down, rank=4)
    best = np.sqrt(np.square(values[4:]).sum())
    assert np.linalg.norm(found.up @ found.down - up @ down) < 1.0001 * best
    assert factor_product(up, down, rank=50).rank == 12
    assert factor_product(up, down, energy=1.0).rank == 12


def test_nothing_has_no_rank() -> None:
    zeros = np.zeros((5, 4), np.float32)
    for found in (factor(read(zeros), rank=2), factor_product(zeros, zeros.T, energy=0.9)):
        assert (found.rank, found.kept, found.energy) == (0, 1.0, 0.0)


def test_participation_counts_directions() -> None:
    assert participation(np.diag([4.0, 4.0, 4.0, 0.0])) == pytest.approx(3)
    assert participation(np.diag([9.0, 0.0])) == pytest.approx(1)
    assert participation(np.zeros((3, 3))) == 0
