"""Publishing to a Hub on this machine: what arrives, what is refused, and what goes wrong."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from support.hub_upload_server import TOKEN, USER, Fault, Repository, UploadHub

from mlx_fusekit import PublishReport, export_gguf, publish
from mlx_fusekit.errors import (
    CheckpointError,
    ConfigurationError,
    FusekitError,
    HubError,
    OutputError,
)
from mlx_fusekit.publishing.private import Private

REPO = f"{USER}/sql-model"
WEIGHTS = "model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.iterdir()}


def refused(hub: UploadHub, error: type[FusekitError], message: str, *a: Any, **k: Any) -> None:
    """Publish, which must fail with one line without the token, and send nothing."""
    with pytest.raises(error, match=message) as caught:
        publish(*a, **k)
    text = str(caught.value)
    assert TOKEN not in text
    assert "\n" not in text
    assert hub.received == []
    assert all(repository.commits == [] for repository in hub.repositories.values())


class TestUpload:
    def test_the_bytes_of_the_folder_arrive(self, hub: UploadHub, fused: Path) -> None:
        before = contents(fused)
        report = publish(fused, REPO)
        there = hub.repositories[REPO]
        assert there.files == before | {"README.md": report.card.encode()}
        assert contents(fused) == before
        assert report.commit == there.sha("main")
        assert {file.name: file.bytes for file in report.files} == {
            name: len(data) for name, data in there.files.items()
        }
        assert report.bytes == sum(map(len, there.files.values()))
        assert hub.unauthorized == []

    def test_it_is_private_unless_asked(self, hub: UploadHub, fused: Path) -> None:
        assert publish(fused, REPO).private
        assert hub.repositories[REPO].private
        assert not publish(fused, f"{USER}/shown", public=True).private
        assert not hub.repositories[f"{USER}/shown"].private

    def test_a_private_one_stays_so(self, hub: UploadHub, fused: Path) -> None:
        hub.repositories[REPO] = Repository(private=True)
        report = publish(fused, REPO, public=True)
        assert report.private
        assert any("stays so" in line for line in report.warnings)

    def test_a_bare_name_is_ones_own(self, hub: UploadHub, fused: Path) -> None:
        report = publish(fused, "sql-model")
        assert report.repo == REPO
        assert f"--model {REPO}" in report.card

    def test_the_message_and_the_branch(self, hub: UploadHub, fused: Path) -> None:
        for _ in range(2):
            publish(fused, REPO, revision="v2", commit_message="Second try")
        there = hub.repositories[REPO]
        assert there.files == {}
        assert set(there.branches) == {"main", "v2"}
        assert WEIGHTS in there.branches["v2"]
        assert [(c.revision, c.summary) for c in there.commits] == [("v2", "Second try")]

    def test_a_pull_request(self, hub: UploadHub, fused: Path) -> None:
        hub.repositories["other/model"] = Repository(private=False)
        report = publish(fused, "other/model", public=True, create_pr=True, commit_message="Mine")
        there = hub.repositories["other/model"]
        assert there.files == {}
        assert WEIGHTS in there.branches["refs/pr/1"]
        assert there.pull_requests == ["Mine"]
        assert report.pull_request_url == f"{hub.url}/other/model/discussions/1"

    def test_progress_is_told(self, hub: UploadHub, fused: Path) -> None:
        told = []
        report = publish(fused, REPO, progress=lambda *step: told.append(step))
        assert told == [("uploading", 0, report.bytes), ("uploading", report.bytes, report.bytes)]


class TestCards:
    def test_text_written_on_the_hub_is_kept(self, hub: UploadHub, fused: Path) -> None:
        first = publish(fused, REPO).card
        edited = first.replace("# sql-model", "# SQL for everybody\n\nMy words.")
        edited = edited.replace("---\n", "---\ndatasets:\n- me/questions\n", 1)
        hub.repositories[REPO].files["README.md"] = edited.encode()
        second = publish(fused, REPO).card
        assert "# SQL for everybody\n\nMy words." in second
        assert "- me/questions" in second
        assert second.count("## Use") == 1
        assert publish(fused, REPO).card == second

    def test_nothing_is_overwritten_when_the_hub_does_not_show_its_card(
        self, hub: UploadHub, fused: Path, waits: list[float]
    ) -> None:
        hub.repositories[REPO] = Repository(True, {"main": {"README.md": b"My words."}})
        hub.faults = [Fault("HEAD", "README.md", 503, times=99)]
        refused(hub, HubError, "the Hub answered 503", fused, REPO)

    def test_the_folders_own_card_comes_first(self, hub: UploadHub, fused: Path) -> None:
        hub.repositories[REPO] = Repository(True, {"main": {"README.md": b"Old words."}})
        (fused / "README.md").write_text("New words.\n")
        report = publish(fused, REPO)
        assert "New words." in report.card
        assert "Old words." not in report.card
        assert any("takes the place" in line for line in report.warnings)
        assert (fused / "README.md").read_text() == "New words.\n"

    def test_license_and_languages_are_the_bases(self, hub: UploadHub, fused: Path) -> None:
        named = "license: other\nlicense_name: tiny\nlicense_link: LICENSE.md\n"
        card = f"---\n{named}language: [ko, en]\n---\n"
        hub.repositories["mlx-community/sample-4bit"] = Repository(
            False, {"main": {"README.md": card.encode()}}
        )
        report = publish(fused, REPO)
        assert report.license == "other"
        link = "https://huggingface.co/mlx-community/sample-4bit/blob/main/LICENSE.md"
        assert f"license: other\nlicense_name: tiny\nlicense_link: {link}\n" in report.card
        assert "language:\n- ko\n- en\n" in report.card
        assert publish(fused, REPO, license="mit").license == "mit"
        assert publish(fused, REPO, licence="apache-2.0").license == "apache-2.0"

    def test_a_license_that_is_not_known_is_said(self, hub: UploadHub, fused: Path) -> None:
        report = publish(fused, REPO)
        assert report.license is None
        assert any("license is not known" in line for line in report.warnings)

    def test_the_recipe_tells_no_folder(self, hub: UploadHub, fused: Path) -> None:
        recipe = json.loads((fused / "fusekit.json").read_text())
        error = "its training data cannot be used: /home/me/secret/train.jsonl: missing"
        for source, shown in (
            ("/home/me/secret/text.txt", "text.txt"),
            (f"generated by base+adapter, since {error}", "generated by base+adapter"),
        ):
            recipe["calibration"] = {"source": source, "tokens": 100}
            (fused / "fusekit.json").write_text(json.dumps(recipe))
            report = publish(fused, REPO)
            there = hub.repositories[REPO].files
            assert json.loads(there["fusekit.json"])["calibration"]["source"] == shown
            assert b"secret" not in b"".join(there.values())
            assert any("without the folder" in line for line in report.warnings)


class TestWhatIsPrivate:
    def test_the_recipe_without_the_folder_of_the_text(self, hub: UploadHub, fused: Path) -> None:
        recipe = json.loads((fused / "fusekit.json").read_text())
        recipe["calibration"] = {"source": str(fused / "text.txt"), "tokens": 100}
        recipe["adapters"][0]["id"] = str(fused.parent / "adapter")
        (fused / "fusekit.json").write_text(json.dumps(recipe))
        message = 'fusekit.json: tells a path of this machine .*, at "adapters.id"'
        refused(hub, CheckpointError, message, fused, REPO)
        assert hub.requests == []

    def test_what_requests_say_of_this_machine(
        self, hub: UploadHub, fused: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        route, told = hub.route, []

        def listen(request: Any, path: str, body: bytes) -> None:
            told.extend(f"{name}: {value}" for name, value in request.headers.items())
            told.append(request.path + body.decode(errors="replace"))
            route(request, path, body)

        monkeypatch.setattr(hub, "route", listen)
        publish(fused, REPO)
        assert any("user-agent: mlx-fusekit" in line.lower() for line in told)
        private = Private.of_machine(fused)
        for line in told:
            if not line.lower().startswith("authorization: "):
                assert private.in_text(line) is None

    def test_a_card_on_the_hub(self, hub: UploadHub, fused: Path) -> None:
        there = f"---\nlicense: mit\n---\nMade in {fused}."
        hub.repositories[REPO] = Repository(True, {"main": {"README.md": there.encode()}})
        message = "README.md: its text as it would be published tells a path of this machine"
        refused(hub, CheckpointError, message, fused, REPO)
        assert hub.writes == []


class TestChangedMeanwhile:
    @pytest.mark.parametrize("name", ["LICENSE", "config.json", "fusekit.json", WEIGHTS])
    def test_after_it_was_checked(
        self, hub: UploadHub, fused: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        (fused / "LICENSE").write_text("MIT License")
        ask = hub.whoami

        def answer_and_change(*request: Any, **names: str) -> None:
            content = (fused / name).read_bytes()
            (fused / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            ask(*request, **names)

        monkeypatch.setattr(hub, "whoami", answer_and_change)
        message = f"{name}: was changed after it was checked, and nothing was uploaded"
        refused(hub, CheckpointError, message, fused, REPO)

    def test_while_it_is_uploaded(
        self, hub: UploadHub, fused: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (fused / "LICENSE").write_text("MIT License")
        ask, weights = hub.preupload, (fused / WEIGHTS).read_bytes()

        def answer_and_change(*request: Any, **names: str) -> None:
            (fused / "LICENSE").write_text(f"MIT License of {fused}")
            ask(*request, **names)

        monkeypatch.setattr(hub, "preupload", answer_and_change)
        publish(fused, REPO)
        assert hub.repositories[REPO].files["LICENSE"] == b"MIT License"

        def answer_and_touch(*request: Any, **names: str) -> None:
            (fused / WEIGHTS).write_bytes(weights)
            ask(*request, **names)

        (fused / "LICENSE").unlink()
        monkeypatch.setattr(hub, "preupload", answer_and_touch)
        with pytest.raises(CheckpointError, match=f"{WEIGHTS}: was changed while it was uploaded"):
            publish(fused, REPO)


def test_no_room_for_what_is_laid_out(
    hub: UploadHub, fused: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    message = r"gone: cannot be written to \(No such file or directory\); make room there"
    refused(hub, OutputError, message, fused, REPO)


class TestPreflight:
    def test_what_is_wrong_here_is_refused_before_the_hub_is_asked(
        self, hub: UploadHub, fused: Path, tmp_path: Path
    ) -> None:
        options: list[tuple[str, dict[str, Any]]] = [
            ("not a name for a repository", {"repo": "a/b/c"}),
            ("--create-pr opens", {"create_pr": True, "revision": "v2"}),
            ("--license ../x", {"license": "../x"}),
            ("the file is missing", {"verify_report": tmp_path / "none.json"}),
            ("the file is missing", {"bench_report": tmp_path / "none.json"}),
        ]
        for message, more in options:
            refused(hub, ConfigurationError, message, fused, **{"repo": REPO, **more})
        (fused / "README.md").write_text("---\n: [\n---\n")
        refused(hub, CheckpointError, f"{fused}/README.md: its front matter", fused, REPO)
        (fused / "config.json").unlink()
        refused(hub, CheckpointError, "config.json: the file is missing", fused, REPO)
        assert hub.requests == []

    def test_code_goes_where_it_is_trusted(self, hub: UploadHub, fused: Path) -> None:
        (fused / "modeling_tiny.py").write_text("x = 1\n")
        report = publish(fused, REPO, trust_remote_code=True)
        assert hub.repositories[REPO].files["modeling_tiny.py"] == b"x = 1\n"
        assert "--trust-remote-code" in report.card

    def test_a_damaged_part_of_ours(self, hub: UploadHub, fused: Path) -> None:
        card = publish(fused, REPO, dry_run=True).card
        (fused / "README.md").write_text(card.replace("<!-- mlx-fusekit: until here -->", ""))
        requests = len(hub.requests)
        refused(hub, CheckpointError, "one marker of mlx-fusekit's part", fused, REPO)
        assert len(hub.requests) == requests

    def test_dry_run(self, hub: UploadHub, fused: Path) -> None:
        report = publish(fused, REPO, dry_run=True)
        assert report.dry_run
        assert report.commit is None
        assert {"README.md", WEIGHTS} <= {file.name for file in report.files}
        assert hub.writes == []
        assert hub.repositories == {}

    def test_dry_run_without_a_network(
        self, fused: Path, monkeypatch: pytest.MonkeyPatch, hub: UploadHub
    ) -> None:
        shown = publish(fused, REPO, dry_run=True).card
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.delenv("HF_TOKEN")
        assert publish(fused, REPO, dry_run=True).card == shown
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        refused(hub, HubError, "HF_HUB_OFFLINE is set; unset it", fused, REPO)


@pytest.fixture(scope="module")
def exported(sample_fused: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of the fused model, and its Modelfile."""
    folder = tmp_path_factory.mktemp("gguf")
    export_gguf(sample_fused, folder / "model.gguf", modelfile=True)
    return folder


