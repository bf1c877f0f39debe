"""A local server that speaks the part of the Hugging Face Hub's protocol that downloads use."""

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub:
    """Serves folders as repositories.

    ``refusals`` maps a repository to a status and error code, ``nonsense`` to the body of every
    answer, and ``answers`` a pattern of paths to a status, a body and headers, or to None where the
    connection is dropped.
    """

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.refusals: dict[str, tuple[int, str]] = {}
        self.nonsense: dict[str, bytes] = {}
        self.answers: dict[str, tuple[int, bytes, dict[str, str]] | None] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append((self.command, self.path, self.headers.get("authorization")))
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815 - the name http.server looks for

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        for pattern, answer in self.answers.items():
            if re.search(pattern, request.path):
                if answer is None:
                    request.connection.shutdown(2)
                    request.close_connection = True
                else:
                    send(request, *answer)
                return
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in self.nonsense:
            send(request, 200, self.nonsense[repo], {"Content-Type": "application/json"})
        elif repo in self.refusals or repo not in self.repositories or not rest:
            status, code = self.refusals.get(repo, (404, "RepoNotFound"))
            send(request, status, b"{}", {"X-Error-Code": code})
        elif rest[0] == "revision" and rest[1] not in ("main", "v1", COMMIT):
            send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif rest[0] == "revision":
            send_json(request, {"id": repo, "sha": COMMIT, "siblings": []})
        elif rest[0] == "tree":
            folder = self.repositories[repo]
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            send_json(request, [entry(path, path.relative_to(folder).as_posix()) for path in files])
        elif rest[0] == "resolve":
            self.send_file(request, self.repositories[repo] / "/".join(rest[2:]))
        else:
            send(request, 404, b"{}", {})

    def send_file(self, request: http.server.BaseHTTPRequestHandler, path: Path) -> None:
        if not path.is_file():
            send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        found = entry(path, path.name)
        etag = found.get("lfs", {}).get("oid") or found["oid"]
        send(request, 200, path.read_bytes(), {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})


def entry(path: Path, name: str) -> dict[str, Any]:
    """A file as the tree listing shows it; safetensors are large files, named by their SHA-256."""
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
    if path.suffix == ".safetensors":
        found["lfs"] = {
            "oid": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "pointerSize": 1,
        }
    return found


def send_json(request: http.server.BaseHTTPRequestHandler, value: Any) -> None:
    send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def send(
    request: http.server.BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
) -> None:
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
