import torch

from cmtool.data.drawing import grid


def test_grid_places_images_in_rows():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 2, 3)
    picture = grid(images, 3, scale=2, gap=1)
    assert picture.shape == (1, 2 * (2 * 3 + 1), 2 * (3 * 4 + 1))
    assert picture[0, 2, 2] == 0
    assert picture[0, 2, 10] == 1
    assert picture[0, 8, 2] == 3
    assert picture[0, 8, 18] == 255
