"""Downloads from a server of the test's own: cut, changed, refused, redirected, and never half."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from cmtool.errors import InputError, ResourceError
from cmtool.system import download as module
from cmtool.system.download import download
from tests.site import CONTENT, SHA256


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda _: None)


def test_a_file_comes_whole_with_its_progress(site, tmp_path):
    told = []
    path = tmp_path / "new" / "model.pt"
    assert download(site.url, path, progress=lambda *a: told.append(a)) == SHA256
    assert path.read_bytes() == CONTENT
    assert told[-1] == ("fetching model.pt", len(CONTENT), len(CONTENT))
    assert {file.name for file in path.parent.iterdir()} <= {"model.pt", "model.pt.lock"}
    assert download(site.url, path, sha256=SHA256[:8]) == SHA256
    assert len(site.ranges) == 1  # what is there is not fetched again


def test_a_cut_file_is_gone_on_with_and_no_byte_comes_twice(site, tmp_path):
    site.cuts = [100_000, 300_000, 1]
    path = tmp_path / "model.pt"
    assert download(site.url, path, sha256=SHA256) == SHA256
    assert site.ranges == [None, "bytes=100000-", "bytes=400000-", "bytes=400001-"]
    assert site.sent == len(CONTENT)


def test_a_file_of_unknown_length_is_whole_only_if_its_answer_ended(site, tmp_path):
    site.is_chunked, site.cuts = True, [100_000, 300_000]
    assert download(site.url, tmp_path / "cut.pt") == SHA256
    assert site.ranges == [None, "bytes=100000-", "bytes=400000-"]
    assert download(site.url, tmp_path / "whole.pt") == SHA256
    assert site.ranges[3:] == [None]


def test_a_file_of_unknown_length_that_is_always_cut_is_an_error(site, tmp_path):
    site.is_chunked, site.has_ranges, site.cuts = True, False, [100_000] * 50
    with pytest.raises(ResourceError, match="could not be fetched") as caught:
        download(site.url, tmp_path / "model.pt")
    assert "run the same command again" in caught.value.hint
    assert not (tmp_path / "model.pt").exists()


def test_a_killed_download_is_gone_on_with_and_is_never_taken_for_the_file(site, tmp_path):
    path = tmp_path / "model.pt"

    def kill(_, done, total):
        if done > 500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(site.url, path, progress=kill)
    assert not path.exists()
    there = (tmp_path / "model.pt.part").stat().st_size
    assert there > 500_000
    assert download(site.url, path) == SHA256
    assert site.ranges[-1] == f"bytes={there}-"


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_file_that_changed_on_the_server_is_begun_anew(site, tmp_path, has_ranges):
    path = tmp_path / "model.pt"
    site.cuts, site.answers = [1000], []
    with pytest.raises(KeyboardInterrupt):
        download(site.url, path, note=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    site.content, site.tag, site.has_ranges = CONTENT[::-1], '"two"', has_ranges
    download(site.url, path)
    assert path.read_bytes() == CONTENT[::-1]


def test_a_part_of_another_address_is_not_gone_on_with(site, tmp_path):
    path = tmp_path / "model.pt"
    (tmp_path / "model.pt.part").write_bytes(b"x" * 1000)
    (tmp_path / "model.pt.part.json").write_text(
        '{"url": "http://elsewhere/model.pt", "tag": "\\"one\\"", "length": 5}'
    )
    assert download(site.url, path) == SHA256


@pytest.mark.parametrize("extra", [0, 9])
def test_a_part_as_long_as_the_file_or_longer_is_begun_anew(site, tmp_path, extra):
    path = tmp_path / "model.pt"
    (tmp_path / "model.pt.part").write_bytes(b"x" * (len(CONTENT) + extra))
    (tmp_path / "model.pt.part.json").write_text(
        f'{{"url": "{site.url}", "tag": "\\"one\\"", "length": {len(CONTENT)}}}'
    )
    assert download(site.url, path) == SHA256


def test_another_file_than_the_published_one_is_not_kept(site, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"what the user had")
    with pytest.raises(
        InputError, match=r"gave another file: its sha256 is \w{12}\.\.\., not 0000"
    ):
        download(site.url, path, sha256="0" * 64)
    assert path.read_bytes() == b"what the user had"
    assert not (tmp_path / "model.pt.part").exists()


def test_a_length_that_is_never_reached_is_an_error_in_the_end(site, tmp_path):
    site.length, site.has_ranges = len(CONTENT) + 5, False
    with pytest.raises(ResourceError, match="could not be fetched"):
        download(site.url, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_a_busy_server_is_asked_again_when_it_says(site, tmp_path):
    site.answers = [(429, {"Retry-After": "7"}), (503, {}), (500, {"Retry-After": "never"})]
    notes = []
    assert download(site.url, tmp_path / "model.pt", note=notes.append) == SHA256
    assert "answers 429: waiting 7 s" in notes[0]


@pytest.mark.parametrize(
    ("status", "said"), [(403, "not allowed"), (404, "not there"), (401, "login"), (410, "410")]
)
def test_a_refusal_is_told(site, tmp_path, status, said):
    site.answers = [(status, {})]
    with pytest.raises(InputError, match=said):
        download(site.url, tmp_path / "model.pt")


def test_a_range_that_was_not_asked_for_is_not_refused_for_ever(site, tmp_path):
    site.answers = [(416, {})] * 2000
    with pytest.raises(InputError, match="answers 416"):
        download(site.url, tmp_path / "model.pt")
    assert site.ranges == [None]


def test_a_web_page_is_no_file(site, tmp_path):
    site.kind = "text/html; charset=utf-8"
    with pytest.raises(InputError, match="web page"):
        download(site.url, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt.part").exists()


def test_a_server_may_redirect_to_itself(site, tmp_path):
    site.answers = [(302, {"Location": "/other.pt"})]
    assert download(site.url, tmp_path / "model.pt") == SHA256


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "http://localhost:1/x", "ftp://127.0.0.1/x", "//localhost/x"]
)
def test_a_redirect_to_elsewhere_without_https_is_refused(site, tmp_path, target):
    site.answers = [(302, {"Location": target})]
    with pytest.raises(InputError, match="not safe"):
        download(site.url, tmp_path / "model.pt")


def test_a_token_goes_to_the_server_that_was_named_and_to_no_other(site, tmp_path, monkeypatch):
    """The other server is a mirror over https: the test's own, under an address that it has not."""
    import requests

    get, sent, mirror = requests.get, [], "https://mirror.example/model.pt"

    def through(url, headers, **options):
        sent.append((url, headers.get("authorization")))
        return get(site.url if url == mirror else url, headers=headers, **options)

    monkeypatch.setattr(requests, "get", through)
    site.answers = [(302, {"Location": mirror})]
    token = {"authorization": "Bearer secret"}
    assert download(site.url, tmp_path / "model.pt", headers=token) == SHA256
    assert sent == [(site.url, "Bearer secret"), (mirror, None)]