class TestGguf:
    def test_beside_the_model(self, hub: UploadHub, fused: Path, exported: Path) -> None:
        shutil.copytree(exported, fused, dirs_exist_ok=True)
        report = publish(fused, REPO)
        assert hub.repositories[REPO].files == contents(fused) | {"README.md": report.card.encode()}
        assert "| `model.gguf` | GGUF, Q4_1, " in report.card
        assert f"llama-cli --hf-repo {REPO} --hf-file model.gguf" in report.card
        assert "ollama create sql-model -f sql-model/Modelfile" in report.card
        assert "base_model_relation: finetune" in report.card

    def test_alone(self, hub: UploadHub, exported: Path, fused: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(exported, tmp_path / "gguf"))
        shutil.copy(fused / "fusekit.json", folder)
        report = publish(folder, REPO)
        assert set(hub.repositories[REPO].files) == {
            "model.gguf",
            "Modelfile",
            "fusekit.json",
            "README.md",
        }
        assert "base_model_relation: quantized" in report.card
        assert "library_name" not in report.card
        assert "mlx_lm.generate" not in report.card


def test_the_report_as_json(hub: UploadHub, fused: Path) -> None:
    report = publish(fused, REPO)
    assert isinstance(report, PublishReport)
    value = json.loads(json.dumps(report.as_json()))
    assert value["files"][0].keys() == {"name", "bytes"}
    assert value["repo"] == REPO
