import pytest
import torch

from cmtool.core.data import digits
from cmtool.core.images import png_bytes, read_image


@pytest.fixture
def digit(tmp_path):
    picture = digits("held-out").images[3]
    (tmp_path / "d.png").write_bytes(png_bytes(picture))
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, :, 4:] = 255
    (tmp_path / "mask.png").write_bytes(png_bytes(mask))
    return picture


def test_inpaint_keeps_every_known_pixel_and_changes_the_others(cmtool, digit, tmp_path):
    result = cmtool("edit", "inpaint", "d.png", "--mask", "mask.png", "--out", "new/m.png")
    assert result.code == 0, result.err
    assert result.text == "new/m.png\n"
    answer = read_image(tmp_path / "new/m.png")
    assert torch.equal(answer[:, :, :4], digit[:, :, :4])
    assert not torch.equal(answer[:, :, 4:], digit[:, :, 4:])
    assert "class" in result.err


def test_a_pipe_works_and_a_seed_gives_another_answer(cmtool, digit, tmp_path):
    source = (tmp_path / "d.png").read_bytes()
    arguments = ["edit", "inpaint", "--mask", "mask.png", "--class", "3"]
    first = cmtool(*arguments, stdin=source)
    assert first.code == 0, first.err
    assert read_image(first.out).shape == (3, 8, 8)
    assert cmtool(*arguments, "-", stdin=source).out == first.out
    assert cmtool(*arguments, "--seed", "1", stdin=source).out != first.out


@pytest.mark.usefixtures("digit")
def test_nothing_is_overwritten_unasked(cmtool, tmp_path):
    before = (tmp_path / "d.png").read_bytes()
    result = cmtool("edit", "inpaint", "d.png", "--mask", "mask.png", "--out", "d.png")
    assert result.code == 2
    assert (tmp_path / "d.png").read_bytes() == before
    assert cmtool(
        "edit", "inpaint", "d.png", "--mask", "mask.png", "--out", "d.png", "--overwrite"
    ).code == 0  # fmt: skip
