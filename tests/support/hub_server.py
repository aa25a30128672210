"""A small Hugging Face Hub on the loopback address, with the paths and headers of the real one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PINNED = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Hub:
    """What is published: for each repository and revision its files by name."""

    url: str = ""
    repositories: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    downloaded: list[str] = field(default_factory=list)
    requests: int = 0

    def publish(self, repo: str, files: dict[str, bytes], commit: str = COMMIT) -> None:
        """Publish files under a commit, and under "main" if it is the usual one."""
        for revision in (commit, *(["main"] if commit == COMMIT else [])):
            self.repositories[repo, revision] = files


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            hub.requests += 1
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repo, what, revision = "/".join(parts[2:4]), parts[4:5], (parts[5:6] or ["main"])[0]
            else:
                repo, what, revision = "/".join(parts[:2]), ["resolve"], parts[3]
            commit = COMMIT if revision == "main" else revision
            if repo in hub.gated:
                return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            if not any(known == repo for known, _ in hub.repositories):
                return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            files = hub.repositories.get((repo, revision))
            if files is None:
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if what == ["tree"]:
                listed = [
                    {"type": "file", "path": name, "size": len(body), "oid": _etag(body)}
                    for name, body in files.items()
                ]
                return self._send(200, json.dumps(listed).encode())
            if what != ["resolve"]:
                siblings = [{"rfilename": name} for name in files]
                info = {"id": repo, "sha": commit, "siblings": siblings}
                return self._send(200, json.dumps(info).encode())
            name = "/".join(parts[4:])
            if name not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                hub.downloaded.append(name)
            etag = {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": commit}
            return self._send(200, files[name], etag)

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    return Handler


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
