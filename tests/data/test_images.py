import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cmtool.core.edits import enlarged
from cmtool.data.images import (
    animation_bytes,
    canvas,
    contact_sheet,
    display_scale,
    fitted,
    floored,
    from_uint8,
    grid,
    image_mode,
    png_bytes,
    png_info,
    read_image,
    read_mask,
    text_mask,
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


def ramp(h, w):
    return torch.arange(h * w, dtype=torch.uint8).reshape(1, 1, h, w)


@pytest.mark.parametrize(
    ("side", "how", "kept", "pad"),
    [((11, 8), "crop", (slice(1, 9), slice(1, 6)), (0, 0)),
     ((8, 5), "exact", (slice(0, 8), slice(0, 5)), (0, 0)),
     ((6, 4), "pad", (slice(0, 6), slice(0, 4)), (2, 1)),
     ((8, 4), "pad", (slice(0, 8), slice(0, 4)), (0, 1)),
     ((6, 5), "pad", (slice(0, 6), slice(0, 5)), (2, 0)),
     ((6, 9), "tile", (slice(0, 6), slice(0, 9)), (2, 0))],
)  # fmt: skip
def test_a_canvas_is_the_centre_or_the_whole_with_its_edge_repeated(side, how, kept, pad):
    picture, layout = ramp(*side), canvas(*side, (8, 5), how)
    part = picture[(..., *kept)]
    wanted = torch.nn.functional.pad(part.float(), (0, pad[1], 0, pad[0]), mode="replicate")
    placed = layout.place(picture)
    assert torch.equal(placed.float(), wanted)
    assert torch.equal(layout.unpad(placed), part)
    twice = layout.scaled(2)
    assert torch.equal(twice.place(enlarged(picture, 2)), enlarged(placed, 2))
    assert torch.equal(twice.unpad(enlarged(placed, 2)), enlarged(part, 2))


@pytest.mark.parametrize(
    ("side", "how", "others"),
    [((11, 8), "exact", "tile or crop"), ((6, 4), "crop", "tile or pad"), ((6, 9), "pad", "tile"),
     ((6, 9), "crop", "tile"), ((8, 9), "exact", "tile or crop")],
)  # fmt: skip
def test_a_canvas_that_does_not_suit_names_those_that_do(side, how, others):
    with pytest.raises(InputError, match=f"{side[1]}x{side[0]}, the model makes 5x8") as caught:
        canvas(*side, (8, 5), how)
    assert caught.value.hint.endswith(f"--fit {others}")


@pytest.mark.parametrize(("h", "w"), [(33, 49), (49, 33), (40, 30), (13, 12)])
def test_a_picture_is_fitted_by_its_shorter_side_rounded_to_the_nearest(h, w):
    """As the release's script for LSUN: 49x33 to 12 is 18x12, the box, then the centre."""
    picture = torch.randint(256, (3, h, w), generator=torch.Generator().manual_seed(0)).byte()
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    size = [round(12 * side / min(h, w)) for side in (w, h)]
    left, top = ((side - 12) // 2 for side in size)
    wanted = image.resize(size, Image.Resampling.BOX).crop((left, top, left + 12, top + 12))
    assert fitted(picture, (12, 12), "box").permute(1, 2, 0).tolist() == np.array(wanted).tolist()


def test_adms_rule_halves_what_is_twice_too_large():
    picture = torch.randint(256, (1, 16, 24), generator=torch.Generator().manual_seed(0)).byte()
    half = Image.fromarray(picture[0].numpy()).resize((12, 8), Image.Resampling.BOX)
    wanted = np.array(half.crop((2, 0, 10, 8)))
    assert fitted(picture, (8, 8), "adm")[0].tolist() == wanted.tolist()


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


def test_the_releases_rounding_cuts():
    levels = torch.tensor([7, 7, 250, 250], dtype=torch.uint8)
    x = from_uint8(levels) + torch.tensor([0.9, 1.1, 0.9, 1.1]) / 127.5
    assert floored(x).tolist() == [7, 8, 250, 251]
    assert floored(torch.tensor([-2.0, -1, 1, 2])).tolist() == [0, 0, 255, 255]


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
