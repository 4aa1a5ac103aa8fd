import os
import resource

import pytest
import torch

from cmtool.data.kept import KeptImages
from cmtool.errors import BusyError, InputError, ResourceError, UserError

IMAGES = torch.arange(5 * 12, dtype=torch.uint8).reshape(5, 3, 2, 2)


def kept(path, key="a", overwrite=False):
    return KeptImages(path, key, (3, 2, 2), overwrite)


def count(path, **options):
    """Return how many images are kept."""
    opened = kept(path, **options)
    opened.close(done=False)
    return len(opened)


@pytest.fixture
def path(tmp_path):
    """A file of two images, and half of a third."""
    opened = kept(tmp_path / "x.part")
    assert len(list(opened.all(IMAGES[:2]))) == 2
    opened.close(done=False)
    with (tmp_path / "x.part").open("ab") as file:
        file.write(b"1234567")
    return tmp_path / "x.part"


def test_whole_images_are_kept_and_the_rest_follows(path):
    opened = kept(path)
    assert len(opened) == 2
    assert torch.equal(torch.stack(list(opened.all(IMAGES[2:]))), IMAGES)
    opened.close(done=False)
    again = kept(path)
    assert torch.equal(torch.stack(list(again.all([]))), IMAGES)
    again.close(done=True)
    assert not path.exists()


def test_images_of_other_settings_are_not_mixed_in(path):
    with pytest.raises(UserError, match="other settings"):
        kept(path, "b")
    assert path.stat().st_size > 24
    fresh = kept(path, "b", overwrite=True)
    assert len(fresh) == 0
    fresh.close(done=False)
    assert not path.exists()


def test_with_overwrite_the_same_images_are_kept(path):
    assert count(path, overwrite=True) == 2


def test_a_header_that_is_cut_short_is_begun_anew(path):
    path.write_bytes(path.read_bytes()[:9])
    assert count(path) == 0


def test_two_processes_do_not_write_one_file(path):
    first = kept(path)
    with pytest.raises(BusyError, match="another process"):
        kept(path)
    first.close(done=False)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: p.symlink_to("/etc/hosts")])
def test_only_a_regular_file_is_written(tmp_path, make):
    make(tmp_path / "x.part")
    with pytest.raises(InputError, match=r"x\.part (is not|cannot be)"):
        kept(tmp_path / "x.part", overwrite=True)


def test_a_full_disk_is_told_and_whole_images_stay(path):
    opened = kept(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 8, hard))
    try:
        with pytest.raises(ResourceError, match="no room"):
            list(opened.all(IMAGES[2:]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    opened.close(done=False)
    assert count(path) == 3
