import torch

from cmtool.data.images import from_uint8, to_uint8


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_rounding_is_to_the_nearest_level_and_clamped():
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]
    step = 1 / 127.5
    x = -1 + step * torch.tensor([10.49, 10.51])
    assert to_uint8(x).tolist() == [10, 11]
