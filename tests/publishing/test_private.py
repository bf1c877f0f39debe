"""What is private on this machine is found in every spelling, and nothing else is."""

import getpass
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from mlx_fusekit.publishing.private import Private

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"
PLACEHOLDER = "hf_" + "x" * 34


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Private:
    """Of a machine where jane's home is ``/home/jane``, and her models are in ``/data``."""
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setenv("PWD", "/mnt/disk/work")
    monkeypatch.setenv("HF_TOKEN", "aTokenOfAnotherForm")
    monkeypatch.setattr(getpass, "getuser", lambda: "jane")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/data/hub")
    monkeypatch.chdir(tmp_path)
    there = {
        "/data": ["models", "hub"],
        "/data/models": ["sql", "base"],
        "/mnt": ["data", "disk"],
        "/mnt/data": ["llama", "qwen"],
        "/mnt/disk": ["work", "adapters"],
    }
    monkeypatch.setattr(
        "mlx_fusekit.publishing.private._names_in", lambda folder: frozenset(there.get(folder, ()))
    )
    return Private.of_machine(Path("/data/models/sql"), Path("/mnt/data/llama"))


PATHS = {
    "the home": "/home/jane",
    "in the home": "/home/jane/runs/7",
    "inside a longer string": "trained in /home/jane/runs, on a laptop",
    "at the end of a sentence": "It is in /home/jane.",
    "of Markdown": "see _/home/jane_ and `x`",
    "an address": "file:///home/jane/runs",
    "an address with a host": "file://localhost/home/jane/runs",
    "an option": "--model=/home/jane/runs",
    "a compiler's flag": "-I/home/jane/include",
    "a host": "jane@box:/home/jane/runs",
    "a search path": "/usr/bin:/home/jane/bin",
    "percent-encoded": "x?path=%2Fhome%2fjane%2fruns",
    "percent-encoded twice in a row": "path%3D%2Fhome%2Fjane",
    "escaped slashes": r"{\"path\": \"\/home\/jane\/runs\"}",
    "escaped letters": r"{\"path\": \"\u002fhome\u002Fjane\"}",
    "after an escape": r"{{ '\n/home/jane/x' }}",
    "doubled slashes": "/home//jane///runs",
    "of the account": "~jane/runs",
    "of the account on macOS": "/Users/jane/runs",
    "of the account on Windows": r"C:\Users\jane\runs",
    "of the account on Windows, in JSON": r"C:\\Users\\jane\\runs",
    "of the account on WSL": "/mnt/c/Users/jane/runs",
    "the model": "/data/models/sql/config.json",
    "beside the model": "/data/models/base",
    "its source": "/mnt/data/llama",
    "the Hub's cache": "/data/hub/models--me--secret/snapshots",
    "where the command runs": "/mnt/disk/work/base",
    "beside its source": "/mnt/data/qwen",
    "beside where the command runs": "/mnt/disk/adapters",
    "where the home is": "/home/jane/../jane",
}


@pytest.mark.parametrize("text", PATHS.values(), ids=PATHS)
def test_a_path_is_found(private: Private, text: str) -> None:
    told = private.in_text(text)
    assert told is not None
    assert told.startswith("a path of this machine (")
    # As a value, and as a key, however often JSON escapes it.
    for value in ({"a": [1, {"b": text}]}, {text: 1}, [json.dumps({"b": text})]):
        for ascii_only in (True, False):
            content = json.dumps(value, ensure_ascii=ascii_only).encode()
            assert private.in_file("config.json", content) is not None


USUAL = {
    "a system's": "see /usr/share/common-licenses/Apache-2.0, /etc/hosts and /opt/conda/bin",
    "an example's": "cd /home/user/project && ls /Users/name /home/username ~/work ~user/x",
    "an address": "https://example.com/home/jane/x and http://x.org/data/models/sql",
    "a longer name": "/home/janet /home/jane-doe /home/jane_doe /home/jane.doe ~janet/x",
    "a relative path": "src/home/jane ./home/jane ../home/jane",
    "a first part": "/home /data /mnt /tmp /data/ /data/models /mnt/disk",
    "what is not beside the model": "/data/models/other, /data/other; the drive at '/mnt/data'",
    "what is not in the temporary folder": "/tmp/foo.txt /tmp/output/x /var/tmp/x",
    "a name": "jane Jane's ~jane",
    "another's": r"/home/trainer/llama C:\Users\trainer\llama /Users/trainer/x",
    "an example of a token": f"{PLACEHOLDER} hf_your_token_here hf_token",
    "part of a name": f"my{TOKEN}",
}


@pytest.mark.parametrize("text", USUAL.values(), ids=USUAL)
def test_usual_text_is_not(private: Private, text: str) -> None:
    assert private.in_text(text) is None
    assert private.in_file("config.json", json.dumps({"a": text, text: 1}).encode()) is None


