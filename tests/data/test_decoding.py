import io
import random
import re
import struct
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cmtool.data import decoding
from cmtool.data.decoding import check_background, image_mode, png_info, read_image, read_mask
from cmtool.data.drawing import png_bytes
from cmtool.errors import InputError, UserError
from tests.data.pictures import VALID, bmp_of_runs, chunk, damaged, png, saved, tiff


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


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_lies_on_the_colour_that_is_named(mode):
    picture = Image.new("RGBA", (2, 1), (9, 9, 9, 0))
    picture.putpixel((1, 0), (9, 9, 9, 255))
    if mode == "P":
        picture = picture.quantize(2)
    content = saved(picture.convert(mode))
    assert read_image(content, background="#102030")[:, 0].T.tolist() == [[16, 32, 48], [9, 9, 9]]
    assert read_image(content, mode="L", background="black").tolist() == [[[0, 9]]]


@pytest.mark.parametrize("colour", ["wite", "", "#12", "#10203040", "rgba(1,2,3,4)", "\0"])
def test_a_background_that_is_no_colour_is_refused(colour):
    with pytest.raises(UserError, match="^" + re.escape(f"{colour!r} is no colour")):
        check_background(colour)


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
    for value in (-1, 65536, 70_000):
        with pytest.raises(InputError, match="more than 16 bits"):
            read_image(saved(Image.fromarray(np.full((2, 2), value, np.int32)), "TIFF"))


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


@pytest.mark.parametrize("kind", VALID)
def test_of_a_damaged_file_comes_an_image_or_our_error(kind, tmp_path):
    rng = random.Random(kind)
    for _ in range(200):
        content = damaged(VALID[kind], rng)
        for use in (read_image, image_mode):
            with suppress(InputError):
                use(content)
    (tmp_path / "a.png").write_bytes(content)
    assert png_info(tmp_path / "a.png") is not None


@pytest.mark.parametrize("kind", VALID)
def test_strips_change_nothing(kind, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(VALID[kind])
    before = [read_image(VALID[kind], mode=mode) for mode in ("RGB", "L")]
    before.append(read_mask(tmp_path / "a"))
    monkeypatch.setattr(decoding, "STRIP", 25)
    after = [read_image(VALID[kind], mode=mode) for mode in ("RGB", "L")]
    after.append(read_mask(tmp_path / "a"))
    assert all(map(torch.equal, before, after))


def many_scans():
    content = saved(Image.new("L", (8, 8)), "JPEG", progressive=True)
    at = content.rindex(b"\xff\xda")
    return content[:-2] + content[at:-2] * 100 + content[-2:]


SMALL_JPEG = saved(Image.new("L", (8, 8)), "JPEG")


def jpeg_with(more):
    """A JPEG with more before its pixels."""
    return SMALL_JPEG[:2] + more + SMALL_JPEG[2:]


EXIF = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 5, 1 << 19, 26) + bytes(4 << 20)
"""An orientation of half a million fractions."""
OVER_THE_BOUNDS = {
    "RGBA": (png(7900, 7900, kind=6), "7900x7900 pixels of 4 bytes, takes 249,640,000 bytes"),
    "RGBA of 16 bits": (png(7000, 7000, kind=6, depth=16), "7000x7000 pixels of 4 bytes"),
    "too many pixels": (png(8001, 8000), "8001x8000 pixels"),
    "webp": (saved(Image.new("L", (16000, 1501)), "WEBP"), "16000x1501 pixels of 8 bytes"),
    "run lengths": (bmp_of_runs(2001, 2000, b"\x01\0\0\0" * 2000), "2001x2000 pixels"),
    "a tile": (tiff(8, 8, b"", tile=(16_000, 16_000)), "8x8 pixels of 1 bytes, takes 256,000,000"),
    "chunks": (png(8, 8, chunk(b"teSt", b"") * 100_000), "more than 100,000 chunks"),
    "scans": (many_scans(), "has 1[0-9]{2} scans"),
    "comments": (b"P3 8 8 255\n" + b"#\n" * 500_000, "more than 1,000 comments"),
    "a header": (b"P6 #" + b"x" * 5_000_000, "header has more than 4,096 bytes"),
    "segments": (jpeg_with(b"\xff\xe3\0\2" * 1_000_000), "more than 400 segments"),
    "filling": (jpeg_with(b"\xff" * 4_000_000), "65,536 bytes between its segments"),
    "junk": (jpeg_with(b"\xff\xfe\0\2" + bytes(4_000_000)), "65,536 bytes between its segments"),
    "EXIF": (png(8, 8, chunk(b"eXIf", EXIF), rows=bytes(72)), "its EXIF has 4,194,332 bytes"),
    "strips": (tiff(1, 300_000, bytes(8), strips=300_000), "its tag 273 has 300,000 values"),
    "tags": (
        b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 300_000) + bytes(6_000_000),
        "it has 300,000 tags",
    ),
    "a float's header": (b"Pf #" + b"x" * 5_000_000, "header has more than 4,096 bytes"),
    "Pillow's own header": (b"PyRGBA#" + b"x" * 5_000_000, "header has more than 4,096 bytes"),
    "numbers as text": (b"P3 1200 1200 255\n" + b"0 " * 4_320_000, "1200x1200 pixels"),
}


