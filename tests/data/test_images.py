import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.core.edits import enlarged
from cmtool.data.images import canvas, fitted, floored, from_uint8, to_uint8
from cmtool.errors import InputError, UserError


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_rounding_is_to_the_nearest_level_and_clamped():
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]
    step = 1 / 127.5
    x = -1 + step * torch.tensor([10.49, 10.51])
    assert to_uint8(x).tolist() == [10, 11]


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


def test_the_releases_rounding_cuts():
    levels = torch.tensor([7, 7, 250, 250], dtype=torch.uint8)
    x = from_uint8(levels) + torch.tensor([0.9, 1.1, 0.9, 1.1]) / 127.5
    assert floored(x).tolist() == [7, 8, 250, 251]
    assert floored(torch.tensor([-2.0, -1, 1, 2])).tolist() == [0, 0, 255, 255]


def test_a_canvas_that_resizes_takes_the_largest_part_of_the_models_shape():
    layout = canvas(12, 30, (4, 6), "resize")
    assert layout.crop == (0, 6, 12, 18)
    columns = torch.arange(30.0).expand(1, 1, 12, 30)
    placed = layout.place(columns)
    assert placed.shape == (1, 1, 4, 6)
    assert placed[0, 0, 2, 1:5].tolist() == pytest.approx([10, 13, 16, 19])  # means about 3
    assert layout.unpad(placed) is placed
    assert layout.scaled(2).size == (8, 12)
    mask = torch.zeros(1, 1, 12, 30, dtype=torch.bool)
    mask[..., 15:] = True
    assert layout.place(mask)[0, 0, 0].tolist() == [False, False, False, True, True, True]
    large = canvas(2, 2, (4, 4), "resize").place(torch.ones(1, 3, 2, 2))
    assert large.shape == (1, 3, 4, 4)
    assert large.eq(1).all()


def test_resizing_takes_the_means_of_all_pixels():
    stripes = torch.zeros(1, 1, 16, 16)
    stripes[..., ::4] = 1.0
    placed = canvas(16, 16, (4, 4), "resize").place(stripes)
    assert placed[..., 1:3].flatten().tolist() == pytest.approx([0.25] * 8, abs=0.07)


@pytest.mark.parametrize("shape", [(3, 40_000, 1), (3, 1, 40_000)])
def test_a_long_thin_picture_is_not_resized_whole(shape):
    line = torch.full(shape, 7, dtype=torch.uint8)
    for how in ("adm", "box"):
        with pytest.raises(InputError, match=rf"line\.png is .*, too long .* rule {how}") as caught:
            fitted(line, (64, 64), how, "line.png")
        assert "the rule edm" in caught.value.hint
        assert fitted(line, (8, 8), how).eq(7).all()
    assert fitted(line, (64, 64), "edm").eq(7).all()


def test_another_size_and_another_rule_are_told_in_the_words_of_the_commands():
    picture = torch.zeros(3, 9, 9, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"a\.png is 9x9, not 8x8") as caught:
        fitted(picture, (8, 8), "exact", "a.png")
    assert caught.value.hint.startswith("choose a rule: --fit adm in cmtool data prepare")
    with pytest.raises(UserError, match="unknown rule of fit for the data: 'bx'") as caught:
        fitted(picture, (8, 8), "bx")
    assert "did you mean 'box'" in caught.value.hint
    with pytest.raises(InputError, match="the rule adm makes squares, not 8x4"):
        fitted(picture, (4, 8), "adm")
