import errno
import os
import socket
import stat
import tempfile

import pytest

from cmtool.errors import InputError, ResourceError
from cmtool.presets.toml import load_preset
from cmtool.system.files import check_temporary, opened, read_own, read_regular, sync, write_atomic
from cmtool.training.run import train
from tests.cli.conftest import TINY, cmtool  # noqa: F401  # a fixture


def break_sync(monkeypatch, number, *, of_folders):
    """Make syncing folders, or files, an error."""
    whole = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_special_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", tmp_path):
        with pytest.raises(InputError, match="not a regular file"):
            write_atomic(target, b"")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch, number):
    assert sync(tmp_path)
    break_sync(monkeypatch, number, of_folders=True)
    assert not sync(tmp_path)
    write_atomic(tmp_path / "a", b"ours", durable=True)
    assert read_own(tmp_path / "a") == b"ours"


@pytest.mark.parametrize(("number", "of_folders"), [(errno.EIO, True), (errno.EINVAL, False)])
def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch, number, of_folders):
    break_sync(monkeypatch, number, of_folders=of_folders)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_atomic(tmp_path / "a", b"ours", durable=True)


def test_a_run_where_folders_cannot_be_synced_says_so_once(tmp_path, monkeypatch, cmtool):  # noqa: F811
    break_sync(monkeypatch, errno.EINVAL, of_folders=True)
    result = cmtool("train", *TINY, "--set", "train.steps=1", "--out", "r")
    assert result.code == 0, result.err
    assert result.err.count("r is on a file system that cannot sync folders") == 1


def test_what_is_read_has_a_bound(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(InputError, match="has more than 10 bytes"):
        read_own(tmp_path / "large", 10)
    with pytest.raises(IsADirectoryError):
        opened(tmp_path)


def test_without_a_folder_for_temporary_files_a_run_does_not_start(tmp_path, monkeypatch):
    check_temporary()
    with monkeypatch.context() as patch:  # pytest needs such a folder too
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
        with pytest.raises(ResourceError, match="no folder for temporary files") as caught:
            train(load_preset("digits-ct"), tmp_path / "r", None)
    assert caught.value.hint == "name one that can: export TMPDIR=FOLDER"
    assert not (tmp_path / "r").exists()


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


def test_a_bound_takes_no_memory(tmp_path):
    (tmp_path / "small").write_bytes(b"ours")
    assert read_own(tmp_path / "small", 1 << 60) == b"ours"
