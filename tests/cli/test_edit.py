from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.core import edits
from cmtool.core.rng import SeededNoise
from cmtool.core.tensors import identity
from cmtool.data.datasets import digits
from cmtool.data.decoding import png_info, read_image, read_mask
from cmtool.data.drawing import png_bytes, text_mask
from cmtool.data.images import from_uint8
from cmtool.errors import UserError
from cmtool.models import load_model
from cmtool.sampling import edit_plan, run_edit

pytestmark = pytest.mark.usefixtures("digits_by_default")


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


def test_an_edit_in_bf16_keeps_what_it_keeps_and_says_so(cmtool, digit, tmp_path):
    arguments = ["edit", "inpaint", "d.png", "--mask", "mask.png", "--class", "3"]
    assert cmtool(*arguments, "--out", "full.png").code == 0
    assert cmtool(*arguments, "--precision", "bf16", "--out", "half.png").code == 0
    full, half = (read_image(tmp_path / name).int() for name in ("full.png", "half.png"))
    assert torch.equal(half[:, :, :4], digit[:, :, :4].int())
    assert 0 < (full - half).abs().max() <= 6  # 1 to 3 of 255
    assert png_info(tmp_path / "half.png")["cmtool:precision"] == "bf16"


HOLE = torch.zeros(8, 8, dtype=torch.bool)
HOLE[2:5, 2:5] = True


def rgba(colour, alpha):
    """Return a picture (4, 8, 8) of one grey, or of many, with an alpha channel."""
    grey = torch.as_tensor(colour, dtype=torch.uint8).expand(3, 8, 8)
    return torch.cat([grey, alpha.to(torch.uint8)[None] * 255])


MASKS = {
    "white paint on nothing": (rgba(HOLE * 255, HOLE), HOLE),
    "white paint on transparent white": (rgba(255, HOLE), HOLE),
    "a hole in a picture": (rgba(torch.arange(64).reshape(8, 8) * 3, ~HOLE), HOLE),
    "a hole in black": (rgba(0, ~HOLE), HOLE),
    "opaque": (rgba(HOLE * 255, torch.ones(8, 8)), HOLE),
    "grey": (HOLE[None].to(torch.uint8) * 255, HOLE),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_white_or_the_hole_of_a_picture(name, tmp_path):
    picture, wanted = MASKS[name]
    Image.fromarray(picture.permute(1, 2, 0).squeeze(2).numpy()).save(tmp_path / "m.png")
    assert torch.equal(read_mask(tmp_path / "m.png"), wanted[None])


def test_a_palette_with_a_transparent_colour_is_a_mask_too(tmp_path):
    picture = Image.fromarray(HOLE.numpy().astype(np.uint8)).convert("P")
    picture.putpalette([255] * 6)
    picture.save(tmp_path / "m.png", transparency=0)
    assert torch.equal(read_mask(tmp_path / "m.png"), HOLE[None])


def test_a_mask_that_may_mean_two_things_is_refused(cmtool, digit, tmp_path):
    alpha = torch.zeros(8, 8)
    alpha[:4] = 1
    picture = rgba(HOLE * 255, alpha).permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "m.png")
    result = cmtool("edit", "inpaint", "d.png", "--mask", "m.png")
    assert result.code == 3
    assert "black, white and transparent" in result.err


@pytest.mark.parametrize("value", [0, 1, 127])
def test_a_mask_without_white_is_told(cmtool, digit, tmp_path, value):
    mask = torch.full((1, 8, 8), value, dtype=torch.uint8)
    (tmp_path / "m.png").write_bytes(png_bytes(mask))
    result = cmtool("edit", "inpaint", "d.png", "--mask", "m.png", "--class", "3", "--out", "o.png")
    assert result.code == 0
    assert "note: nothing in the mask is white" in result.err
    assert torch.equal(read_image(tmp_path / "o.png"), digit)


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


def test_edits_of_edits_in_a_pipe(cmtool, digit, tmp_path):
    source = (tmp_path / "d.png").read_bytes()
    first = cmtool("edit", "inpaint", "--mask", "mask.png", stdin=source)
    second = cmtool("edit", "superres", "--factor", "2", stdin=first.out)
    assert second.code == 0, second.err
    before, after = read_image(first.out).float(), read_image(second.out).float()
    gap = torch.nn.functional.avg_pool2d(after - before, 2)
    assert float(gap.abs().max()) <= 1


def test_superres_keeps_each_pixel_as_the_mean_of_its_block(cmtool, digit, tmp_path):
    small = torch.nn.functional.avg_pool2d(digit.float(), 2).round().to(torch.uint8)
    (tmp_path / "small.png").write_bytes(png_bytes(small))
    result = cmtool("edit", "superres", "small.png", "--factor", "2", "--out", "large.png")
    assert result.code == 0, result.err
    large = read_image(tmp_path / "large.png").float()
    assert large.shape == (3, 8, 8)
    assert float((torch.nn.functional.avg_pool2d(large, 2) - small).abs().max()) <= 1
    assert float(large.reshape(3, 4, 2, 4, 2).std((2, 4)).mean()) > 1  # it made detail up


