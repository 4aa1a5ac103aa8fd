import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cmtool.data.images import (
    from_uint8,
    grid,
    image_mode,
    png_bytes,
    png_info,
    read_image,
    to_uint8,
)
from cmtool.errors import InputError


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_rounding_is_to_the_nearest_level_and_clamped():
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]
    step = 1 / 127.5
    x = -1 + step * torch.tensor([10.49, 10.51])
    assert to_uint8(x).tolist() == [10, 11]


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_round_trip_with_info(tmp_path):
    picture = torch.randint(256, (3, 5, 7), generator=torch.Generator().manual_seed(0)).byte()
    content = png_bytes(picture, {"cmtool:seed": "17"})
    assert torch.equal(read_image(content), picture)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert png_info(path) == {"cmtool:seed": "17"}


def test_sixteen_bit_grey_keeps_its_mean():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    picture = read_image(saved(Image.fromarray(ramp)))
    assert picture.shape == (3, 16, 16)
    assert float(picture.float().mean()) == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize(("off", "gain"), [(-128, 0), (0, 0), (128, 0), (129, 1), (256, 1)])
def test_sixteen_bit_grey_is_rounded_to_the_nearest_level(off, gain):
    """Level v of 255 is 257 v of 65,535."""
    levels = np.arange(1, 255)
    deep = (257 * levels + off).astype(np.uint16).reshape(2, 127)
    assert read_image(saved(Image.fromarray(deep)), mode="L").flatten().tolist() == [
        v + gain for v in range(1, 255)
    ]


def test_sixteen_bit_grey_reaches_both_ends():
    ends = np.array([[0, 65535]], np.uint16)
    assert read_image(saved(Image.fromarray(ends)), mode="L").tolist() == [[[0, 255]]]


def test_alpha_lies_on_white():
    rgba = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert read_image(saved(rgba)).unique().tolist() == [255]


def test_rotation_is_applied():
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(saved(image, "JPEG", exif=exif)).shape == (3, 4, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_what_pillow_makes_of_it(orientation):
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(picture, exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert read_image(content, mode="L")[0].tolist() == np.array(wanted).tolist()
    assert image_mode(content) == ("L" if orientation == 1 else "L rotated")


def test_pixels_of_an_unknown_range_are_refused():
    with pytest.raises(InputError, match="pixels are floats"):
        read_image(saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))
    with pytest.raises(InputError, match="more than 16 bits"):
        read_image(saved(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"))


def test_grey_palette_and_cmyk_become_rgb():
    for mode in ("L", "P", "CMYK", "1", "LA"):
        image = Image.new(mode, (3, 2))
        assert read_image(saved(image, "JPEG" if mode == "CMYK" else "PNG")).shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "is not an image"),
        (saved(Image.new("RGB", (64, 64)))[:60], "cannot be decoded|is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "is not an image"),
        (saved(Image.new("1", (10000, 7000))), "10000x7000 pixels"),
    ],
)
def test_what_is_not_an_image_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        read_image(content)


def test_grid_places_images_in_rows():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 2, 3)
    picture = grid(images, 3, scale=2, gap=1)
    assert picture.shape == (1, 2 * (2 * 3 + 1), 2 * (3 * 4 + 1))
    assert picture[0, 2, 2] == 0
    assert picture[0, 2, 10] == 1
    assert picture[0, 8, 2] == 3
    assert picture[0, 8, 18] == 255


def test_the_first_picture_of_a_phones_file_is_the_picture(tmp_path):
    first, second = (Image.new("RGB", (16, 8), colour) for colour in ("white", "black"))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.jpg").float().mean() > 250
