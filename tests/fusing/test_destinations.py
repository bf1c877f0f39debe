"""From Python, what the command can: a GGUF file of the fused model along with it."""

from pathlib import Path

import gguf
import pytest
from support.exportable import make_exportable
from support.tiny import make_adapter

from mlx_fusekit import export_gguf, fuse, prepare_fuse
from mlx_fusekit.errors import ConfigurationError, OutputError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exportable(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base.parent / "adapter", base)


def types_in(path: Path) -> set[str]:
    return {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_the_file_is_that_of_the_fused_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = fuse(base, adapter, tmp_path / "fused", requantize="nearest", export_gguf=True)
    export_gguf(tmp_path / "fused", tmp_path / "again.gguf")
    written = tmp_path / "fused" / "model.gguf"
    assert written.read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert report.gguf is not None
    assert report.as_json()["gguf"]["gguf_path"] == str(written)
    assert "published" not in report.as_json()
    assert types_in(written) == {"Q4_1", "F32"}


def test_its_place_and_types_are_options(base: Path, adapter: Path, tmp_path: Path) -> None:
    options = {"requantize": "nearest", "export_gguf": True, "outtype": "f16"}
    fuse(base, adapter, tmp_path / "fused", gguf_path="../beside.gguf", **options)
    assert types_in(tmp_path / "beside.gguf") == {"F16", "F32"}
    assert not (tmp_path / "fused" / "model.gguf").exists()


def test_without_it_the_report_says_nothing_of_it(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    report = fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    assert report.gguf is report.published is None
    assert not {"gguf", "published"} & set(report.as_json())


def test_what_cannot_be_is_refused_before_anything_is_fused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    for error, options in (
        (ConfigurationError, {"outtype": "q9"}),
        (OutputError, {"gguf_path": "../there.gguf"}),
    ):
        with pytest.raises(error):
            prepare_fuse(base, adapter, tmp_path / "fused", export_gguf=True, **options)
    with pytest.raises(ConfigurationError, match="--upload-repo a b: not a name"):
        prepare_fuse(base, adapter, tmp_path / "fused", upload_repo="a b")
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
