import io

import pytest
import torch
from PIL import Image

from cmtool.data.drawing import animation_bytes, contact_sheet, display_scale, grid, text_mask


def test_grid_places_images_in_rows():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 2, 3)
    picture = grid(images, 3, scale=2)
    assert picture.shape == (1, 2 * (2 * 3 + 1), 2 * (3 * 4 + 1))
    assert picture[0, 2, 2] == 0
    assert picture[0, 2, 10] == 1
    assert picture[0, 8, 2] == 3
    assert picture[0, 8, 18] == 255


@pytest.mark.parametrize(("count", "columns"), [(10, 10), (20, 10), (9, 3), (12, 4), (13, 4)])
def test_a_sheet_for_people_has_ten_in_a_row_or_is_about_a_square(count, columns):
    sheet = contact_sheet(torch.zeros(count, 1, 8, 8, dtype=torch.uint8))
    rows = -(-count // columns)
    assert sheet.shape == (1, 6 * (rows * 9 + 1), 6 * (columns * 9 + 1))
    assert [display_scale(side) for side in (8, 16, 32, 64)] == [6, 3, 1, 1]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_shows_twelve_frames_a_second_without_end(suffix):
    frames = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 8, 8) * 80
    with Image.open(io.BytesIO(animation_bytes(frames, suffix))) as opened:
        opened.seek(1)
        opened.load()
        assert opened.info["duration"] == pytest.approx(1000 / 12, abs=4)  # a gif counts by 10 ms
        assert opened.info["loop"] == 0


def test_letters_lie_in_the_middle():
    mask = text_mask("HH", 64, 48) > 128
    rows, columns = (mask[0].any(dim).nonzero().flatten() for dim in (1, 0))
    for side, where in ((64, rows), (48, columns)):
        assert abs(int(where[0]) - (side - 1 - int(where[-1]))) <= 2
    assert int(columns[-1] - columns[0]) > 36


def test_a_letter_is_as_high_as_the_picture():
    rows = (text_mask("I", 64, 48) > 128)[0].any(1).nonzero()
    assert int(rows[-1] - rows[0]) >= 60
