"""Our weight file: what its first bytes may be taken for."""

import pytest
import torch
from safetensors.torch import save_file

from cmtool.errors import InputError
from cmtool.formats import identify
from cmtool.formats.native import read_weights


def with_header_of(path, length):
    """Write weights whose header has so many bytes: blanks may follow its table."""
    save_file({"a": torch.arange(3.0)}, path, metadata={"cmtool": "{}"})
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + content[8 + size :])


def test_a_header_whose_length_begins_as_a_page_does_is_no_page(tmp_path):
    path = tmp_path / "a.safetensors"
    with_header_of(path, 15_392)
    assert path.read_bytes().startswith(b" <")
    assert identify(path) == "native"
    assert read_weights(path)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("page", [b"<html>", b"\xef\xbb\xbf <!doctype html>", b"<script>{}", b" <"])
def test_a_page_is_named(tmp_path, page):
    path = tmp_path / "a.safetensors"
    path.write_bytes(page)
    with pytest.raises(InputError, match="is an HTML page"):
        identify(path)
