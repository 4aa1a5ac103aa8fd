"""A hub on 127.0.0.1: repositories, revisions and files, as the real one has them."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """Repositories: by name, and by branch, commits of files {name: content}.

    `left` is how many bytes of files it sends until it breaks down; `sent` how many it has sent;
    `etag` what it states of files in place of their sha256.
    """

    def __init__(self):
        self.branches, self.commits = {}, {}
        self.refuses, self.broken, self.left, self.sent, self.etag = None, False, None, 0, None
        self.blobs, self.messages, self.private, self.tokens = {}, [], {}, []
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
                 "lfs": None if name.endswith((".json", ".md")) else {
                     "sha256": hashlib.sha256(content).hexdigest(), "size": len(content),
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
        etag = self.etag or hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return 200, headers, self.lies.get(name, content)

    def take(self, path, content, host):
        """Return (status, content) for what is posted, as `answer` does."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[0] == "put" and self.broken:
            return 400, {"error": "broken off"}
        if parts[0] == "put":
            self.blobs[parts[1]] = content
            return 200, {}
        if self.refuses:
            return self.refuses, {}
        if parts[-1] == "commit" or parts[-2] == "commit":
            return 200, self.commit("/".join(parts[2:4]), content, host)
        asked = json.loads(content)
        if parts == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        if parts == ["api", "repos", "create"]:
            name = f"{asked['organization']}/{asked['name']}"
            if any(known == name for known, _ in self.branches):
                return 409, {"error": "it is there", "url": f"{host}/{name}"}
            self.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self.push(name, {".gitattributes": b""})
            return 200, {"url": f"{host}/{name}"}
        if "preupload" in parts:
            kinds = {True: "lfs", False: "regular"}
            return 200, {"files": [
                {"path": f["path"], "uploadMode": kinds[f["path"].endswith(".safetensors")],
                 "shouldIgnore": False} for f in asked["files"]]}  # fmt: skip
        assert parts[-1] == "batch", path
        objects = [
            {**o, "actions": {"upload": {"href": f"{host}/put/{o['oid']}", "header": {}}}}
            for o in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repository, content, host):
        """Make a commit of the lines of JSON that the hub's library sends."""
        lines = [json.loads(line) for line in content.splitlines()]
        self.messages.append(lines[0]["value"]["summary"])
        files = dict(self.commits[repository, self.branches[repository, "main"]])
        for line in lines[1:]:
            value = line["value"]
            whole = line["key"] == "file"
            files[value["path"]] = (
                base64.b64decode(value["content"]) if whole else self.blobs[value["oid"]]
            )
        commit = self.push(repository, files)
        return {"commitOid": commit, "commitUrl": f"{host}/{repository}/commit/{commit}"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.asked.append((self.command, self.path, self.headers.get("Range")))
            if "harness" not in self.path:
                hub.tokens.append(self.headers.get("Authorization"))
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
                    self.send(content)

        def send(self, content):
            if "resolve" not in self.path or hub.left is None:
                self.wfile.write(content)
                hub.sent += len(content) * ("resolve" in self.path)
                return
            self.wfile.write(content[: hub.left])
            hub.sent, hub.left = hub.sent + hub.left, 0
            self.close_connection = True
            self.connection.close()

        do_HEAD = do_GET

        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, said = hub.take(self.path, content, f"http://{self.headers['Host']}")
            self.send_response(status)
            body = json.dumps(said).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_POST

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