@pytest.mark.parametrize("kind", OVER_THE_BOUNDS)
def test_what_would_take_long_or_much_is_refused_before_it_is_decoded(kind):
    content, words = OVER_THE_BOUNDS[kind]
    start = time.process_time()
    with pytest.raises(InputError, match=words):
        read_image(content)
    assert time.process_time() - start < 0.3


def test_what_is_just_within_the_bounds_is_read():
    assert read_image(png(8, 8, chunk(b"teSt", b"") * 99_000, rows=bytes(72))).shape == (3, 8, 8)
    assert read_image(b"P3 1 1 255\n" + b"#\n" * 1000 + b"1 2 3").flatten().tolist() == [1, 2, 3]
    segments = jpeg_with(b"\xff\xe3\0\2" * 390 + b"\xff" * 60_000)
    assert read_image(segments).shape == (3, 8, 8)
    assert read_image(tiff(1, 2000, b"\7" * 9, strips=2000)).unique().tolist() == [7]
    assert read_image(b"P5 #" + b"x" * 4000 + b"\n1 1 255\n" + b"\7").unique().tolist() == [7]


@pytest.mark.parametrize("orientation", [(1, 0), (0, 0), (6, 1)])
def test_an_orientation_that_is_no_number_turns_nothing(orientation):
    picture = saved(Image.new("L", (4, 2)), "JPEG")
    ifd = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\x1a\0\0\0\0\0\0\0"
    exif = ifd + orientation[0].to_bytes(4, "little") + orientation[1].to_bytes(4, "little")
    content = picture[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + picture[2:]
    assert read_image(content).shape == ((3, 4, 2) if orientation == (6, 1) else (3, 2, 4))


TWO_16 = np.array([[0, 65535, 25700]], "<u2").tobytes()


def test_grey_of_a_tiff_is_scaled_by_its_own_bits():
    assert read_image(tiff(3, 1, TWO_16, bits=16))[0].tolist() == [[0, 255, 100]]
    assert read_image(tiff(3, 1, TWO_16, bits=16, white=0))[0].tolist() == [[255, 0, 155]]
    assert read_image(tiff(2, 1, b"\x00\x0f\xff", bits=12))[0].tolist() == [[0, 255]]


@pytest.mark.parametrize(("bits", "sign"), [(16, 2), (32, 1), (32, 2), (32, 3)])
def test_grey_of_no_known_range_is_refused(bits, sign):
    with pytest.raises(InputError, match=r"range|is not an image"):
        read_image(tiff(3, 1, TWO_16 * 2, bits=bits, sign=sign))


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


@pytest.mark.parametrize(
    ("grey", "alpha", "wanted"),
    [(128, 255, [True, False]), (127, 255, [False, False]),  # white is half a picture or more
     (240, 128, [True, False]), (239, 128, [False, True]), (255, 127, None)],
)  # fmt: skip
def test_a_mask_is_told_by_half_of_each_level(grey, alpha, wanted, tmp_path):
    """Two pixels: one of this grey and alpha, and one that is black and opaque, or nothing."""
    other = [0, 0, 0, 255] if alpha == 255 else [0, 0, 0, 0]
    pixels = np.array([[[grey] * 3 + [alpha], other]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "m.png")
    if wanted is None:  # all is nothing
        assert read_mask(tmp_path / "m.png").all()
    else:
        assert read_mask(tmp_path / "m.png").tolist() == [[wanted]]


def squares():
    """A white square on black, 4x4."""
    grey = np.zeros((4, 4), np.uint8)
    grey[1:3, 1:3] = 255
    return Image.fromarray(grey)


SQUARE = squares()
DEEP = Image.fromarray(np.array(SQUARE, np.uint16) * 257)
MASKS = {
    "CMYK TIFF": saved(Image.merge("CMYK", [SQUARE.point(lambda v: 255 - v)] * 3
                                   + [Image.new("L", (4, 4))]), "TIFF"),
    "16 bits": saved(DEEP),
    "16 bits of a TIFF": saved(DEEP, "TIFF"),
    "16 bits of a PGM": saved(DEEP, "PPM"),
    "one bit": saved(SQUARE.convert("1")),
    "palette": saved(SQUARE.convert("RGB").quantize(2)),
    "YCbCr": saved(SQUARE.convert("YCbCr"), "TIFF"),
    "LA": saved(SQUARE.convert("LA")),
    "black is nothing": saved(SQUARE, transparency=0),
    "white is nothing": saved(SQUARE, transparency=255),
    "black of RGB is nothing": saved(SQUARE.convert("RGB"), transparency=(0, 0, 0)),
    "white paint in WebP": saved(Image.merge("RGBA", [Image.new("L", (4, 4), 255)] * 3 + [SQUARE]),
                                 "WEBP", lossless=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_may_be_stored_in_any_mode(kind, tmp_path):
    (tmp_path / "m").write_bytes(MASKS[kind])
    assert read_mask(tmp_path / "m")[0].tolist() == (np.array(SQUARE) == 255).tolist()


NO_MASKS = {
    "APNG": (saved(SQUARE, save_all=True, append_images=[Image.new("L", (4, 4), 9)]), "2 frames"),
    "pages": (saved(SQUARE, "TIFF", save_all=True, append_images=[SQUARE]), "2 frames"),
    "GIF": (saved(SQUARE, "GIF"), "is not an image cmtool reads"),
    "animated GIF": (saved(SQUARE, "GIF", save_all=True, append_images=[Image.new("L", (4, 4))]),
                     "is not an image cmtool reads"),
    "ICO": (saved(SQUARE, "ICO"), "is not an image cmtool reads"),
    "TGA": (saved(SQUARE, "TGA"), "is not an image cmtool reads"),
    "PSD": (b"8BPS\0\1" + bytes(100), "is not an image cmtool reads"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(100), "is not an image cmtool reads"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image cmtool reads"),
    "floats": (saved(SQUARE.convert("F"), "TIFF"), "floats of an unknown range"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_MASKS)
def test_a_mask_of_several_pictures_or_of_another_format_is_refused(kind, tmp_path):
    (tmp_path / "m").write_bytes(NO_MASKS[kind][0])
    with pytest.raises(InputError, match=NO_MASKS[kind][1]):
        read_mask(tmp_path / "m")


@pytest.mark.parametrize(("dark", "is_refused"), [(15, True), (16, False)])
def test_a_mask_of_two_meanings_has_white_and_black_paint_on_nothing(dark, is_refused, tmp_path):
    pixels = np.array([[[255] * 4, [dark] * 3 + [255], [0] * 4]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "m.png")
    if is_refused:
        with pytest.raises(InputError, match="black, white and transparent"):
            read_mask(tmp_path / "m.png")
    else:
        assert read_mask(tmp_path / "m.png").tolist() == [[[False, False, True]]]


def test_the_limit_is_64_million_pixels():
    assert image_mode(saved(Image.new("1", (8000, 8000)))) == "1"
    with pytest.raises(InputError, match="8001x8000 pixels"):
        image_mode(saved(Image.new("1", (8001, 8000))))
