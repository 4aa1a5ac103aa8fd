import errno
import os
import stat
import tempfile

import pytest

from cmtool.errors import InputError, ResourceError
from cmtool.presets.toml import load_preset
from cmtool.system.files import check_temporary, opened, read_own, sync, write_atomic
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


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
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
