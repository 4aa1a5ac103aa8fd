"""A server on 127.0.0.1 that has one file, and cuts, refuses and redirects as it is told."""

import contextlib
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site:
    """What the server has and does, and what it was asked for."""

    def __init__(self):
        self.content, self.tag = CONTENT, '"one"'
        self.cuts, self.answers, self.target = [], [], ""
        self.ranges, self.sent, self.kind, self.has_ranges = [], 0, "application/octet-stream", True
        self.length, self.pause = None, 0.0
        self.is_chunked = False
        """Whether an answer comes in chunks, and does not say its length."""


@pytest.fixture
def site():
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            site.ranges.append(self.headers.get("Range"))
            if site.answers:
                status, headers = site.answers.pop(0)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start, wanted = 0, self.headers.get("Range")
            same = self.headers.get("If-Range") == site.tag
            if wanted and same and site.has_ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(site.content):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                end = len(site.content)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
            else:
                self.send_response(200)
            body = site.content[start:]
            self.send_header("ETag", site.tag)
            self.send_header("Content-Type", site.kind)
            if site.is_chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(site.length or len(body)))
            self.end_headers()
            is_cut = bool(site.cuts)
            body = body[: site.cuts.pop(0)] if is_cut else body
            site.sent += len(body)
            with contextlib.suppress(OSError):  # who asked was killed
                for at in range(0, len(body), 1 << 16):
                    block = body[at : at + (1 << 16)]
                    framed = b"%x\r\n%b\r\n" % (len(block), block)
                    self.wfile.write(framed if site.is_chunked else block)
                    time.sleep(site.pause)
                if site.is_chunked and not is_cut:
                    self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}/model.pt"
    yield site
    server.shutdown()
    server.server_close()
