"""A license that stands in the card of a base's folder, of which the Hub knows nothing."""

import json
import shutil
from pathlib import Path

import gguf
import pytest

from mlx_fusekit import FuseReport, export_gguf, fuse, publish, samples

REPO = "me/sql-model"
LINK = "https://example.org/terms"


def base_with_a_card(folder: Path, front: str) -> Path:
    """As `hf download --local-dir` leaves a model, or somebody who copied one."""
    shutil.copytree(samples.model_path(), folder)
    (folder / "README.md").write_text(f"---\n{front}---\n# A model\n")
    return folder


def fused_from(base: Path, target: Path) -> FuseReport:
    return fuse(base, samples.adapter_path(), target, requantize="nearest")


@pytest.mark.parametrize(
    ("front", "wanted"),
    [
        ("license: apache-2.0\n", {"license": "apache-2.0"}),
        (
            f"license: other\nlicense_name: tiny\nlicense_link: {LINK}\n",
            {"license": "other", "license_name": "tiny", "license_link": LINK},
        ),
        (
            "license: other\nlicense_name: tiny\nlicense_link: LICENSE.md\n",
            {"license": "other", "license_name": "tiny", "license_link": "LICENSE.md"},
        ),
        (
            "license: other\nlicense_name: tiny\nlicense_link: /home/me/LICENSE\n",
            {"license": "other", "license_name": "tiny"},
        ),
    ],
    ids=["known", "link", "file", "path"],
)
def test_it_goes_into_the_card_and_the_gguf_file(
    tmp_path: Path, front: str, wanted: dict[str, str]
) -> None:
    base = base_with_a_card(tmp_path / "base", front)
    (base / "LICENSE.md").write_text("My own terms.")
    fused_from(base, tmp_path / "fused")
    shutil.rmtree(base)
    report = publish(tmp_path / "fused", REPO, dry_run=True)
    assert report.license == wanted["license"]
    assert not any("license is not known" in line for line in report.warnings)
    head = report.card.partition("\n---\n")[0]
    found = dict(line.split(": ", 1) for line in head.splitlines() if line.startswith("license"))
    assert found == wanted
    export_gguf(tmp_path / "fused", tmp_path / "model.gguf")
    keys = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert keys["general.license"].contents() == wanted["license"]
    link = keys.get("general.license.link")
    assert (link and link.contents()) == (LINK if LINK in wanted.values() else None)


def test_a_link_to_a_file_that_did_not_come_along_is_left_out(tmp_path: Path) -> None:
    front = "license: other\nlicense_name: tiny\nlicense_link: LICENSE.md\n"
    fused_from(base_with_a_card(tmp_path / "base", front), tmp_path / "fused")
    assert "license_link" not in publish(tmp_path / "fused", REPO, dry_run=True).card


def test_what_the_user_says_comes_first(tmp_path: Path) -> None:
    fused_from(base_with_a_card(tmp_path / "base", "license: mit\n"), tmp_path / "fused")
    report = publish(tmp_path / "fused", REPO, license="apache-2.0", dry_run=True)
    assert report.license == "apache-2.0"
    (tmp_path / "fused" / "README.md").write_text("---\nlicense: gemma\n---\nMy words.\n")
    assert publish(tmp_path / "fused", REPO, dry_run=True).license == "gemma"
    export_gguf(tmp_path / "fused", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.license"].contents() == "gemma"


@pytest.mark.parametrize("front", ["", "license: [\n", "license: Whatever I say\n"])
def test_a_card_without_one(tmp_path: Path, front: str) -> None:
    fused_from(base_with_a_card(tmp_path / "base", front), tmp_path / "fused")
    recipe = json.loads((tmp_path / "fused" / "fusekit.json").read_text())
    assert recipe["base"]["license"] is None
    report = publish(tmp_path / "fused", REPO, dry_run=True)
    assert any("license is not known" in line for line in report.warnings)
