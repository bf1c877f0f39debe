"""``mlx-fusekit publish`` and ``fuse --upload-repo`` as a user meets them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.hub_upload_server import TOKEN, USER, Commit, Fault, UploadHub

from mlx_fusekit import samples

REPO = f"{USER}/sql-model"
WEIGHTS = "model.safetensors"


def environment(hub: UploadHub, home: Path) -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    variables |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "COLUMNS": "80",
    }
    return variables


def run(
    hub: UploadHub, home: Path, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_fusekit", *arguments],
        capture_output=True,
        text=True,
        env=environment(hub, home) | more,
        check=False,
        timeout=120,
    )


def test_publish(hub: UploadHub, fused: Path, tmp_path: Path) -> None:
    (fused / ".env").write_text("secret")
    arguments = ("publish", "--path", str(fused), "--repo", "sql-model")
    dry = run(hub, tmp_path, *arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.startswith("---\nlibrary_name: mlx\n")
    assert "Would upload" in dry.stdout
    assert hub.writes == []
    hub.faults = [Fault("PUT", "/storage/", 503)]
    result = run(hub, tmp_path, *arguments, "--license", "mit")
    assert result.returncode == 0, result.stderr
    assert "HTTP Error 503" in result.stderr
    assert f"Uploaded to {REPO}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert ".env" in result.stdout
    again = run(hub, tmp_path, *arguments, "--licence", "apache-2.0", "--json")
    report = json.loads(again.stdout)
    assert report["license"] == "apache-2.0"
    assert report["commit"] == hub.repositories[REPO].sha("main")
    assert report["private"] is True
    for shown in (dry, result, again):
        assert TOKEN not in shown.stdout + shown.stderr
        assert "s3cret" not in shown.stdout + shown.stderr
        assert "Traceback" not in shown.stderr


def test_a_refusal_is_one_line(hub: UploadHub, fused: Path, tmp_path: Path) -> None:
    arguments = ("publish", "--path", str(fused), "--repo", "other/model")
    result = run(hub, tmp_path, *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: --repo other/model: you are me")
    assert len(result.stderr.strip().splitlines()) == 1
    debugged = run(hub, tmp_path, *arguments, FUSEKIT_DEBUG="1", HF_DEBUG="1")
    assert "Traceback" in debugged.stderr
    assert TOKEN not in debugged.stderr


def test_fuse_and_upload(hub: UploadHub, tmp_path: Path) -> None:
    fuse = (
        "fuse", "--model", str(samples.model_path()), "--adapter-path",
        str(samples.adapter_path()), "--save-path", str(tmp_path / "fused"), "--requantize",
        "nearest", "--export-gguf", "--upload-repo",
    )  # fmt: skip
    for repo, message in (
        ("a/b/c", "--upload-repo a/b/c: not a name"),
        ("other/model", "--upload-repo other/model: you are me"),
    ):
        result = run(hub, tmp_path, *fuse, repo)
        assert result.returncode == 1
        assert message in result.stderr
        assert not (tmp_path / "fused").exists()
    result = run(hub, tmp_path, *fuse, REPO, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    there = hub.repositories[REPO]
    assert there.private
    assert report["published"]["commit"] == there.sha("main")
    contents = {p.name: p.read_bytes() for p in (tmp_path / "fused").iterdir()}
    assert there.files.items() >= contents.items()
    assert there.commits == [Commit("main", "Upload fused", tuple(sorted(there.files)), ())]


def test_what_would_not_be_uploaded_is_refused_before_it_is_fused(
    hub: UploadHub, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(samples.model_path(), tmp_path / "base"))
    base.joinpath("LICENSE").write_text(f"See {base}/LICENSE.")
    fuse = ("fuse", "--model", str(base), "--adapter-path", str(samples.adapter_path()))
    target = ("--save-path", str(tmp_path / "fused"), "--requantize", "nearest")
    result = run(hub, tmp_path, *fuse, *target, "--upload-repo", REPO)
    assert result.returncode == 1
    assert f"{base}/LICENSE: tells a path of this machine (/" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert hub.writes == []
    assert not (tmp_path / "fused").exists()
    assert run(hub, tmp_path, *fuse, *target).returncode == 0


def test_a_failed_upload_leaves_the_fused_model(hub: UploadHub, tmp_path: Path) -> None:
    hub.faults = [Fault("POST", "/commit/", 409)]
    result = run(
        hub, tmp_path, "fuse", "--model", str(samples.model_path()), "--adapter-path",
        str(samples.adapter_path()), "--save-path", str(tmp_path / "fused"), "--requantize",
        "nearest", "--upload-repo", REPO,
    )  # fmt: skip
    assert result.returncode == 1
    command = f"`mlx-fusekit publish --path {tmp_path / 'fused'} --repo {REPO}` uploads it"
    assert command in result.stderr
    assert (tmp_path / "fused" / WEIGHTS).exists()


def test_an_interrupted_upload_can_go_on(hub: UploadHub, fused: Path, tmp_path: Path) -> None:
    hub.faults = [Fault("PUT", "/storage/", hang=True)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_fusekit", "publish", "--path", str(fused), "--repo", REPO],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(hub, tmp_path),
        # A job in the background of a script ignores the signal, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not hub.faults[0].hits and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "what has arrived is not sent twice" in said
    assert "Traceback" not in said
