"""Hub ids instead of folders, against a local server that speaks the Hub's protocol."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from support.hub_server import COMMIT, Hub, entry
from support.tiny import make_adapter, make_model

from mlx_fusekit.errors import HubError
from mlx_fusekit.hub import LocalFolder, resolve
from mlx_fusekit.publishing.files import PublishedModel

TOKEN = "hf_thisIsASecretToken"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hub")
    base = make_model(folder / "tiny-4bit")
    (base / "tokenizer.json").write_text("{}")
    (base / "modeling.py").write_text("print('code')")
    (base / "training.bin").write_text("not wanted")
    adapter = make_adapter(folder / "tiny-lora", base)
    return {"owner/tiny-4bit": base, "owner/tiny-lora": adapter}


@pytest.fixture
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    server = Hub(repositories)
    yield server
    server.close()


def run(
    hub: Hub, home: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_fusekit", *arguments],
        capture_output=True,
        text=True,
        env=variables(hub, home) | environment,
        check=False,
        timeout=120,
    )


def variables(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process for which this is the Hub."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {**others, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}


BASE_AND_ADAPTER = ("--model", "owner/tiny-4bit", "--adapter-path", "owner/tiny-lora")
FUSE = ("fuse", *BASE_AND_ADAPTER, "--requantize", "nearest", "--save-path")


def test_ids_are_downloaded_and_recorded(
    hub: Hub, tmp_path: Path, repositories: dict[str, Path]
) -> None:
    result = run(
        hub, tmp_path / "home", *FUSE, str(tmp_path / "fused"), "--json", "--revision", "v1"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["base"], report["revision"]) == ("owner/tiny-4bit", COMMIT)
    recipe = json.loads((tmp_path / "fused" / "fusekit.json").read_text())
    assert recipe["base"]["revision"] == COMMIT
    assert recipe["adapters"][0]["id"] == "owner/tiny-lora"
    digest = hashed(repositories["owner/tiny-4bit"] / "model.safetensors")
    assert recipe["base"]["sha256"]["model.safetensors"] == digest
    wanted = {path for _, path, _ in hub.requests if "resolve" in path}
    assert not any(path.endswith((".py", ".bin")) for path in wanted)
    assert any(token == f"Bearer {TOKEN}" for _, _, token in hub.requests)
    assert TOKEN not in result.stdout + result.stderr
    # The snapshot's files are links to blobs; the result has files of its own.
    assert not any(path.is_symlink() for path in (tmp_path / "fused").iterdir())
    assert (tmp_path / "fused" / "tokenizer.json").read_text() == "{}"


def test_all_that_belongs_to_a_model_arrives_and_goes_on(hub: Hub, tmp_path: Path) -> None:
    """Downloading, copying and publishing agree: a use policy is not lost on the way."""
    base = make_model(tmp_path / "base")
    names = {
        "USE_POLICY.md",
        "LICENCE",
        "LICENSE.txt",
        "NOTICE",
        "spiece.model",
        "source.vocab",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "generation_config.json",
    }
    (base / "additional_chat_templates").mkdir()
    for name in names:
        (base / name).write_text("{}" if name.endswith("json") else f"text of {name}")
    hub.repositories = {**hub.repositories, "owner/whole": base}
    target = tmp_path / "fused"
    result = run(
        hub, tmp_path / "home", "fuse", "--model", "owner/whole", "--adapter-path",
        "owner/tiny-lora", "--save-path", str(target),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for name in names:
        assert (target / name).read_bytes() == (base / name).read_bytes(), name
    assert names <= set(PublishedModel.open(target).names)


def hashed(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_offline_uses_the_cache(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert run(hub, home, *FUSE, str(tmp_path / "one")).returncode == 0
    count = len(hub.requests)
    result = run(hub, home, *FUSE, str(tmp_path / "two"), HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert len(hub.requests) == count
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_the_cache_is_not_written_to(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert run(hub, home, *FUSE, str(tmp_path / "one")).returncode == 0
    blobs = {p: p.read_bytes() for p in home.rglob("blobs/*")}
    assert run(hub, home, *FUSE, str(tmp_path / "two")).returncode == 0
    assert {p: p.read_bytes() for p in home.rglob("blobs/*")} == blobs
    snapshot = next(home.glob("hub/models--owner--tiny-4bit/snapshots/*"))
    result = run(hub, home, *FUSE, str(snapshot), "--overwrite")
    assert result.returncode == 1
    assert {p: p.read_bytes() for p in home.rglob("blobs/*")} == blobs


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((404, "RepoNotFound"), "no such repository on the Hub"),
        ((401, "RepoNotFound"), "no such repository on the Hub"),
        ((403, "GatedRepo"), "access is gated"),
        ((401, "Unauthorized"), "log in with|no such repository"),
        ((403, "Forbidden"), "the Hub answered 403"),
        ((500, "Internal"), "the Hub answered 500; try again later"),
    ],
)
def test_what_the_hub_refuses_is_said(
    hub: Hub, tmp_path: Path, refusal: tuple[int, str], message: str
) -> None:
    import re

    hub.refusals["owner/tiny-4bit"] = refusal
    result = run(hub, tmp_path / "home", *FUSE, str(tmp_path / "fused"))
    assert result.returncode == 1
    assert re.search(message, result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert TOKEN not in result.stderr
    assert not (tmp_path / "fused").exists()


def test_an_unknown_revision_is_said(hub: Hub, tmp_path: Path) -> None:
    result = run(hub, tmp_path / "home", *FUSE, str(tmp_path / "fused"), "--revision", "v9")
    assert result.returncode == 1
    assert "--revision v9: owner/tiny-4bit has no such revision" in result.stderr


def test_what_cannot_be_the_name_of_a_repository_is_said() -> None:
    with pytest.raises(HubError, match=r"--model owner/a--b: no name of a repository"):
        resolve("owner/a--b")
    for long in ("a" * 300, f"{'a' * 300}/b", "a/" * 3000):
        with pytest.raises(HubError, match=r"--model a") as refused:
            resolve(long)
        assert "\n" not in str(refused.value)


def test_a_revision_of_a_folder_makes_no_sense(
    hub: Hub, tmp_path: Path, repositories: dict[str, Path]
) -> None:
    folder = str(repositories["owner/tiny-4bit"])
    result = run(hub, tmp_path, "fuse", "--model", folder, "--revision", "v1")
    assert result.returncode == 1
    assert "drop the flag" in result.stderr


def test_an_answer_that_makes_no_sense_is_said(hub: Hub, tmp_path: Path) -> None:
    bodies = [b"", b"{}", b"[]", b"null", b"no JSON", b"\xff\xfe", b"9" * 5000, b"[" * 100_000]
    bodies += [
        json.dumps({"id": "a/b", "sha": "1" * 40, "siblings": []} | wrong).encode()
        for wrong in (
            {"id": 1, "sha": 2},
            {"sha": None},
            {"siblings": 3},
            {"siblings": [{"rfilename": 7}]},
            {"siblings": [None]},
        )
    ]
    hub.nonsense = {f"owner/{place}": body for place, body in enumerate(bodies)}
    code = (
        "from mlx_fusekit import hub\n"
        "from mlx_fusekit.errors import HubError\n"
        f"for place in range({len(bodies)}):\n"
        "    try: hub.resolve(f'owner/{place}')\n"
        "    except HubError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=variables(hub, tmp_path),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(bodies)
    for place, line in enumerate(lines):
        assert line.startswith(f"--model owner/{place}: the Hub's answer makes no sense (")


def test_no_network_is_said(hub: Hub, tmp_path: Path) -> None:
    result = run(hub, tmp_path, *FUSE, str(tmp_path / "f"), HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "cannot be reached" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# --- answers that make no sense ------------------------------------------------------------------

TINY = "owner/tiny-4bit"
ODD = {
    "nothing": b"",
    "no JSON": b"<html>maintenance</html>",
    "half": b'{"sha": "12',
    "null": b"null",
    "a list": b"[]",
    "a list of null": b"[null]",
    "an empty object": b"{}",
    "too deep": b"[" * 100_000,
    "other types": json.dumps({"id": 7, "sha": [7], "siblings": 7, "error": [7]}).encode(),
    "other entries": json.dumps([{"type": "file", "path": 7, "size": "x", "oid": []}]).encode(),
}
ANSWERS = [*((200, what) for what in ODD), (500, "a list"), (500, "no JSON"), (404, "no JSON")]


@pytest.fixture
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A Hub that this process talks to, with an empty cache."""
    constants = huggingface_hub.constants
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    clock = type("Clock", (), {"sleep": staticmethod(lambda _: None), "time": time.time})
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def refused(tmp_path: Path, message: str = TINY) -> None:
    """Resolving must fail with one line, and write nothing outside the cache."""
    with pytest.raises(HubError, match=message) as caught:
        resolve(TINY)
    text = str(caught.value)
    assert text.startswith(f"--model {TINY}")
    assert "\n" not in text
    assert TOKEN not in text
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])
    assert {path.name for path in tmp_path.glob("cache/*")} <= {"hub"}