def test_colorize_keeps_the_luma_and_changes_the_colours(cmtool, digit, tmp_path):
    weights = torch.tensor([0.2989, 0.5870, 0.1140]).reshape(3, 1, 1)
    assert cmtool("edit", "colorize", "d.png", "--out", "c.png").code == 0
    answer = read_image(tmp_path / "c.png").float()
    gap = (weights * (answer - digit.float())).sum(0)
    assert float(gap.abs().max()) <= 1
    assert float((answer - digit).abs().max()) > 10


def test_stroke_keeps_the_drawing_but_not_the_pixels(cmtool, digit, tmp_path):
    assert cmtool("edit", "stroke", "d.png", "--class", "3", "--out", "s.png").code == 0
    answer = read_image(tmp_path / "s.png").float()
    gap = (answer - digit.float()).abs().mean()
    assert 5 < float(gap) < 80


def test_denoise_estimates_reports_and_removes(cmtool, digit, tmp_path):
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = (digit.float() + 0.25 * 127.5 * noise).clamp(0, 255).to(torch.uint8)
    (tmp_path / "n.png").write_bytes(png_bytes(noisy))
    result = cmtool("edit", "denoise", "n.png", "--sigma", "0.25", "--out", "clean.png")
    assert result.code == 0, result.err
    clean = read_image(tmp_path / "clean.png").float()
    before = (noisy.float() - digit).square().mean()
    assert float((clean - digit).square().mean()) < 0.5 * float(before)
    estimated = cmtool("edit", "denoise", "n.png", "--out", "e.png")
    assert "by estimate" in estimated.err
    assert cmtool("edit", "denoise", "n.png", "--sigma", "99", "--out", "x.png").code == 2


def test_interpolation_between_seeds_begins_and_ends_with_their_samples(cmtool, tmp_path):
    draw = ["--class", "4", "--device", "cpu"]
    result = cmtool("edit", "interpolate", "--seeds", "3,7", "--frames", "5", *draw, "--out", "f")
    assert result.code == 0, result.err
    assert result.text.splitlines() == [f"f/frame000{i}.png" for i in range(5)]
    cmtool("sample", "--seeds", "3,7", *draw, "--out", "s")
    for frame, seed in ((0, 3), (4, 7)):
        ours = read_image(tmp_path / f"f/frame000{frame}.png").int()
        assert int((ours - read_image(tmp_path / f"s/seed00000{seed}.png")).abs().max()) <= 1


@pytest.mark.parametrize(("ending", "frames"), [("gif", 4), ("webp", 4), ("png", 1)])
def test_interpolation_is_a_strip_or_an_animation(cmtool, digit, tmp_path, ending, frames):
    (tmp_path / "e.png").write_bytes(png_bytes(digits("held-out").images[9]))
    out = f"a.{ending}"
    result = cmtool("edit", "interpolate", "d.png", "e.png", "--frames", "4", "--out", out)
    assert result.code == 0, result.err
    with Image.open(tmp_path / out) as opened:
        assert getattr(opened, "n_frames", 1) == frames
        assert opened.size == ((32, 8) if ending == "png" else (8, 8))


def test_variations_and_comparison_stand_side_by_side(cmtool, digit, tmp_path):
    result = cmtool("edit", "inpaint", "d.png", "--mask", "mask.png", "--variations", "3",
                    "--compare", "--class", "3", "--out", "row.png")  # fmt: skip
    assert result.code == 0, result.err
    panels = read_image(tmp_path / "row.png").reshape(3, 8, 5, 8).unbind(2)
    assert torch.equal(panels[0], digit)
    assert torch.equal(panels[1][:, :, :4], digit[:, :, :4])
    assert int(panels[1][:, :, 4:].min()) == int(panels[1][:, :, 4:].max()) == 128
    answers = panels[2:]
    assert not torch.equal(answers[0], answers[1])
    alone = cmtool("edit", "inpaint", "d.png", "--mask", "mask.png", "--class", "3", "--seed", "1")
    assert torch.equal(read_image(alone.out), answers[1])


def test_many_pictures_go_to_a_folder_and_say_how_they_were_made(cmtool, tmp_path):
    for i in range(3):
        (tmp_path / f"d{i}.png").write_bytes(png_bytes(digits("held-out").images[i]))
    names = [f"d{i}.png" for i in range(3)]
    result = cmtool("edit", "colorize", *names, "--class", "2", "--variations", "2", "--out", "o")
    assert result.code == 0, result.err
    assert result.text.splitlines() == [f"o/d{i}-{j}.png" for i in range(3) for j in range(2)]
    info = png_info(tmp_path / "o/d0-1.png")
    assert info["cmtool:edit"] == "colorize"
    assert info["cmtool:class"] == "2"
    again = cmtool("edit", "colorize", *names, "--class", "2", "--variations", "2", "--out", "o")
    assert again.code == 2
    assert "exists" in again.err


