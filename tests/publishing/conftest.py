"""A fused model, reports about it, and a Hub to publish it to."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from support.hub_upload_server import TOKEN, USER, UploadHub

from mlx_fusekit import benchmark, fuse, samples, verify
from mlx_fusekit.bench.options import Workload
from mlx_fusekit.publishing.card import CardFacts
from mlx_fusekit.publishing.evidence import Evidence
from mlx_fusekit.publishing.files import PublishedModel

BASE = "mlx-community/sample-4bit"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def sample_fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sample, fused as if its base came from the Hub."""
    folder = tmp_path_factory.mktemp("publish") / "sql-model"
    fuse(samples.model_path(), samples.adapter_path(), folder, requantize="nearest")
    recipe = json.loads((folder / "fusekit.json").read_text())
    recipe["base"] |= {"id": BASE, "revision": REVISION}
    (folder / "fusekit.json").write_text(json.dumps(recipe))
    return folder


@pytest.fixture
def fused(sample_fused: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(sample_fused, tmp_path / "models" / "sql-model"))


@pytest.fixture(scope="session")
def facts(sample_fused: Path) -> CardFacts:
    """What its card is written from, where nothing else is known of it."""
    return CardFacts(f"{USER}/sql-model", PublishedModel.open(sample_fused), Evidence())


@pytest.fixture(scope="session")
def parity(sample_fused: Path) -> dict[str, Any]:
    """What ``verify --json`` says of it."""
    base, adapter = samples.model_path(), samples.adapter_path()
    return verify(base, adapter, sample_fused, max_tokens=800).as_json()


@pytest.fixture
def verify_report(parity: dict[str, Any], fused: Path, tmp_path: Path) -> Path:
    path = tmp_path / "verify.json"
    path.write_text(json.dumps(parity))
    return path


@pytest.fixture(scope="session")
def timed(sample_fused: Path) -> dict[str, Any]:
    """What ``bench --json`` says of it."""
    workload = Workload(prompt_tokens=(8,), generation_tokens=(3,), trials=2, load_trials=0, seed=0)
    report = benchmark(
        str(samples.model_path()),
        str(samples.adapter_path()),
        {"fused": str(sample_fused)},
        workload=workload,
    )
    return report.as_json()


@pytest.fixture
def bench_report(timed: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(timed))
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """A Hub on this machine, which huggingface_hub talks to without xet."""
    server = UploadHub()
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield server
    server.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long huggingface_hub waits before it tries again, without waiting."""
    waited: list[float] = []
    clock = type("Clock", (), {"sleep": staticmethod(waited.append), "time": time.time})
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
    return waited
