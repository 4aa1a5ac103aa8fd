"""A hub on 127.0.0.1: repositories, revisions and files, as the real one has them."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """Repositories: by name, and by branch, commits of files {name: content}."""

    def __init__(self):
        self.branches, self.commits = {}, {}
        self.asked, self.status, self.lies, self.kind = [], {}, {}, None

    def push(self, repository, files, branch="main"):
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.branches[repository, branch] = commit
        self.commits[repository, commit] = files
        return commit

    def commit_of(self, repository, revision):
        if (repository, revision) in self.commits:
            return revision
        return self.branches.get((repository, revision))

    def answer(self, path):
        """Return (status, headers, content) for a path."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, revision = "/".join(parts[2:4]), "/".join(parts[5:]) or "main"
            if repository in self.status:
                return self.status[repository], {"X-Error-Code": "GatedRepo"}, b"{}"
            if not any(name == repository for name, _ in self.branches):
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            commit = self.commit_of(repository, revision)
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            if self.kind:
                return 200, {"Content-Type": self.kind}, b"<html>"
            files = self.commits[repository, commit]
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": "0" * 40,
                 "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content),
                         "pointerSize": 1}}
                for name, content in files.items()
            ]  # fmt: skip
            facts = {"id": repository, "sha": commit, "siblings": siblings, "tags": [],
                     "downloads": 0, "likes": 0, "private": False}  # fmt: skip
            return 200, {"Content-Type": "application/json"}, json.dumps(facts).encode()
        repository, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        commit = self.commit_of(repository, revision)
        content = self.commits.get((repository, commit), {}).get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return 200, headers, self.lies.get(name, content)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.asked.append((self.command, self.path, self.headers.get("Range")))
            status, headers, content = hub.answer(self.path)
            wanted = self.headers.get("Range")
            if wanted and status == 200:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                status, content = 206, content[start:]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("CMTOOL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    server.shutdown()
    server.server_close()
