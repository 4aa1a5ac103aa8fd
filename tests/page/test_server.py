"""The server: what it refuses, and that it lives on."""

import re
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from cmtool.errors import UserError
from cmtool.page import server
from cmtool.page.server import FILES, STATIC, listening
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
    ],
)  # fmt: skip
def test_no_file_can_be_asked_for(path, page):
    raw = socket.create_connection(page.host.split(":"))
    with raw:  # as it is: a client would tidy the path up
        raw.sendall(
            f"GET /{path} HTTP/1.1\r\nHost: {page.host}\r\nConnection: close\r\n\r\n".encode()
        )
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
        {"steps": [0]}, {"steps": [1] * 9}, {"variations": 1000}, {"amount": "a"}, {"more": 1},
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


def test_twenty_clicks_a_second_in_two_tabs_end_in_two_answers(page, digit):
    def click(number):
        time.sleep(number / 20)
        tab = str(number % 2)
        body = {"edit": "inpaint", "picture": text(digit), "mask": text(MASK), "steps": [20]}
        address = f"http://{page.host}/edit"
        answer = requests.post(address, json=body, headers={"X-Tab": tab}, timeout=60)
        return answer.status_code

    with ThreadPoolExecutor(40) as pool:
        codes = list(pool.map(click, range(40)))
    assert set(codes) <= {200, 409}
    assert codes[-2:] == [200, 200]
    assert page.get("about").ok


class SlowDesk:
    """Its examples wait until they may go on; one of them is a mistake of ours."""

    edit = harmed = samples = morph = None

    def __init__(self):
        self.may_go_on = threading.Event()
        self.count = 0

    def about(self):
        return {}

    def example(self, index):
        if index == 666:
            raise ZeroDivisionError
        self.may_go_on.wait(30)
        self.count += 1
        return {"index": index}


def test_few_wait_for_the_model_and_the_others_are_told():
    desk = SlowDesk()
    with Site(desk) as page, ThreadPoolExecutor(64) as pool:

        def get(index):
            return requests.get(f"http://{page.host}/example/{index}", timeout=60).status_code

        jobs = [pool.submit(get, index) for index in range(40)]
        end = time.monotonic() + 30
        while sum(job.done() for job in jobs) < 40 - server.MAX_WAITING - 1:
            assert time.monotonic() < end
            time.sleep(0.01)
        desk.may_go_on.set()
        codes = [job.result() for job in jobs]
    assert codes.count(503) == 40 - server.MAX_WAITING - 1
    assert codes.count(200) == desk.count == server.MAX_WAITING + 1


def test_an_older_request_of_a_tab_makes_way_for_a_newer_one():
    desk = SlowDesk()
    with Site(desk) as page, ThreadPoolExecutor(8) as pool:

        def get(index, tab):
            address = f"http://{page.host}/example/{index}"
            return requests.get(address, headers={"X-Tab": tab}, timeout=60).status_code

        jobs = []
        for index, tab in enumerate("abbb"):
            jobs.append(pool.submit(get, index, tab))
            time.sleep(0.3)
        desk.may_go_on.set()
        assert [job.result() for job in jobs] == [200, 409, 409, 200]
    assert desk.count == 2


def test_a_mistake_of_ours_does_not_end_the_server():
    desk = SlowDesk()
    desk.may_go_on.set()
    with Site(desk) as page:
        assert page.get("example/666").status_code == 500
        assert page.get("example/1").json() == {"index": 1}


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
