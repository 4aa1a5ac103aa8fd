import os
import socket

import pytest

from cmtool.errors import InputError
from cmtool.system.files import read_regular, write_atomic


def test_a_special_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", tmp_path):
        with pytest.raises(InputError, match="not a regular file"):
            write_atomic(target, b"")


def fifo(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def sparse(path):
    path.touch()
    os.truncate(path, 20 << 30)


ODD_FILES = {
    "a fifo": (fifo, "is not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "a folder": (os.mkdir, "cannot be read: Is a directory"),
    "a socket": (listening, "cannot be read: No such device"),
    "20 GiB of nothing": (sparse, "has 21,474,836,480 bytes; at most 10 are read"),
    "one byte too many": (lambda path: path.write_bytes(bytes(11)), "has 11 bytes; at most 10"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "cannot be read: No such file"),
    "a link to itself": (lambda path: path.symlink_to("odd"), "cannot be read: Too many levels"),
    "without a size": (lambda path: path.symlink_to("/proc/self/maps"), "at most 10 are read"),
}
"""What may stand where a file is expected."""


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ODD_FILES)
def test_only_regular_files_within_the_limit_are_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = ODD_FILES[name]
    make(tmp_path / "odd")
    with pytest.raises(InputError, match=rf"odd .*{words}") as caught:
        read_regular(tmp_path / "odd", 10, "another one")
    assert caught.value.hint == "another one"


def test_a_regular_file_is_read_whole(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(10)))
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "a", 10) == read_regular(str(tmp_path / "link"), 99)
    assert b"cpu" in read_regular("/proc/cpuinfo", 1 << 20).lower()
    with pytest.raises(InputError, match="null byte"):
        read_regular("a\0b", 10)
