"""Arrays that wait in memory or on the disk come back as they were, and leave no file."""

import gc
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_fusekit.requantize.shelf import Shelf


@pytest.mark.parametrize("kind", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_put_away_comes_back(kind: mx.Dtype, on_disk: bool, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path if on_disk else None)
    arrays = [mx.random.normal((3, 5, 2)).astype(kind), mx.array([mx.nan, -0.0]).astype(kind)]
    held = [shelf.put(array) for array in arrays]
    assert len(list(tmp_path.iterdir())) == (2 if on_disk else 0)
    for array, one in zip(arrays, held, strict=True):
        for _ in range(2):
            found = one.get()
            assert found.dtype == kind
            assert mx.array_equal(found, array, equal_nan=True)


def test_a_file_goes_with_what_it_holds(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    one = other = shelf.put(mx.zeros(3))
    last = shelf.put(mx.ones(3))
    del one
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 2
    del other
    gc.collect()
    (left,) = tmp_path.iterdir()
    assert mx.array_equal(last.get(), mx.ones(3))
    del last
    gc.collect()
    assert not left.exists()
