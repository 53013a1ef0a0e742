"""A small Hugging Face hub on this machine: the endpoints that huggingface_hub asks when it downloads a model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf")  # what is stored with Git LFS


class Repo:
    """One model: files by name, under one commit. token: who may see it (None: everybody)."""

    def __init__(self, folder: Path | None = None, token: str | None = None):
        self.files = {}
        self.commit = "0123456789abcdef" * 2 + "01234567"
        self.token, self.gated = token, False
        for path in sorted(folder.rglob("*")) if folder else ():
            if path.is_file():
                self.files[path.relative_to(folder).as_posix()] = path.read_bytes()

    def checksum(self, name: str) -> str:
        data = self.files[name]
        if name.endswith(LARGE):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, name: str) -> dict:
        size = len(self.files[name])
        found = {"size": size, "oid": self.checksum(name) if not name.endswith(LARGE) else "f" * 40}
        if name.endswith(LARGE):
            found["lfs"] = {"size": size, "pointerSize": 134, "oid": self.checksum(name), "sha256": self.checksum(name)}
        return found


class Hub:
    """Repositories by name, and how the server behaves. requests: what was asked, "GET name" with its bytes' begin."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.cut_after: int | None = None  # bytes of a large file after which the connection breaks, once
        self.damage = False  # whether large files arrive with a wrong byte
        self.status: int | None = None  # answer everything with this
        self.url = ""

    def downloads(self) -> list[str]:
        return [r for r in self.requests if r.startswith("GET /") and "/resolve/" in r]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if self.hub.status is not None:
            return self.refuse(self.hub.status, "", "")
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = (found or file)[1] if found or file else ""
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if repo.token is not None and self.headers.get("Authorization") != f"Bearer {repo.token}":
            if repo.gated:
                return self.refuse(403, "GatedRepo", f"Access to model {name} is restricted")
            return self.refuse(401, "RepoNotFound", "Repository not found")
        revision = (found[3] if found else file[2]) or "main"
        if revision not in ("main", repo.commit):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if found:
            return self.say_json(self.listing(name, repo, found[2]))
        return self.send_file(repo, file[3], body)

    def listing(self, name: str, repo: Repo, kind: str | None):
        if kind == "tree":
            return [{"type": "file", "path": n, **repo.entry(n)} for n in repo.files]
        siblings = []
        for n in repo.files:
            entry = repo.entry(n)
            siblings.append({"rfilename": n, "size": entry["size"], "blobId": entry["oid"]})
            if "lfs" in entry:
                siblings[-1]["lfs"] = entry["lfs"]
        return {"id": name, "modelId": name, "sha": repo.commit, "siblings": siblings, "tags": []}

    def send_file(self, repo: Repo, name: str, body: bool) -> None:
        if name not in repo.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = repo.files[name]
        large = name.endswith(LARGE)
        start = 0
        if body and self.headers.get("Range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("ETag", f'"{repo.checksum(name)}"')
        if large:
            self.send_header("X-Linked-Etag", f'"{repo.checksum(name)}"')
            self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        if large and self.hub.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if large and self.hub.cut_after is not None:
            self.wfile.write(data[start : start + self.hub.cut_after])
            self.hub.cut_after = None
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def say_json(self, tree) -> None:
        text = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