def test_what_is_said_of_it(private: Private) -> None:
    text = b"one\ntwo\nin (/home/jane/a;b\x1b[31m) " + b"x" * 1000
    assert private.in_file("LICENSE", text) == "a path of this machine (/home/jane/a), in line 3"
    assert private.in_text("file:///home/jane/x.") == "a path of this machine (/home/jane/x)"
    long = json.dumps({"text_config": {"a b": ["", "\x1b/home/jane/" + "y" * 1000]}}).encode()
    told = private.in_file("config.json", long)
    assert told is not None
    assert told.endswith('y…), at "text_config.a b"')
    assert len(told) < 200


def test_a_key_that_is_there_twice(private: Private) -> None:
    assert private.in_file("config.json", b'{"a": "/home/jane", "a": "x"}') is not None


@pytest.mark.parametrize("content", [b"{'a': '/home/jane/x'", b'{"a": "\xff/home/jane/x"}'])
def test_what_is_no_json_is_text(private: Private, content: bytes) -> None:
    assert private.in_file("config.json", content) is not None
    assert private.in_file("a.txt", "\ufeff/home/jane".encode("utf-16")) is not None
    assert private.in_file("spiece.model", b"\x08\x00/home/jane/train.txt\x00") is not None


@pytest.mark.parametrize("name", ["홍길동", "zoë", "jane doe"])
def test_a_name_of_other_letters(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from unicodedata import normalize
    from urllib.parse import quote

    monkeypatch.setenv("HOME", f"/home/{normalize('NFC', name)}")
    private = Private.of_machine()
    for spelled in (name, normalize("NFD", name), quote(name), json.dumps(name).strip('"')):
        assert private.in_text(f"in /home/{spelled}/x") is not None, spelled


def test_a_home_behind_a_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "disk" / "home").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/elsewhere")
    monkeypatch.chdir("/usr")
    private = Private.of_machine()
    for home in (tmp_path / "link", tmp_path / "disk" / "home"):
        assert str(home) in private.places


def test_in_the_temporary_folder_only_what_is_there() -> None:
    here = Path(tempfile.gettempdir(), f"fusekit-{os.getpid()}")
    assert Private.of_machine().in_text(f"{here}/model") is None
    here.mkdir()
    try:
        private = Private.of_machine()
        assert private.in_text(f"in {here}.") is not None
        assert private.in_text(f"{here}/model") is not None
    finally:
        here.rmdir()


def test_a_machine_where_one_is_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """`/root` is a token of vocabularies, and root anybody's name."""
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    private = Private.of_machine()
    assert private.in_text("/root/models/llama") is not None
    assert private.in_text("/root/.cache") is not None
    for usual in ("/root", "root", "the /root of", "/root/", "~root/x", "/rooted/x", "a/root/x"):
        assert private.in_text(usual) is None, usual
    monkeypatch.setenv("HOME", "/")
    assert "/" not in Private.of_machine().places


def test_an_account_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert "" not in Private.of_machine().users


def test_vocabularies_are_no_paths(private: Private) -> None:
    tokens = {"/home/jane": 1, "/home/jane/x": 2}
    tokenizer: dict[str, Any] = {"model": {"vocab": tokens, "merges": ["/home/jane /x"]}}
    assert private.in_file("tokenizer.json", json.dumps(tokenizer).encode()) is None
    assert private.in_file("vocab.json", json.dumps(tokens).encode()) is None
    assert private.in_file("merges.txt", b"/home/jane /x\n") is None
    tokenizer["added_tokens"] = [{"content": "/home/jane/x"}]
    told = private.in_file("tokenizer.json", json.dumps(tokenizer).encode())
    assert told == 'a path of this machine (/home/jane/x), at "added_tokens.content"'


def test_a_token_of_the_hub(private: Private) -> None:
    assert private.in_text(f'token="{TOKEN}"') == "a token of the Hub (hf_…)"
    assert private.in_text("a\nb aTokenOfAnotherForm") == "your token of the Hub, in line 2"
    for token in (TOKEN, "aTokenOfAnotherForm"):
        told = private.in_file("config.json", json.dumps({"k": {token: 1}}).encode())
        assert told is not None
        assert ', at "k.' in told
        assert token not in told


def test_a_large_tokenizer_takes_a_moment(private: Private) -> None:
    vocabulary = {f"/home/token{i}": i for i in range(260_000)}
    merges = [f"/home token{i}" for i in range(260_000)]
    added = [{"content": f"<|special/{i}|>", "id": i} for i in range(5_000)]
    tokenizer = {"added_tokens": added, "model": {"vocab": vocabulary, "merges": merges}}
    content = json.dumps(tokenizer, indent=4).encode()
    assert len(content) > 15_000_000
    start = time.process_time()
    assert private.in_file("tokenizer.json", content) is None
    assert time.process_time() - start < 5


@pytest.mark.parametrize("run", ["/", "\\", "%2F", r"\u002f", "/home", "~jane", "file://", "a/"])
def test_long_runs_take_a_moment(private: Private, run: str) -> None:
    start = time.process_time()
    private.in_text(run * 200_000)
    private.in_text("/home/jane" + "." * 500_000 + "x")
    assert time.process_time() - start < 5