@pytest.mark.parametrize(
    ("size", "fit", "answer"),
    [((16, 12), "crop", (8, 8)), ((16, 12), "resize", (8, 8)), ((6, 5), "pad", (6, 5)),
     ((20, 9), "tile", (20, 9)), ((5, 20), "tile", (5, 20))],
)  # fmt: skip
def test_pictures_of_other_sizes_are_fitted_by_a_named_rule(cmtool, tmp_path, size, fit, answer):
    picture = torch.randint(256, (3, *size), generator=torch.Generator().manual_seed(0))
    (tmp_path / "p.png").write_bytes(png_bytes(picture.to(torch.uint8)))
    arguments = ["edit", "inpaint", "p.png", "--box", "1,1,2,3", "--class", "1", "--out"]
    refused = cmtool(*arguments, "a.png")
    assert refused.code == 3
    assert f"--fit {'tile or crop' if size == (16, 12) else 'tile'}" in refused.err
    result = cmtool(*arguments, "b.png", "--fit", fit)
    assert result.code == 0, result.err
    out = read_image(tmp_path / "b.png")
    assert out.shape == (3, *answer)
    if fit not in ("crop", "resize"):
        mask = torch.zeros(size, dtype=torch.bool)
        mask[1:4, 1:3] = True
        assert torch.equal(out[:, ~mask], picture[:, ~mask].to(torch.uint8))


def test_letters_make_a_mask():
    mask = text_mask("S", 64, 64)
    white = float((mask > 128).float().mean())
    assert 0.05 < white < 0.6
    assert int(mask.max()) == 255
    columns = (mask[0] > 128).any(0).nonzero()
    assert int(columns.max() - columns.min()) > 20
    with pytest.raises(UserError, match="does not fit into 8x8"):
        text_mask("a very long word", 8, 8)


def test_grey_alpha_rotated_and_16_bit_pictures_are_read_right(cmtool, tmp_path):
    ramp = np.linspace(0, 255, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    alpha = np.dstack([ramp, ramp, ramp, np.full((8, 8), 255)]).astype(np.uint8)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    turned = Image.fromarray(np.rot90(ramp.astype(np.uint8)).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # "rotate by 270 degrees to see it"
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("grey", "deep", "alpha", "turned"):
        result = cmtool("edit", "inpaint", f"{name}.png", "--box", "0,0,1,1", "--class", "1",
                        "--out", f"out-{name}.png")  # fmt: skip
        assert result.code == 0, result.err
        out = read_image(tmp_path / f"out-{name}.png").float()
        gap = (out - torch.tensor(ramp)).abs()
        gap[:, 0, 0] = 0
        assert float(gap.max()) <= 1, name


@pytest.mark.slow
def test_edits_are_nearer_to_the_truth_than_plain_answers():
    data = digits("held-out")
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:24]
    truth = from_uint8(data.images[index])
    model = load_model("digits-cd")
    known = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    known[..., :4] = True
    noisy = truth + 0.25 * SeededNoise(range(24))(truth)
    mean = torch.where(known, truth, 0).sum((2, 3), keepdim=True) / known.sum()
    cases = {
        "inpaint": (edits.inpaint(truth, known), torch.where(known, truth, mean), None),
        "superres": (edits.superres(edits.block_means(truth, 2), 2),
                     edits.enlarged(edits.block_means(truth, 2), 2), None),
        "denoise": (edits.denoise(noisy), noisy.clamp(-1, 1), [0.25]),
    }  # fmt: skip
    for name, (edit, plain, levels) in cases.items():
        chosen = edit_plan(model.preset, sigmas=levels)
        answer = in_the_best_class(model, edit, chosen)
        error = float((answer - truth).square().mean().sqrt())
        trivial = float((plain - truth).square().mean().sqrt())
        print(f"{name}: rmse {error:.4f}, plain {trivial:.4f}")
        assert error < trivial, name


def in_the_best_class(model, edit, chosen):
    """Each image's answer under the class that changes least of what was given, as commands do."""
    answers, gaps = [], []
    for label in range(10):
        steps = []

        def project(x0, steps=steps):
            kept = edit.project(x0)
            wanted = edit.init if edit.project is identity else kept
            steps.append((wanted - x0).square().flatten(1).sum(1))
            return kept

        labels = torch.full((24,), label)
        answers.append(run_edit(model, replace(edit, project=project), chosen, range(24), labels))
        gaps.append(torch.stack(steps[1:] or steps).mean(0))
    best = torch.stack(gaps).argmin(0)
    return torch.stack(answers)[best, torch.arange(24)]