def test_what_no_repository_is_called(online: Hub) -> None:
    with pytest.raises(HubError, match="--model owner/a--b: no name of a repository"):
        resolve("owner/a--b")
    assert online.requests == []


@pytest.mark.parametrize(("status", "odd"), ANSWERS)
@pytest.mark.parametrize("request_", ["/revision/", "/tree/"])
def test_an_answer_that_makes_no_sense(
    online: Hub, tmp_path: Path, request_: str, status: int, odd: str
) -> None:
    online.answers[request_] = (status, ODD[odd], {"Content-Type": "application/json"})
    try:
        found = resolve(TINY)
    except HubError:
        refused(tmp_path)
    else:  # a listing of nothing is one
        assert odd in ("a list", "an empty object")
        assert list(found.path.glob("*")) == []


def test_no_answer_at_all(online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_fusekit.hub._TIMEOUT", 0.1)
    monkeypatch.setattr(online, "answer", lambda _: time.sleep(0.5))
    refused(tmp_path, "the Hub cannot be reached")


@pytest.mark.parametrize(
    "path",
    ["../../../../../out.json", "/out.json", "a/../../../../../out.json", "", "..", "a\0b.json"],
)
def test_a_listing_with_a_way_out(online: Hub, tmp_path: Path, path: str) -> None:
    listed = [{"type": "file", "path": path, "size": 2, "oid": "1" * 40}]
    online.answers["/tree/"] = (200, json.dumps(listed).encode(), {})
    headers = {"ETag": f'"{"1" * 40}"', "X-Repo-Commit": COMMIT}
    online.answers["/resolve/"] = (200, b"{}", headers)
    try:
        assert list(resolve(TINY).path.glob("*")) == []  # of no name that is taken
    except HubError:
        refused(tmp_path)
    assert not list(tmp_path.rglob("out.json"))
    assert not Path("/out.json").exists()


def test_a_damaged_file_is_refused_and_removed(
    online: Hub, tmp_path: Path, repositories: dict[str, Path]
) -> None:
    """huggingface_hub compares sizes; the recipe names what was read by its SHA-256."""
    weights = repositories[TINY] / "model.safetensors"
    found = entry(weights, weights.name)
    damaged = bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:]
    headers = {"ETag": f'"{found["lfs"]["oid"]}"', "X-Repo-Commit": COMMIT}
    online.answers["/resolve/.*model.safetensors"] = (200, damaged, headers)
    refused(tmp_path, "model.safetensors arrived damaged .* and was removed")
    online.answers.clear()
    arrived = resolve(TINY).path / weights.name
    assert arrived.read_bytes() == weights.read_bytes()
    # What was there before is not read again, though it may be damaged since.
    arrived.resolve().write_bytes(damaged)
    assert resolve(TINY).path / weights.name == arrived


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("short", "arrived damaged"),
        ("refused", "the Hub answered 500; try again later"),
        ("dropped", "could not be downloaded"),
        ("loop", "could not be downloaded"),
    ],
)
def test_a_file_that_does_not_arrive(
    online: Hub, tmp_path: Path, repositories: dict[str, Path], answer: str, message: str
) -> None:
    found = entry(repositories[TINY] / "model.safetensors", "model.safetensors")
    headers = {"ETag": f'"{found["lfs"]["oid"]}"', "X-Repo-Commit": COMMIT}
    online.answers["/resolve/.*model.safetensors"] = {
        "short": (200, b"short", headers),
        "refused": (500, b"no", {}),
        "dropped": None,
        "loop": (302, b"", {"Location": f"/{TINY}/resolve/main/model.safetensors"}),
    }[answer]
    refused(tmp_path, message)
    online.answers.clear()
    assert (resolve(TINY).path / "model.safetensors").stat().st_size == found["size"]


# --- folders here -----------------------------------------------------------------------------


def test_a_folder_is_named_by_its_last_part_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    found = resolve(tmp_path / "mine")
    assert found == LocalFolder(tmp_path / "mine")
    assert found.public_name == "mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert resolve(".").public_name == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/mine").path == tmp_path / "mine"


def test_a_snapshot_of_the_cache_is_known_by_its_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--tiny-4bit" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        found = resolve(path)
        assert (found.path, found.repo_id, found.revision) == (path, "owner/tiny-4bit", COMMIT)
        assert found.public_name == "owner/tiny-4bit"
    data = tmp_path / "datasets--owner--text" / "snapshots" / COMMIT
    data.mkdir(parents=True)
    assert resolve(data).repo_id is None
