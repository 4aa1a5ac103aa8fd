"""The server: what it refuses, and that it lives on."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch

from cmtool.errors import UserError
from cmtool.page import server
from cmtool.page.desk import Interrupted
from cmtool.page.server import FILES, STATIC, _no_memory, listening
from tests.page.conftest import Site, text

MASK = bytes(32) + b"\xff" * 32


def png_header(w, h):
    """A PNG that says it is large, and holds nothing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IDAT5\xaf\x06\x1e"


def ask(page, digit, **more):
    return page.post("edit", {"edit": "inpaint", "picture": text(digit), "mask": text(MASK)} | more)


def test_an_edit_is_answered(page, digit):
    answer = ask(page, digit, seed=3).json()
    assert answer["answers"][0]["command"].startswith("cmtool edit inpaint picture.png --mask")


def test_the_page_asks_for_nothing_outside_itself():
    """No fonts, no scripts, no counters of others: it works without the network."""
    for name, _ in FILES.values():
        content = (STATIC / name).read_text()
        assert not re.search(
            r"(https?:)?//(?!www\.w3\.org/2000/svg)\w", content.replace("// ", "")
        ), name
    assert {name for name, _ in FILES.values()} == {path.name for path in STATIC.iterdir()}


def test_every_answer_says_that_other_sites_have_no_part_in_it(page):
    for path in ("", "page.js", "about", "nothing"):
        headers = page.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "static/index.html",
        "file=/etc/passwd", "example/../../x", "page.js/../../desk.py", "desk.py", "example/x",
        "example/" + "9" * 5000,
    ],
)  # fmt: skip
def test_no_file_can_be_asked_for(path, page):
    raw = socket.create_connection(page.host.split(":"))
    with raw:  # as it is: a client would tidy the path up
        lines = (
            f"GET /{path} HTTP/1.1",
            f"Host: {page.host}",
            "X-Tab: 1",
            "Connection: close",
            "",
            "",
        )
        raw.sendall("\r\n".join(lines).encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404"), answer
    assert b"root:" not in answer


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1:1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_other_sites_are_sent_away(headers, page):
    answer = page.get("about", headers=headers)
    assert answer.status_code == 403
    assert answer.json()["hint"]


def test_a_form_of_another_site_is_no_request(page, digit):
    answer = page.post("edit", data=b"{}", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["what"]) == (400, "the request is not JSON")


@pytest.mark.parametrize(
    "content",
    [
        png_header(60_000, 60_000),
        b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>",
        b"just some text",
        b"",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
    ],
)
def test_a_file_that_is_no_picture_is_refused(content, page):
    answer = page.post("picture", data=content)
    assert answer.status_code == 400
    assert set(answer.json()) == {"what", "hint"}
    assert page.get("about").ok


def test_a_file_that_is_too_large_is_cut_off(page, monkeypatch):
    monkeypatch.setattr(server, "MAX_UPLOAD", 1000)
    answer = page.post("picture", data=bytes(2000))
    assert answer.json()["what"] == "the file is too large"
    assert page.get("about").ok


@pytest.mark.parametrize(
    "change",
    [
        {"picture": "?"}, {"picture": 5}, {"seed": -1}, {"seed": 1.5}, {"seed": 2**40},
        {"steps": [0]}, {"steps": [1] * 9}, {"steps": []}, {"steps": [41]},
        {"variations": 1000}, {"amount": "a"}, {"more": 1},
        {"label": -1}, {"edit": ["inpaint"]},
    ],
)  # fmt: skip
def test_a_request_of_another_shape_is_explained(change, page, digit):
    answer = ask(page, digit, **change)
    assert answer.status_code == 400, answer.text
    assert next(iter(change)) in answer.json()["what"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"picture": NaN}', b"\xff", b"[" * 10**5]
)
def test_so_is_one_that_is_no_json(content, page):
    answer = page.post("edit", data=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


def test_what_does_not_come_from_the_page_is_sent_away(page, digit):
    """A picture or a form of another site can carry no header of its own choice."""
    for path in ("about", "example/3", "picture"):
        answer = page.get(path, headers={"X-Tab": None})
        assert answer.status_code == 403
    assert page.get("", headers={"X-Tab": None}).ok


def test_twenty_clicks_a_second_in_two_tabs_end_in_two_answers(page, digit):
    def click(number):
        time.sleep(number / 20)
        body = {"edit": "inpaint", "picture": text(digit), "mask": text(MASK), "steps": [20]}
        return post(page, body, str(number % 2)).status_code

    with ThreadPoolExecutor(40) as pool:
        codes = list(pool.map(click, range(40)))
    assert set(codes) <= {200, 409}
    assert codes[-2:] == [200, 200]
    assert page.get("about").ok


BODY = {"edit": "inpaint", "picture": ""}


def post(page, body, tab, path="edit", timeout=60):
    address = f"http://{page.host}/{path}"
    return requests.post(address, json=body, headers={"X-Tab": tab}, timeout=timeout)


class SlowDesk:
    """Its edits wait until they may go on, or are interrupted; its examples are our mistake."""

    harmed = samples = morph = None

    def __init__(self):
        self.interrupt, self.closing = threading.Event(), threading.Event()
        self.may_go_on = threading.Event()
        self.begun = self.done = 0

    def about(self):
        return {}

    def example(self, index):
        raise ZeroDivisionError

    def edit(self, asked):
        self.begun += 1
        while not self.may_go_on.wait(0.01):
            if self.interrupt.is_set() or self.closing.is_set():
                raise Interrupted("interrupted", "again")
        self.done += 1
        return {"seed": asked.seed}


@pytest.fixture
def slow():
    desk = SlowDesk()
    with Site(desk) as page, ThreadPoolExecutor(64) as pool:
        yield desk, page, pool
        desk.may_go_on.set()


def wait_for(what):
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def test_few_wait_for_the_model_and_the_others_are_told(slow):
    desk, page, pool = slow
    most = server.MAX_WAITING + 1
    jobs = [pool.submit(post, page, BODY, f"tab{number}") for number in range(40)]
    wait_for(lambda: sum(job.done() for job in jobs) == 40 - most)
    desk.may_go_on.set()
    codes = [job.result().status_code for job in jobs]
    assert (codes.count(503), codes.count(200)) == (40 - most, most)
    assert desk.done == most


def test_a_newer_request_of_a_tab_takes_the_place_of_an_older_one(slow):
    desk, page, pool = slow
    jobs = []
    for tab, seed in (("a", 0), ("b", 1), ("b", 2), ("b", 3)):
        jobs.append(pool.submit(post, page, BODY | {"seed": seed}, tab))
        time.sleep(0.3)
    desk.may_go_on.set()
    assert [job.result().status_code for job in jobs] == [200, 409, 409, 200]
    assert jobs[-1].result().json() == {"seed": 3}
    assert desk.done == 2


def test_it_ends_the_work_for_an_older_one_too(slow):
    desk, page, pool = slow
    older = pool.submit(post, page, BODY | {"seed": 1}, "a")
    wait_for(lambda: desk.begun == 1)
    newer = pool.submit(post, page, BODY | {"seed": 2}, "a")
    assert older.result().status_code == 409
    desk.may_go_on.set()
    assert newer.result().json() == {"seed": 2}


def test_work_that_nobody_waits_for_any_more_ends(slow):
    """A tab that was closed: its work, and its place in the line."""
    desk, page, _ = slow
    for number in range(30):  # more than may wait
        with pytest.raises(requests.Timeout):
            post(page, BODY, f"closed{number}", timeout=0.2)
    time.sleep(0.5)
    desk.may_go_on.set()
    assert post(page, BODY, "open").ok
    assert desk.done == 1


def test_a_mistake_of_ours_does_not_end_the_server(slow):
    _, page, _ = slow
    answer = page.get("example/1")
    assert (answer.status_code, set(answer.json())) == (500, {"what", "hint"})
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page.client.close()  # the server closes the connection too, and a client may not know it yet
    assert page.get("about").json() == {}


def test_a_signal_ends_the_work_and_the_server_at_once(tmp_path):
    """Also while requests work and wait, and an upload is half done."""
    command = [sys.executable, "-m", "cmtool", "edit", "page", "-c", "digits-cd", "--port", "0"]
    started = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    host = started.stdout.readline().strip().removeprefix("http://").rstrip("/")
    body = {
        "edit": "outpaint", "picture": text(bytes(192)), "amount": 8, "steps": [40],
        "variations": 8,
    }  # fmt: skip

    def ask(tab):
        address = f"http://{host}/edit"
        with contextlib.suppress(requests.RequestException):
            requests.post(address, json=body, headers={"X-Tab": tab}, timeout=60)

    with ThreadPoolExecutor(4) as pool, socket.create_connection(host.split(":")) as half:
        head = f"POST /picture HTTP/1.1\r\nHost: {host}\r\nX-Tab: h\r\nContent-Length: 9999\r\n\r\n"
        half.sendall(head.encode())
        for tab in "abc":
            pool.submit(ask, tab)
        time.sleep(2)
        begun = time.monotonic()
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=60)
        assert time.monotonic() - begun < 10
    assert started.returncode == 0, said
    assert "Traceback" not in said
    assert said.endswith("The page is closed.\n")


def test_a_shared_page_lies_under_its_key(desk):
    with Site(desk, key="secret") as page:
        assert page.get("").status_code == 404
        assert page.get("about").status_code == 404
        assert page.get("secrets/about").status_code == 404
        assert page.get("secret/", headers={"Host": "box.lan:1"}).ok
        assert page.get("secret/about").json()["model"] == "digits-cd"


def test_a_port_that_is_taken_is_said():
    with (
        listening("127.0.0.1", 0) as taken,
        pytest.raises(UserError, match="address already in use"),
    ):
        listening("127.0.0.1", taken.getsockname()[1])


def test_a_lack_of_memory_is_told_as_one():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    answer = asyncio.run(_no_memory(None, full))
    assert answer.status_code == 503
    assert json.loads(answer.body)["what"] == "out of memory"
    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(_no_memory(None, RuntimeError("a bug")))
