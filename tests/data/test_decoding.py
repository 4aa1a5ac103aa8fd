import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cmtool.data.decoding import image_mode, png_info, read_image
from cmtool.data.drawing import png_bytes
from cmtool.errors import InputError


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


def test_the_first_picture_of_a_phones_file_is_the_picture(tmp_path):
    first, second = (Image.new("RGB", (16, 8), colour) for colour in ("white", "black"))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.jpg").float().mean() > 250
