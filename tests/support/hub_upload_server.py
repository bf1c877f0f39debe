"""A local server that speaks the part of the Hugging Face Hub's protocol that uploads use."""

import base64
import contextlib
import fnmatch
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_server import send, send_json

TOKEN = "hf_aTokenThatMustNotBeSeen"
USER = "me"
Handler = http.server.BaseHTTPRequestHandler


@dataclass
class Commit:
    """What a commit said, and where to."""

    revision: str
    summary: str
    added: tuple[str, ...]
    deleted: tuple[str, ...]


@dataclass
class Repository:
    """A model repository: its branches with their files."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[Commit] = field(default_factory=list)
    pull_requests: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]

    def sha(self, branch: str) -> str:
        text = repr(sorted(self.branches[branch].items())) + str(len(self.commits))
        return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests of a kind, after the first ``skip``.

    ``status`` is the answer, whose ``body`` is sent as JSON, or as it is where it is bytes. None
    drops the connection after ``after`` bytes of the request's body, and ``hang`` before that waits
    until the Hub is closed.
    """

    method: str
    path: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = field(default_factory=dict)
    after: int = 0
    hang: bool = False
    skip: int = 0
    times: int = 1
    hits: int = 0


class UploadHub:
    """A Hub that takes models; what was sent to it can be looked at.

    ``large`` are patterns of files that go to large file storage.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.large = ("*.safetensors", "*.gguf")
        self.account: dict[str, Any] = {
            "type": "user",
            "name": USER,
            "orgs": [{"name": "team"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.received: list[tuple[str, int]] = []
        self.unauthorized: list[str] = []
        self.closed = threading.Event()
        hub = self

        class Server(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                hub.answer(self)

            do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - names http.server looks for

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def count(self, method: str, path: str) -> int:
        """How many requests of a kind came."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    @property
    def writes(self) -> list[tuple[str, str]]:
        """Requests that change something, or send content."""
        asking = ("/preupload/", "/validate-yaml")
        return [
            (method, path)
            for method, path in self.requests
            if method in ("POST", "PUT") and not any(part in path for part in asking)
        ]

    def answer(self, request: Handler) -> None:
        path = unquote(request.path)
        self.requests.append((request.command, path))
        for fault in self.faults:
            if fault.method == request.command and re.search(fault.path, path) and fault.times:
                if fault.skip:
                    fault.skip -= 1
                    break
                fault.times -= 1
                fault.hits += 1
                self.fail(request, fault)
                return
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = read_chunks(request)
        self.route(request, urlsplit(path).path.strip("/"), body)

    def fail(self, request: Handler, fault: Fault) -> None:
        if fault.status is None:
            if fault.hang:
                self.closed.wait(60)
            if fault.after:
                request.rfile.read(fault.after)
            with contextlib.suppress(OSError):
                request.connection.shutdown(2)
            request.close_connection = True
            return
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        body = fault.body if isinstance(fault.body, bytes) else json.dumps(fault.body).encode()
        send(request, fault.status, body, fault.headers)

    def route(self, request: Handler, path: str, body: bytes) -> None:
        name = r"(?P<repo>[^/]+/[^/]+)"
        routes: dict[str, Callable[..., None]] = {
            r"api/whoami-v2": self.whoami,
            r"api/repos/create": self.create,
            r"api/validate-yaml": self.validate,
            rf"api/models/{name}(/revision/(?P<revision>.+))?": self.info,
            rf"api/models/{name}/tree/(?P<revision>.+)": self.tree,
            rf"api/models/{name}/branch/(?P<branch>.+)": self.branch,
            rf"api/models/{name}/preupload/(?P<revision>.+)": self.preupload,
            rf"api/models/{name}/commit/(?P<revision>.+)": self.commit,
            rf"api/models/{name}/discussions": self.discuss,
            rf"api/models/{name}/discussions/(?P<number>\d+)": self.discussion,
            rf"{name}\.git/info/lfs/objects/batch": self.batch,
            rf"{name}/resolve/(?P<revision>.+)/(?P<file>[^/]+)": self.resolve,
            r"storage/(?P<oid>[0-9a-f]{64})": self.store,
            r"verify": self.verify,
        }
        for pattern, answer in routes.items():
            if (found := re.fullmatch(pattern, path)) is not None:
                signed = path.startswith("storage/")
                if not signed and request.headers.get("authorization") != f"Bearer {TOKEN}":
                    self.unauthorized.append(path)
                groups = found.groupdict()
                if (repo := groups.get("repo")) is not None and repo not in self.repositories:
                    send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
                else:
                    answer(request, body, **groups)
                return
        send(request, 404, b"{}", {})

    def whoami(self, request: Handler, body: bytes) -> None:
        if request.headers.get("authorization") == f"Bearer {TOKEN}":
            send_json(request, self.account)
        else:
            send(request, 401, b'{"error": "Invalid credentials"}', {})

    def create(self, request: Handler, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.url}/{repo}"}
        if repo in self.repositories:
            send(request, 409, json.dumps(url | {"error": "exists"}).encode(), {})
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.repositories[repo] = Repository(private)
        send_json(request, url)

    def validate(self, request: Handler, body: bytes) -> None:
        send_json(request, {"errors": [], "warnings": []})

    def info(self, request: Handler, body: bytes, repo: str, revision: str | None) -> None:
        found = self.repositories[repo]
        sha = found.sha(revision or "main")
        send_json(request, {"id": repo, "sha": sha, "private": found.private, "siblings": []})

    def tree(self, request: Handler, body: bytes, repo: str, revision: str) -> None:
        files = self.repositories[repo].branches.get(revision)
        if files is None:
            send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        send_json(
            request,
            [
                {"type": "file", "path": name, "size": len(data), "oid": blob(data)}
                for name, data in files.items()
            ],
        )

    def branch(self, request: Handler, body: bytes, repo: str, branch: str) -> None:
        branches = self.repositories[repo].branches
        if branch in branches:
            send(request, 409, b'{"error": "exists"}', {})
            return
        branches[branch] = dict(branches["main"])
        send_json(request, {})

    def preupload(self, request: Handler, body: bytes, repo: str, revision: str) -> None:
        files = self.repositories[repo].branches.get(revision)
        if files is None:
            send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        answers = []
        for file in json.loads(body)["files"]:
            large = any(fnmatch.fnmatch(file["path"], pattern) for pattern in self.large)
            there = files.get(file["path"])
            answer = {
                "path": file["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            if there is not None:
                answer["oid"] = hashlib.sha256(there).hexdigest() if large else blob(there)
            answers.append(answer)
        send_json(request, {"files": answers})

    def batch(self, request: Handler, body: bytes, repo: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.objects:
                answer["actions"] = {
                    "upload": {
                        "href": f"{self.url}/storage/{entry['oid']}?X-Amz-Signature=s3cretSignature"
                    },
                    "verify": {"href": f"{self.url}/verify"},
                }
            objects.append(answer)
        send_json(request, {"transfer": "basic", "objects": objects})

    def store(self, request: Handler, body: bytes, oid: str) -> None:
        self.received.append((oid, len(body)))
        if hashlib.sha256(body).hexdigest() != oid:
            send(request, 400, b"{}", {})
            return
        self.objects[oid] = body
        send(request, 200, b"", {})

    def verify(self, request: Handler, body: bytes) -> None:
        known = json.loads(body)["oid"] in self.objects
        send(request, 200 if known else 404, b"{}", {})

    def commit(self, request: Handler, body: bytes, repo: str, revision: str) -> None:
        found = self.repositories[repo]
        if revision not in found.branches:
            send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        lines = [json.loads(line) for line in body.splitlines()]
        answer: dict[str, Any] = {}
        if "create_pr" in parse_qs(urlsplit(request.path).query):
            revision = self.open_pull_request(repo, lines[0]["value"]["summary"])
            number = len(found.pull_requests)
            answer["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{number}"
        added, deleted, files = [], [], dict(found.branches[revision])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                added.append(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
                added.append(value["path"])
            else:
                del files[value["path"]]
                deleted.append(value["path"])
        found.branches[revision] = files
        summary = lines[0]["value"]["summary"]
        found.commits.append(Commit(revision, summary, tuple(added), tuple(deleted)))
        sha = found.sha(revision)
        answer |= {"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha}
        send_json(request, answer)

    def open_pull_request(self, repo: str, title: str) -> str:
        found = self.repositories[repo]
        found.pull_requests.append(title)
        reference = f"refs/pr/{len(found.pull_requests)}"
        found.branches[reference] = dict(found.files)
        return reference

    def discuss(self, request: Handler, body: bytes, repo: str) -> None:
        self.open_pull_request(repo, json.loads(body)["title"])
        send_json(request, {"num": len(self.repositories[repo].pull_requests)})

    def discussion(self, request: Handler, body: bytes, repo: str, number: str) -> None:
        send_json(
            request,
            {
                "title": self.repositories[repo].pull_requests[int(number) - 1],
                "num": int(number),
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "draft",
                "repo": {"name": repo, "type": "model"},
                "isPullRequest": True,
                "events": [],
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
            },
        )

    def resolve(self, request: Handler, body: bytes, repo: str, revision: str, file: str) -> None:
        files = self.repositories[repo].branches.get(revision)
        if files is None or file not in files:
            code = "RevisionNotFound" if files is None else "EntryNotFound"
            send(request, 404, b"", {"X-Error-Code": code})
            return
        headers = {
            "ETag": f'"{blob(files[file])}"',
            "X-Repo-Commit": self.repositories[repo].sha(revision),
        }
        send(request, 200, files[file], headers)


def blob(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def read_chunks(request: Handler) -> bytes:
    """A body that came in pieces."""
    pieces = []
    while size := int(request.rfile.readline().split(b";")[0], 16):
        pieces.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(pieces)
