"""What a feature network takes: ranges and resize rules, against what they stand for."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cmtool.errors import UserError
from cmtool.evaluation.takes import RANGES, RESIZES, Takes, cropped, parsed


def pictures(n, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def test_a_text_says_size_range_and_resize_in_any_order():
    usual = Takes()
    assert parsed("", usual, "x") == usual == Takes(None, "-1..1", "bicubic")
    assert parsed("imagenet, 32x24", usual, "x") == Takes((24, 32), "imagenet", "bicubic")
    assert parsed("224", parsed("64,0..1,nearest", usual, "x"), "x") == Takes(
        (224, 224), "0..1", "nearest"
    )
    for takes in (Takes(None, "uint8"), Takes((3, 5), "clip", "crop")):
        assert parsed(str(takes), usual, "x") == takes
    for bad in ("image-net", "0", "9999", "224x", "bilinear"):
        with pytest.raises(UserError, match="net: "):
            parsed(bad, usual, "net")


def test_a_rule_without_a_size_is_told_with_one_that_works():
    with pytest.raises(UserError, match="bilinear needs a size") as caught:
        parsed("imagenet,bilinear", Takes(), "net")
    example = caught.value.hint.removeprefix("give one, for example ")
    assert parsed(example, Takes(), "net") == Takes((224, 224), "imagenet", "bilinear")


def test_ranges_are_what_they_are_called():
    levels = torch.tensor([0.0, 127.5, 255.0]).reshape(1, 1, 1, 3).expand(1, 3, 1, 3)
    ends = {"-1..1": (-1, 0, 1), "0..1": (0, 0.5, 1), "0..255": (0, 127.5, 255)}
    for name, expected in ends.items():
        found = RANGES[name](levels)[0, 0, 0]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    rounded = RANGES["uint8"](torch.tensor([-3.0, 254.6, 300.0]))
    assert rounded.dtype == torch.uint8
    assert rounded.tolist() == [0, 255, 255]
    imagenet = RANGES["imagenet"](levels)[0, :, 0, 2]
    expected = [(1 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    torch.testing.assert_close(imagenet, torch.tensor(expected))


def test_images_come_at_the_size_or_at_their_own():
    images = pictures(2, 10, 14)
    for name in RESIZES:
        assert Takes((8, 6), "0..1", name)(images).shape == (2, 3, 8, 6)
    assert torch.equal(Takes(None, "0..255")(images), images.float())


def test_bicubic_is_not_clamped_and_antialiased():
    images = pictures(2, 40, 40)
    expected = F.interpolate(images.float(), (9, 9), mode="bicubic", antialias=True)
    assert torch.equal(Takes((9, 9), "0..255")(images), expected)
    edge = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    assert Takes((16, 16), "0..255")(edge).min() < 0


@pytest.mark.parametrize(
    "shape", [(40, 30), (30, 40), (5, 7), (12, 12), (24, 50), (12, 15), (15, 12)]
)
def test_the_crop_is_that_of_pillow_and_torchvision(shape):
    """As clean-fid's clip_features.py has it: Resize(12) and CenterCrop(12) of a Pillow image."""
    (image,) = pictures(1, *shape)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    short, long = min(shape), max(shape)
    other = int(12 * long / short)
    w, h = (12, other) if shape[1] <= shape[0] else (other, 12)
    if (w, h) != picture.size:
        picture = picture.resize((w, h), Image.Resampling.BICUBIC)
    top, left = round((h - 12) / 2.0), round((w - 12) / 2.0)
    theirs = np.asarray(picture)[top : top + 12, left : left + 12]
    ours = cropped(image[None].float(), (12, 12))[0].permute(1, 2, 0)
    torch.testing.assert_close(ours, torch.from_numpy(theirs.copy()).float(), rtol=0, atol=1)
    assert (ours.numpy() == theirs).mean() > 0.99
