"""What a user names, found, opened and bound once."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_adapter, make_model

from mlx_fusekit import prepare_fuse
from mlx_fusekit.adapters import opening, sources
from mlx_fusekit.adapters.sources import NamedSources
from mlx_fusekit.checkpoint import header
from mlx_fusekit.errors import AdapterError, ConfigurationError, HubError
from mlx_fusekit.hub import LocalFolder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def test_weights_are_split_from_names(base: Path, adapter: Path, tmp_path: Path) -> None:
    odd = make_adapter(tmp_path / "adapter:0.5", base, seed=3)
    named = NamedSources.find(base, [f"{adapter}:0.25", odd, f"{odd}:2"])
    assert [(c.folder.path, c.weight) for c in named.adapters] == [
        (adapter, 0.25),
        (odd, 1.0),
        (odd, 2.0),
    ]
    with pytest.raises(HubError, match="neither a folder here nor a Hub id"):
        NamedSources.find(base, f"{adapter}:0.25", weighted=False)


def test_nothing_is_opened_to_find_it(tmp_path: Path, base: Path) -> None:
    (tmp_path / "empty").mkdir()
    named = NamedSources.find(base, tmp_path / "empty")
    assert named.folders == (base, tmp_path / "empty")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: the file is missing"):
        named.open()


def test_no_adapter_is_a_mistake(base: Path) -> None:
    with pytest.raises(ConfigurationError, match="give at least one adapter"):
        NamedSources.find(base, [])


def test_all_is_bound_together(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", base, rank=8, seed=2)
    found = NamedSources.find(base, [adapter, f"{other}:0.5"]).open()
    assert found.adapter_names == ("adapter", "other")
    assert {update.rank for update in found.adapter.weights.values()} == {12}  # type: ignore[union-attr]
    assert [opened.folder for opened in found.opened] == [adapter, other]


def test_a_fuse_reads_each_header_once(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()

    def counted(path: Path) -> Any:
        read[path.name] += 1
        return header.read_header(path)

    monkeypatch.setattr("mlx_fusekit.checkpoint.folder.read_header", counted)
    monkeypatch.setattr(opening, "read_header", counted)
    prepare_fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    assert read == {"model.safetensors": 1, "adapters.safetensors": 1}


def test_a_folder_knows_its_identity_and_whether_its_code_may_run(base: Path) -> None:
    named = NamedSources.find(base, base, trust_remote_code=True)
    assert named.model == LocalFolder(base, trusted=True)
    assert not named.adapters[0].folder.trusted
    assert named.model.identity == str(base)
    assert LocalFolder(base, "owner/name").identity == "owner/name"
    assert sources.open_model(named.model).folder == base
