import hashlib

import pytest
import torch

from cmtool.errors import InputError, MissingError
from cmtool.evaluation.features import INCEPTION, VGG16, find_file

CONTENT = b"weights"
FILE = INCEPTION._replace(sha256=hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Where a file is looked for, in order: the user's cache, and torch's."""
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "ours"))
    torch_home = tmp_path / "torch"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(torch_home))
    paths = [
        tmp_path / "ours" / "weights" / FILE.name,
        torch_home / "checkpoints" / FILE.name,
    ]
    for path in paths:
        path.parent.mkdir(parents=True)
    return paths


def test_the_first_place_that_has_the_file_gives_it(places):
    for path in reversed(places):
        path.write_bytes(CONTENT)
        assert find_file(FILE) == path


def test_what_is_missing_is_named_with_all_that_is_needed_to_get_it(places):
    with pytest.raises(MissingError, match=r"inception-2015-12-05\.pt is missing") as error:
        find_file(FILE)
    for fact in (str(places[0]), INCEPTION.url, "96 MB", FILE.sha256[:12], "NVIDIA's terms"):
        assert fact in error.value.hint
    assert error.value.exit_code == 4


def test_another_file_of_the_name_is_not_used_unless_it_is_trusted(places):
    for path in places:
        path.write_bytes(CONTENT[:3])  # a download cut short
        with pytest.raises(MissingError, match="is not the published") as error:
            find_file(FILE)
        assert "delete it, and fetch" in error.value.hint
        assert find_file(FILE, trust=True) == path
        path.unlink()


@pytest.mark.parametrize("file", [FILE, VGG16._replace(sha256=None)])
def test_what_anyone_may_have_put_into_the_folder_for_temporary_files_is_not_used(
    file, places, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / file.name).write_bytes(CONTENT)
    for trust in (False, True):
        with pytest.raises(MissingError, match="is missing"):
            find_file(file, trust=trust)


def test_a_file_that_is_named_is_taken_or_refused_whatever_else_there_is(places, tmp_path):
    places[0].write_bytes(CONTENT)
    given = tmp_path / "mine.pt"
    with pytest.raises(InputError, match=r"no such file: .*mine.pt"):
        find_file(FILE, given)
    given.write_bytes(b"other")
    with pytest.raises(MissingError, match=r"mine\.pt is not the published") as error:
        find_file(FILE, given)
    assert error.value.hint.startswith("give another file with --feature-weights; or add --trust")
    assert find_file(FILE, given, trust=True) == given
    given.write_bytes(CONTENT)
    assert find_file(FILE, given) == given


def test_a_file_without_a_published_hash_needs_trust(places):
    path = places[0].with_name(VGG16.name)
    path.write_bytes(CONTENT)
    with pytest.raises(MissingError, match="cannot be checked"):
        find_file(VGG16)
    assert find_file(VGG16, trust=True) == path
