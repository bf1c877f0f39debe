"""Fixtures for the tests that need a real model: SmolLM2-135M-Instruct and adapters trained on it.

The first session downloads and trains them into the cache of ``scripts/fetch_smollm2.py``; later
ones find them there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "scripts"
if str(SCRIPTS) not in sys.path:
    sys.path.insert(0, str(SCRIPTS))

if TYPE_CHECKING:
    from fetch_smollm2 import ModelFolders
    from train_adapter import AdapterFolders

    from mlx_fusekit import FuseReport


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test in this folder as one that needs a real model."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.real)


def pytest_report_header() -> str:
    """Say whether this process has a fast float32 matmul: without one, tests take minutes each."""
    from train_adapter import fast_blas_environment

    wanted = fast_blas_environment().get("LD_PRELOAD", "")
    if wanted == os.environ.get("LD_PRELOAD", ""):
        return "float32 matmul: as fast as this machine allows"
    return f"float32 matmul: slow; start pytest with LD_PRELOAD={wanted}"


@pytest.fixture(scope="session")
def smollm2() -> ModelFolders:
    """The model's bfloat16 and 4-bit folders."""
    from fetch_smollm2 import fetch

    return fetch()


@pytest.fixture(scope="session")
def smollm2_sql_adapter(smollm2: ModelFolders) -> AdapterFolders:
    """An adapter that answers in SQL, trained on the 4-bit model, and its data folder."""
    from train_adapter import Recipe, ensure_adapter

    return ensure_adapter(Recipe(task="sql"), smollm2.four_bit)


@pytest.fixture(scope="session")
def smollm2_fused(
    smollm2: ModelFolders,
    smollm2_sql_adapter: AdapterFolders,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, FuseReport]:
    """That adapter fused by default, calibrated on its training data."""
    from mlx_fusekit import fuse

    target = tmp_path_factory.mktemp("calibrated") / "fused"
    report = fuse(
        smollm2.four_bit,
        smollm2_sql_adapter.adapter,
        target,
        calibration=smollm2_sql_adapter.data,
        calibration_tokens=4096,
    )
    return target, report
