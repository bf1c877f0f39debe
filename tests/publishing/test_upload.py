"""Talking to the Hub: who may write, what is made, what is sent, and what goes wrong."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from support.hub_upload_server import TOKEN, USER, Commit, Fault, Repository, UploadHub

from mlx_fusekit.errors import ConfigurationError, HubError
from mlx_fusekit.publishing.upload import (
    Uploaded,
    check_access,
    check_name,
    open_repository,
    read_card,
    upload,
)

REPO = f"{USER}/sql-model"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is uploaded; ``*.safetensors`` go to large file storage."""
    folder = tmp_path / "staging"
    folder.mkdir()
    for name in (WEIGHTS, "README.md"):
        (folder / name).write_text(f"content of {name}\n" * 10_000)
    return folder


def send(folder: Path, repo: str = REPO, **options: bool | str) -> Uploaded:
    open_repository(repo, public=False)
    return upload(folder, repo, commit_message="Mine", **options)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish_all(folder: Path) -> None:
    """Everything that publishing asks the Hub, in its order."""
    repo = check_access("sql-model")
    read_card(repo)
    open_repository(repo, public=False, revision="v2")
    upload(folder, repo, commit_message="Mine", revision="v2")


def fails(message: str, folder: Path) -> str:
    """Send, which must fail with one line that has nothing secret."""
    with pytest.raises(HubError, match=message) as caught:
        send(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    assert "s3cret" not in text
    return text


class TestAccess:
    @pytest.mark.parametrize("name", ["", "a/b/c", "me/a--b", "/tmp"])
    def test_what_no_repository_is_called(self, name: str) -> None:
        with pytest.raises(ConfigurationError, match=f"--here {name}: not a name for a repository"):
            check_name(name, "--here")

    def test_the_name_that_it_gets(self, hub: UploadHub) -> None:
        assert check_access("sql-model") == REPO
        assert check_access("team/sql-model") == "team/sql-model"
        assert check_access("other/model", create_pr=True) == "other/model"
        assert hub.writes == []

    def test_without_a_token(
        self, hub: UploadHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(HubError, match="not logged in; run `hf auth login`, or set HF_TOKEN"):
            check_access(REPO)
        assert hub.requests == []

    def test_a_token_that_may_only_read(self, hub: UploadHub) -> None:
        hub.account["auth"] = {"accessToken": {"role": "read"}}
        with pytest.raises(HubError, match="your token may only read"):
            check_access(REPO)

    def test_somebody_elses_repository(self, hub: UploadHub) -> None:
        message = "you are me, and other is not among your organizations.*--create-pr"
        with pytest.raises(HubError, match=message):
            check_access("other/model")

    def test_a_token_that_the_hub_does_not_know(
        self, hub: UploadHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_anotherSecret")
        message = "^--repo me/sql-model: the Hub answered 401; log in with `hf auth login`"
        with pytest.raises(HubError, match=message) as caught:
            check_access(REPO)
        assert "hf_another" not in str(caught.value)


KEYS = (
    "name", "auth", "orgs", "id", "sha", "private", "siblings", "path", "oid", "size", "type",
    "lfs", "url", "files", "objects", "uploadMode", "transfer", "commitOid", "commitUrl", "error",
    "errors", "warnings",
)  # fmt: skip
#: What no part of the Hub's protocol is.
ODD = {
    "nothing": b"",
    "no JSON": b"<html>maintenance</html>",
    "half": b'{"name": "me',
    "null": b"null",
    "a list": b"[]",
    "an empty object": b"{}",
    "no UTF-8": b'{"name": "\xff\xfe',
    "too deep": b"[" * 100_000,
    "values of other types": json.dumps({key: [{"path": 7, "error": 7}] for key in KEYS}).encode(),
}
ANSWERS = [
    *((200, what) for what in ODD),
    *((500, what) for what in ("a list", "no JSON", "values of other types")),
    (404, "a list"),
]
#: Every request that publishing makes.
REQUESTS = {
    "who we are": ("GET", "/whoami-v2"),
    "the repository": ("GET", f"/api/models/{REPO}$"),
    "making it": ("POST", "/repos/create"),
    "making a branch": ("POST", "/branch/"),
    "its files": ("GET", "/tree/"),
    "what is large": ("POST", "/preupload/"),
    "where to send it": ("POST", "/objects/batch"),
    "the commit": ("POST", "/commit/"),
    "the card": ("HEAD", "README.md"),
    "remarks on the card": ("POST", "/validate-yaml"),
}


class TestMalformedAnswers:
    """Whatever answers may say anything: one line, and nothing half-made."""

    @pytest.mark.parametrize(("status", "odd"), ANSWERS)
    @pytest.mark.parametrize(("method", "path"), REQUESTS.values(), ids=REQUESTS)
    def test_is_one_line(
        self,
        hub: UploadHub,
        folder: Path,
        waits: list[float],
        method: str,
        path: str,
        odd: str,
        status: int,
    ) -> None:
        hub.faults = [Fault(method, path, status, body=ODD[odd], times=99)]
        try:
            publish_all(folder)
        except HubError as error:
            text = str(error)
            assert text.startswith((f"{REPO}: ", "--repo sql-model: "))
            assert "\n" not in text
            assert len(text) < 600
            assert TOKEN not in text
            if "/commit/" not in path:
                assert not any(there.commits for there in hub.repositories.values())
        else:
            there = hub.repositories[REPO]
            assert there.branches["v2"] == files(folder)

    @pytest.mark.parametrize("name", [None, 7, ["me"], {"a": "me"}])
    def test_nobodys_token(self, hub: UploadHub, name: Any) -> None:
        hub.account["name"] = name
        with pytest.raises(HubError, match="the Hub did not say whose token this is"):
            check_access(REPO)

    @pytest.mark.parametrize("odd", [None, 7, "team", [None], [7], {"a": 1}])
    def test_no_organizations(self, hub: UploadHub, odd: Any) -> None:
        hub.account |= {"orgs": odd, "auth": odd}
        assert check_access(REPO) == REPO
        with pytest.raises(HubError, match="is not among your organizations"):
            check_access("team/model")

    @pytest.mark.parametrize("private", [None, "false", 0, []])
    def test_one_that_may_be_public(self, hub: UploadHub, private: Any) -> None:
        body = {"id": REPO, "sha": "1" * 40, "private": private, "siblings": []}
        hub.faults = [Fault("GET", f"/api/models/{REPO}$", 200, body=body, times=99)]
        with pytest.raises(HubError, match="the Hub does not say who can see it"):
            open_repository(REPO, public=False)
        assert hub.writes == []

    # huggingface_hub itself waits for a card for ten seconds.
    @pytest.mark.parametrize("request_", sorted(REQUESTS.keys() - {"the card"}))
    def test_none_at_all(
        self,
        hub: UploadHub,
        folder: Path,
        waits: list[float],
        monkeypatch: pytest.MonkeyPatch,
        request_: str,
    ) -> None:
        monkeypatch.setattr("mlx_fusekit.hub._TIMEOUT", 0.1)
        before = huggingface_hub.get_session().event_hooks
        hub.faults = [Fault(*REQUESTS[request_], hang=True, times=99)]
        with pytest.raises(HubError, match="the connection to the Hub failed"):
            publish_all(folder)
        assert huggingface_hub.get_session().event_hooks == before

    def test_a_loop_of_redirects(self, hub: UploadHub, waits: list[float]) -> None:
        there = {"Location": "/api/whoami-v2"}
        hub.faults = [Fault("GET", "/whoami-v2", 307, there, times=99)]
        with pytest.raises(
            HubError, match=r"^--repo sql-model: the connection to the Hub failed \("
        ):
            check_access("sql-model")

    def test_a_card_that_is_no_text(self, hub: UploadHub) -> None:
        hub.repositories[REPO] = Repository(True, {"main": {"README.md": b"\xff\xfe\x00"}})
        with pytest.raises(HubError, match=r"its README\.md is no text in UTF-8"):
            read_card(REPO)
        hub.repositories[REPO].files["README.md"] = b"x" * 10_000_001
        with pytest.raises(HubError, match=r"its README\.md is too large"):
            read_card(REPO)


class TestReadCard:
    def test_of_the_branch_or_else_the_main_one(self, hub: UploadHub) -> None:
        assert read_card(REPO) is None
        there = hub.repositories[REPO] = Repository(True, {"main": {}, "v2": {}})
        assert read_card(REPO, "v2") is None
        there.files["README.md"] = b"Main."
        assert read_card(REPO, "v2") == "Main."
        there.branches["v2"]["README.md"] = b"Second."
        assert read_card(REPO, "v2") == "Second."
        there.branches["v2"]["README.md"] = b"Written since."
        assert read_card(REPO, "v2") == "Written since."

    @pytest.mark.parametrize("skip", [0, 1])
    def test_one_that_cannot_be_had_is_not_none_nor_that_of_before(
        self, hub: UploadHub, waits: list[float], skip: int
    ) -> None:
        hub.repositories[REPO] = Repository(True, {"main": {"README.md": b"Words."}})
        assert read_card(REPO) == "Words."
        hub.faults = [Fault("HEAD", "README.md", 503, skip=skip, times=99)]
        with pytest.raises(HubError, match="the Hub answered 503"):
            read_card(REPO)


class TestOpenRepository:
    def test_it_is_private_unless_asked(self, hub: UploadHub) -> None:
        assert open_repository(REPO, public=False)
        assert hub.repositories[REPO].private
        assert open_repository(REPO, public=True)
        assert not open_repository(f"{USER}/shown", public=True)
        assert not hub.repositories[f"{USER}/shown"].private

    def test_a_public_one_is_not_mistaken_for_a_private_one(self, hub: UploadHub) -> None:
        hub.repositories[REPO] = Repository(private=False)
        with pytest.raises(HubError, match="everybody can see it; add --public"):
            open_repository(REPO, public=False)
        assert not open_repository(REPO, public=True)

    def test_nor_one_that_was_made_meanwhile(self, hub: UploadHub) -> None:
        hub.faults = [Fault("GET", f"api/models/{REPO}$", 404, {"X-Error-Code": "RepoNotFound"})]
        hub.repositories[REPO] = Repository(private=False)
        with pytest.raises(HubError, match="everybody can see it"):
            open_repository(REPO, public=False)

    def test_a_branch_is_made_once(self, hub: UploadHub) -> None:
        for revision in (None, "main", "v2", "v2"):
            open_repository(REPO, public=False, revision=revision)
        assert set(hub.repositories[REPO].branches) == {"main", "v2"}


class TestUpload:
    def test_in_one_commit(self, hub: UploadHub, folder: Path) -> None:
        made = send(folder)
        there = hub.repositories[REPO]
        assert there.files == files(folder)
        assert there.commits == [Commit("main", "Mine", tuple(sorted(files(folder))), ())]
        assert made.commit == there.sha("main")
        assert made.commit_url.startswith(f"{hub.url}/{REPO}/commit/")
        assert (made.pull_request_url, made.removed, made.warnings) == (None, (), ())
        assert hub.unauthorized == []

    def test_a_pull_request(self, hub: UploadHub, folder: Path) -> None:
        made = send(folder, create_pr=True)
        there = hub.repositories[REPO]
        assert there.files == {}
        assert there.branches["refs/pr/1"] == files(folder)
        assert there.pull_requests == ["Mine"]
        assert made.pull_request_url == f"{hub.url}/{REPO}/discussions/1"

    def test_weights_of_another_model_do_not_stay(self, hub: UploadHub, folder: Path) -> None:
        """mlx_lm.load reads every model*.safetensors there is."""
        stale = {"model-00001-of-00002.safetensors": b"1", "model.gguf": b"2", "eval.md": b"3"}
        hub.repositories[REPO] = Repository(True, {"main": dict(stale)})
        assert send(folder).removed == ("model-00001-of-00002.safetensors",)
        assert set(hub.repositories[REPO].files) == {*files(folder), "model.gguf", "eval.md"}

    def test_without_weights_those_that_are_there_stay(self, hub: UploadHub, folder: Path) -> None:
        send(folder)
        (folder / WEIGHTS).unlink()
        assert send(folder).removed == ()
        assert WEIGHTS in hub.repositories[REPO].files

    def test_what_the_hub_says_of_a_card_is_told_once(self, hub: UploadHub, folder: Path) -> None:
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        remarks = {"errors": [], "warnings": [{"message": f"odd,\nby {TOKEN}"}]}
        hub.faults = [Fault("POST", "/validate-yaml", 200, body=remarks, times=99)]
        (warning,) = send(folder).warnings
        assert warning.endswith("README.md: - odd, by hf_…")

    def test_a_connection_that_drops_in_mid_upload(
        self, hub: UploadHub, folder: Path, waits: list[float]
    ) -> None:
        hub.faults = [Fault("PUT", "/storage/", after=1000)]
        send(folder)
        assert hub.faults[0].hits == len(waits) == 1
        assert hub.repositories[REPO].files == files(folder)

    def test_a_second_run_sends_only_what_is_missing(
        self, hub: UploadHub, folder: Path, waits: list[float]
    ) -> None:
        (folder / "model-2.safetensors").write_bytes(b"more" * 10_000)
        send_once = Fault("PUT", "/storage/", after=1000, skip=1, times=99)
        hub.faults = [send_once]
        text = fails("the connection to the Hub failed", folder)
        assert text.endswith("goes on from there: what has arrived is not sent twice")
        assert hub.repositories[REPO].commits == []
        (first,) = hub.received
        hub.faults = []
        send(folder)
        assert first not in hub.received[1:]
        assert hub.repositories[REPO].files == files(folder)
        send(folder)
        assert len(hub.received) == 2
        assert len(hub.repositories[REPO].commits) == 1

    def test_the_pipeline_that_xet_brings(
        self, hub: UploadHub, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With hf_xet, huggingface_hub uploads another way; here without files that xet takes."""
        pytest.importorskip("hf_xet")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
        hub.large = ()
        send(folder)
        there = hub.repositories[REPO]
        assert there.private
        assert there.files == files(folder)
        (folder / "config.json").write_text("{}")
        made = send(folder, create_pr=True)
        assert made.pull_request_url == f"{hub.url}/{REPO}/discussions/1"
        assert there.branches["refs/pr/1"] == files(folder)

    def test_an_xet_server_that_does_not_answer(
        self, hub: UploadHub, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("hf_xet")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
        assert "goes on from there" in fails(f"^{REPO}: ", folder)

    @pytest.mark.parametrize(
        ("method", "path", "status", "cure"),
        [
            ("POST", "/repos/create", 403, "your token or account may not write there"),
            ("POST", "/repos/create", 429, "too many requests; wait 30 seconds, and try again"),
            ("POST", "/validate-yaml", 400, ""),
            ("POST", "/preupload/", 500, "`mlx-fusekit publish` goes on from there"),
            # huggingface_hub wraps this one, which has a signed address, in another.
            ("PUT", "/storage/", 403, "your token or account may not write there"),
            ("POST", "/commit/", 409, "somebody else is changing it; try again"),
            ("POST", "/commit/", 412, "try again later"),
        ],
    )
    def test_what_the_hub_refuses_is_said(
        self,
        hub: UploadHub,
        folder: Path,
        waits: list[float],
        method: str,
        path: str,
        status: int,
        cure: str,
    ) -> None:
        body = {"error": f"No, {TOKEN}, see http://127.0.0.1/x?X-Amz-Signature=s3cret"}
        hub.faults = [Fault(method, path, status, {"Retry-After": "30"}, body, times=99)]
        said = rf"^{REPO}: the Hub answered {status} \(No, hf_…, see http://127.0.0.1/x\)"
        fails(said + (f"; {cure}" if cure else "$"), folder)
        assert all(not repository.commits for repository in hub.repositories.values())

    def test_a_revision_that_is_not_there(self, hub: UploadHub, folder: Path) -> None:
        open_repository(REPO, public=False)
        with pytest.raises(HubError, match="has no such revision; check --revision"):
            upload(folder, REPO, commit_message="Mine", revision="v9")

    def test_a_file_that_is_gone_is_no_fault_of_the_connection(
        self, hub: UploadHub, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = hub.batch

        def answer_and_remove(*request: Any, **names: str) -> None:
            (folder / WEIGHTS).unlink()
            answer(*request, **names)

        monkeypatch.setattr(hub, "batch", answer_and_remove)
        text = fails(f"^{REPO}: .*No such file.*{WEIGHTS}", folder)
        assert "connection" not in text

    def test_no_network(
        self, hub: UploadHub, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        fails(f"^{REPO}: the connection to the Hub failed", folder)

    def test_offline(self, hub: UploadHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        fails("HF_HUB_OFFLINE is set; unset it", folder)
        assert hub.requests == []