def test_a_redirect_in_a_circle_ends(site, tmp_path):
    site.answers = [(302, {"Location": "/model.pt"})] * 50
    with pytest.raises(InputError, match="without end"):
        download(site.url, tmp_path / "model.pt")


def test_no_room_on_the_disk_is_told_before_a_byte_is_written(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("D", (), {"free": 10}))
    with pytest.raises(ResourceError, match="no room on the disk"):
        download(site.url, tmp_path / "model.pt")
    assert site.sent <= len(CONTENT)
    assert not (tmp_path / "model.pt").exists()


def test_two_at_once_fetch_once(site, tmp_path):
    path = tmp_path / "model.pt"
    with ThreadPoolExecutor(2) as pool:
        assert (
            list(pool.map(lambda _: download(site.url, path, sha256=SHA256), range(2)))
            == [SHA256] * 2
        )
    assert site.sent == len(CONTENT)


def test_a_drip_counts_as_cut(monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    answer = SimpleNamespace(raw=SimpleNamespace(read1=lambda _: b"x" * 100))
    assert len(list(module._blocks(answer))) == 7  # a minute of ten seconds each


def test_no_server_is_an_error(tmp_path):
    with pytest.raises(ResourceError, match="could not be fetched"):
        download("http://127.0.0.1:9/x.pt", tmp_path / "x.pt")
