"""Publishing to a Hub on this machine: what arrives, what is refused, and what goes wrong."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from support.hub_upload_server import TOKEN, USER, Fault, Repository, UploadHub

from mlx_fusekit import PublishReport, export_gguf, publish
from mlx_fusekit.errors import CheckpointError, ConfigurationError, FusekitError, HubError

REPO = f"{USER}/sql-model"
WEIGHTS = "model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.iterdir()}


def refused(hub: UploadHub, error: type[FusekitError], message: str, *a: Any, **k: Any) -> str:
    """Publish, which must fail with one line without the token, and send nothing."""
    with pytest.raises(error, match=message) as caught:
        publish(*a, **k)
    text = str(caught.value)
    assert TOKEN not in text
    assert "\n" not in text
    assert "s3cret" not in text
    assert hub.received == []
    assert all(repository.commits == [] for repository in hub.repositories.values())
    return text


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

    def test_a_public_repository_is_not_mistaken_for_a_private_one(
        self, hub: UploadHub, fused: Path
    ) -> None:
        hub.repositories[REPO] = Repository(private=False)
        refused(hub, HubError, "everybody can see it; add --public", fused, REPO)
        assert not publish(fused, REPO, public=True).private

    def test_a_private_one_stays_so(self, hub: UploadHub, fused: Path) -> None:
        hub.repositories[REPO] = Repository(private=True)
        report = publish(fused, REPO, public=True)
        assert report.private
        assert any("stays so" in line for line in report.warnings)

    def test_a_bare_name_is_ones_own(self, hub: UploadHub, fused: Path) -> None:
        report = publish(fused, "sql-model")
        assert report.repo == REPO
        assert f"--model {REPO}" in report.card

    def test_an_organization(self, hub: UploadHub, fused: Path) -> None:
        publish(fused, "team/sql-model")
        assert hub.repositories["team/sql-model"].commits

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

    def test_weights_of_another_model_do_not_stay(self, hub: UploadHub, fused: Path) -> None:
        """mlx_lm.load reads every model*.safetensors there is."""
        stale = {"model-00001-of-00002.safetensors": b"1", "model.gguf": b"2", "eval.md": b"3"}
        hub.repositories[REPO] = Repository(True, {"main": dict(stale)})
        report = publish(fused, REPO)
        assert report.removed == ("model-00001-of-00002.safetensors",)
        assert set(hub.repositories[REPO].files) == {
            *(file.name for file in report.files),
            "model.gguf",
            "eval.md",
        }

    def test_the_pipeline_that_xet_brings(
        self, hub: UploadHub, fused: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With hf_xet, huggingface_hub uploads another way; here without files that xet takes."""
        pytest.importorskip("hf_xet")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
        hub.large = ()
        report = publish(fused, REPO)
        assert hub.repositories[REPO].private
        assert hub.repositories[REPO].files == contents(fused) | {"README.md": report.card.encode()}
        (fused / "config.json").write_text((fused / "config.json").read_text() + "\n")
        report = publish(fused, REPO, create_pr=True)
        there = hub.repositories[REPO]
        assert report.pull_request_url == f"{hub.url}/{REPO}/discussions/1"
        assert there.branches["refs/pr/1"] == there.files | contents(fused)

    def test_an_xet_server_that_does_not_answer(
        self, hub: UploadHub, fused: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("hf_xet")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
        text = refused(hub, HubError, f"{REPO}: ", fused, REPO)
        assert "goes on from there" in text


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

    def test_a_card_of_before_is_not_taken_for_the_one_that_is_there(
        self, hub: UploadHub, fused: Path, waits: list[float]
    ) -> None:
        for words in ("First words.", "Later words."):
            hub.repositories.setdefault(REPO, Repository(True)).files["README.md"] = words.encode()
            if words.startswith("Later"):
                hub.faults = [Fault("HEAD", "README.md", 503, skip=1, times=99)]
                with pytest.raises(HubError, match="the Hub answered 503"):
                    publish(fused, REPO)
            else:
                publish(fused, REPO)
        assert hub.repositories[REPO].files["README.md"] == b"Later words."

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

    def test_what_the_hub_says_of_a_card_is_told_once(self, hub: UploadHub, fused: Path) -> None:
        remarks = {"errors": [], "warnings": [{"message": f"odd,\nby {TOKEN}"}]}
        hub.faults = [Fault("POST", "/validate-yaml", 200, body=remarks, times=99)]
        warnings = publish(fused, REPO).warnings
        assert [line.partition("README.md: ")[2] for line in warnings if "odd" in line] == [
            "- odd, by hf_…"
        ]
        assert not any("content=" in line for line in warnings)

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


class TestPreflight:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda f: shutil.rmtree(f), "no such model folder"),
            (lambda f: (f / "config.json").unlink(), "config.json: the file is missing"),
            (lambda f: (f / WEIGHTS).unlink(), f"names {WEIGHTS}, which is not in the folder"),
            (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), WEIGHTS),
            (lambda f: shutil.copy(f / WEIGHTS, f / "model-2.safetensors"), "not in model.saf"),
            (lambda f: (f / "README.md").write_text("---\n: [\n---\n"), "not valid YAML"),
            (lambda f: (f / "README.md").write_text("---\n- 1\n---\n"), "must be a mapping"),
        ],
    )
    def test_what_is_no_complete_model(
        self, hub: UploadHub, fused: Path, spoil: Any, message: str
    ) -> None:
        spoil(fused)
        refused(hub, CheckpointError, message, fused, REPO)
        assert hub.requests == []

    def test_a_model_that_is_not_fused(self, hub: UploadHub, fused: Path) -> None:
        import mlx.core as mx

        tensors = mx.load(str(fused / WEIGHTS))
        tensors["model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((4, 4))
        mx.save_safetensors(str(fused / WEIGHTS), tensors, {"format": "mlx"})
        (fused / "model.safetensors.index.json").unlink()
        refused(hub, CheckpointError, "lora_a.*fuse it first", fused, REPO)
        assert hub.requests == []

    @pytest.mark.parametrize(
        "name",
        ["", "a/b/c", "me/..", "me/a--b", "me/x.git", "-me/x", "me/" + "x" * 97, "me/o x", "/tmp"],
    )
    def test_names(self, hub: UploadHub, fused: Path, name: str) -> None:
        refused(hub, ConfigurationError, "not a name for a repository", fused, name)
        assert hub.requests == []

    def test_flags(self, hub: UploadHub, fused: Path, tmp_path: Path) -> None:
        options: list[tuple[str, dict[str, Any]]] = [
            ("--create-pr opens", {"create_pr": True, "revision": "v2"}),
            ("--license ../x", {"license": "../x"}),
            ("the file is missing", {"verify_report": tmp_path / "none.json"}),
            ("the file is missing", {"bench_report": tmp_path / "none.json"}),
        ]
        for message, more in options:
            refused(hub, ConfigurationError, message, fused, REPO, **more)
        assert hub.requests == []

    def test_only_what_belongs_to_a_model_goes(
        self, hub: UploadHub, fused: Path, tmp_path: Path
    ) -> None:
        strays = {
            ".env": "hidden",
            ".DS_Store": "hidden",
            "adapters.safetensors": "of an adapter",
            "0000100_adapters.safetensors": "of an adapter",
            "adapter_config.json": "of an adapter",
            "optimizer.safetensors": "a state of training",
            "training_args.bin": "a state of training",
            "pytorch_model.bin": "pickled",
            "model.pt": "pickled",
            "train.jsonl": "not part of a model",
            "secrets.json": "not part of a model",
            "notes.txt": "not part of a model",
            "modeling_tiny.py": "code",
            "Modelfile": "its FROM names no GGUF file",
        }
        for name in strays:
            (fused / name).write_text("FROM ./model.gguf")
        (fused / "checkpoint-100").mkdir()
        (fused / "checkpoint-100" / "model.safetensors").write_text("x")
        (tmp_path / "private.txt").write_text("private")
        (fused / "notes.md").symlink_to(tmp_path / "private.txt")
        os.mkfifo(fused / "vocab.txt")
        report = publish(fused, REPO)
        left_out = {item.name: item.reason for item in report.left_out}
        for name, reason in strays.items():
            assert left_out.pop(name).startswith(reason)
        assert left_out == {
            "checkpoint-100/": "a folder",
            "notes.md": "not part of a model",
            "vocab.txt": "not part of a model",
        }
        assert set(hub.repositories[REPO].files) == {file.name for file in report.files}
        assert not set(strays) & set(hub.repositories[REPO].files)

    def test_code_goes_where_it_is_trusted(self, hub: UploadHub, fused: Path) -> None:
        (fused / "modeling_tiny.py").write_text("x = 1\n")
        report = publish(fused, REPO, trust_remote_code=True)
        assert hub.repositories[REPO].files["modeling_tiny.py"] == b"x = 1\n"
        assert "--trust-remote-code" in report.card

    @pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "extra.gguf"])
    def test_a_link_out_of_the_folder(
        self, hub: UploadHub, fused: Path, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "secret").write_text("{}")
        (fused / name).unlink(missing_ok=True)
        (fused / name).symlink_to(tmp_path / "secret")
        refused(hub, CheckpointError, "a link that leads out of", fused, REPO)
        assert hub.requests == []

    def test_a_path_of_this_machine(
        self, hub: UploadHub, fused: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", "/home/somebody")
        config = (fused / "config.json").read_text()
        for path in ("/home/somebody/models/llama", str(fused)):
            changed = {**json.loads(config), "_name_or_path": path}
            (fused / "config.json").write_text(json.dumps(changed))
            refused(hub, CheckpointError, "config.json: tells a path of this", fused, REPO)
        (fused / "config.json").write_text(config)
        (fused / "README.md").write_text("Trained in /home/somebody/work.")
        refused(hub, CheckpointError, "README.md: tells a path of this", fused, REPO)
        assert hub.requests == []

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

    def test_one_that_is_none(self, hub: UploadHub, fused: Path) -> None:
        (fused / "model.gguf").write_bytes(b"not a GGUF file at all")
        refused(hub, CheckpointError, "model.gguf: is no GGUF file", fused, REPO)
        assert hub.requests == []


class TestAccess:
    def test_without_a_token(
        self, hub: UploadHub, fused: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        refused(hub, HubError, "not logged in; run `hf auth login`, or set HF_TOKEN", fused, REPO)
        assert hub.requests == []

    def test_a_token_that_may_only_read(self, hub: UploadHub, fused: Path) -> None:
        hub.account["auth"] = {"accessToken": {"role": "read"}}
        refused(hub, HubError, "your token may only read", fused, REPO)
        assert hub.repositories == {}

    def test_somebody_elses_repository(self, hub: UploadHub, fused: Path) -> None:
        message = "you are me, and other is not among your organizations.*--create-pr"
        refused(hub, HubError, message, fused, "other/model")
        assert hub.repositories == {}

    def test_a_token_that_the_hub_does_not_know(
        self, hub: UploadHub, fused: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_anotherSecret")
        text = refused(hub, HubError, "the Hub answered 401", fused, REPO)
        assert "log in with `hf auth login`" in text
        assert "hf_another" not in text


class TestFaults:
    def test_a_connection_that_drops_in_mid_upload(
        self, hub: UploadHub, fused: Path, waits: list[float]
    ) -> None:
        hub.faults = [Fault("PUT", "/storage/", after=100_000)]
        report = publish(fused, REPO)
        assert hub.faults[0].hits == 1
        assert len(waits) == 1
        assert hub.repositories[REPO].files == contents(fused) | {"README.md": report.card.encode()}

    def test_a_second_run_sends_only_what_is_missing(
        self, hub: UploadHub, fused: Path, waits: list[float]
    ) -> None:
        split(fused)
        second = hashed(fused / "model-00002-of-00002.safetensors")
        hub.faults = [Fault("PUT", second, after=1000, times=99)]
        with pytest.raises(HubError, match=r"the connection to the Hub failed.*goes on from there"):
            publish(fused, REPO)
        assert len(waits) == 5
        assert hub.repositories[REPO].commits == []
        assert len(hub.received) == 1
        hub.faults = []
        publish(fused, REPO)
        assert [oid for oid, _ in hub.received[1:]] == [second]
        assert hub.repositories[REPO].files.items() >= contents(fused).items()

    def test_what_is_there_is_not_sent_again(self, hub: UploadHub, fused: Path) -> None:
        first = publish(fused, REPO)
        assert publish(fused, REPO).commit == first.commit
        (fused / "generation_config.json").write_text("{}")
        publish(fused, REPO)
        assert len(hub.received) == 1
        assert [c.added for c in hub.repositories[REPO].commits[1:]] == [
            ("generation_config.json",)
        ]

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/preupload/"),
            ("POST", "objects/batch"),
            ("PUT", "/storage/"),
            ("POST", "/verify"),
        ],
    )
    def test_a_server_error_is_tried_again(
        self, hub: UploadHub, fused: Path, waits: list[float], method: str, path: str
    ) -> None:
        hub.faults = [Fault(method, path, 503, times=2)]
        publish(fused, REPO)
        assert hub.faults[0].hits == 2
        assert hub.repositories[REPO].commits

    def test_retry_after_is_kept(self, hub: UploadHub, fused: Path, waits: list[float]) -> None:
        hub.faults = [Fault("POST", "/preupload/", 429, {"Retry-After": "7"})]
        publish(fused, REPO)
        assert waits == [8.0]

    @pytest.mark.parametrize(
        ("method", "path", "status", "message"),
        [
            ("POST", "/repos/create", 403, "may not write there"),
            ("POST", "/repos/create", 429, "too many requests; wait 30 seconds, and try again"),
            ("POST", "/preupload/", 401, "log in with `hf auth login`"),
            ("POST", "/preupload/", 403, "may not write there"),
            ("POST", "objects/batch", 403, "may not write there"),
            ("PUT", "/storage/", 403, "may not write there"),
            ("POST", "/validate-yaml", 400, "the Hub answered 400"),
            ("GET", "/whoami", 500, "try again later"),
        ],
    )
    def test_what_the_hub_refuses_is_said(
        self, hub: UploadHub, fused: Path, method: str, path: str, status: int, message: str
    ) -> None:
        body = {"error": f"No, {TOKEN}, see http://127.0.0.1/x?X-Amz-Signature=s3cret"}
        hub.faults = [Fault(method, path, status, {"Retry-After": "30"}, body, times=99)]
        text = refused(hub, HubError, message, fused, REPO)
        assert f"the Hub answered {status} (No, hf_…, see http://127.0.0.1/x)" in text

    @pytest.mark.parametrize("status", [403, 409, 412, 500])
    def test_a_refused_commit(self, hub: UploadHub, fused: Path, status: int) -> None:
        hub.faults = [Fault("POST", "/commit/", status, times=99)]
        with pytest.raises(HubError, match=f"the Hub answered {status}"):
            publish(fused, REPO)
        assert hub.repositories[REPO].commits == []
        hub.faults = []
        publish(fused, REPO)
        assert len(hub.received) == 1
        assert len(hub.repositories[REPO].commits) == 1

    def test_a_repository_that_was_made_meanwhile(self, hub: UploadHub, fused: Path) -> None:
        hub.faults = [Fault("GET", f"api/models/{REPO}$", 404, {"X-Error-Code": "RepoNotFound"})]
        hub.repositories[REPO] = Repository(private=False)
        refused(hub, HubError, "everybody can see it", fused, REPO)

    def test_no_network(self, hub: UploadHub, fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        refused(hub, HubError, "the connection to the Hub failed", fused, REPO)


def split(folder: Path) -> None:
    """Lay the weights out in two files."""
    import mlx.core as mx

    tensors = sorted(mx.load(str(folder / WEIGHTS)).items())
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for place, part in enumerate((tensors[:20], tensors[20:]), 1):
        name = f"model-0000{place}-of-00002.safetensors"
        mx.save_safetensors(str(folder / name), dict(part), {"format": "mlx"})
        weight_map |= dict.fromkeys(dict(part), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def hashed(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_report_as_json(hub: UploadHub, fused: Path) -> None:
    report = publish(fused, REPO)
    assert isinstance(report, PublishReport)
    value = json.loads(json.dumps(report.as_json()))
    assert value["files"][0].keys() == {"name", "bytes"}
    assert value["repo"] == REPO
