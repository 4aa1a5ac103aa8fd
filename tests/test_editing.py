"""What edits make of their choices: levels, sizes, classes, and the way between two images."""

import math
from dataclasses import replace

import pytest
import torch

from cmtool import edit, editing, sampling
from cmtool.core import edits
from cmtool.core.edits import block_means, gaussian_kernel
from cmtool.core.noise import karras_sigmas
from cmtool.core.rng import SeededNoise, seeded_labels
from cmtool.data.datasets import digits
from cmtool.data.images import from_uint8
from cmtool.errors import InputError, UserError
from cmtool.models import load_model


def with_card(model, part, **changes):
    """The model whose preset says something else of its `model` or `noise`."""
    changed = getattr(model.preset, part).model_copy(update=changes)
    return replace(model, preset=model.preset.model_copy(update={part: changed}))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((256, 256), (5.38, 2.24)), ((512, 512), (10.76, 4.48)), ((64, 64), (1.345, 0.56)),
     ((128, 256), (2.69, 1.12)), ((256, 128), (2.69, 1.12)), ((8, 8), (1.0, 0.4)),
     ((45, 45), (1.0, 0.4))],
)  # fmt: skip
@pytest.mark.parametrize("points", [4, 5, 18, 2000])
def test_levels_of_strokes_shrink_with_the_side_down_to_a_least_one(model, size, wanted, points):
    """The paper's for 256 pixels; of the training grid the ones nearest by their ratio."""
    shown = with_card(with_card(model, "model", image_size=size), "sample", grid=points)
    grid = karras_sigmas(points, *model.noise_range)[1:].tolist()
    nearest = [min(grid, key=lambda k, s=s: abs(math.log(k / s))) for s in wanted]
    assert editing.stroke_levels(shown) == pytest.approx(sorted(set(nearest), reverse=True))
    assert points < 2000 or nearest == pytest.approx(wanted, rel=0.01)


def test_levels_of_strokes_are_never_the_last_of_the_grid(model):
    coarse = with_card(with_card(model, "sample", grid=2), "noise", sigma_min=0.3, sigma_max=80.0)
    assert editing.stroke_levels(coarse) == (80.0,)


def test_the_noise_that_is_estimated_lies_in_the_models_range(model, images):
    low = with_card(model, "noise", sigma_max=0.5)
    for picture, sigma in ((0 * images[:1], 0.002), (5 * SeededNoise([0])(images[:1]), 0.5)):
        prepared = editing.prepare_denoise(low, picture, None, fit="exact", name="it")
        assert prepared.levels == (sigma,)
    for sigma in (0.002, 0.5):
        editing.prepare_denoise(low, images[:1], sigma, fit="exact", name="it")
    for sigma in (0.0019, 0.51):
        with pytest.raises(UserError, match=r"the model knows 0\.002 to 0\.5"):
            editing.prepare_denoise(low, images[:1], sigma, fit="exact", name="it")


def test_a_picture_is_enlarged_by_a_factor_that_does_not_divide_the_models_size(model):
    small = torch.linspace(-0.9, 0.9, 27).reshape(3, 3, 3)
    answer = edit.superres(model, small, 3, fit="pad", steps=1, label=2)
    assert answer.shape == (3, 9, 9)
    torch.testing.assert_close(block_means(answer[None], 3)[0], small, atol=2e-3, rtol=0)
    with pytest.raises(UserError, match="factor 1"):
        edit.superres(model, small, 1, fit="pad")


def test_a_model_of_grey_pictures_makes_no_colours(model, images):
    grey = with_card(model, "model", channels=1)
    with pytest.raises(InputError, match="makes grey pictures"):
        editing.prepare_colorize(grey, images, fit="exact", name="it")


@pytest.mark.parametrize(("h", "w"), [(6, 5), (8, 3)])
def test_an_answer_is_as_large_as_what_was_given(model, images, h, w):
    """Padding is taken off again; known pixels are where they were."""
    picture = images[0, :, :h, :w]
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[1, 1:3] = True
    answer = edit.inpaint(model, picture, mask, fit="pad", steps=1, label=3)
    assert answer.shape == picture.shape
    assert torch.equal(answer[:, ~mask], picture[:, ~mask])
    assert not torch.equal(answer[:, mask], picture[:, mask])


def test_the_way_between_images_is_straight_and_under_one_noise(model, images):
    a, b = images[:2]
    frames = edit.interpolate(model, a, b, frames=5, label=4, seed=7)
    for i, frame in enumerate(frames):
        alone = edit.stroke(model, a + i / 4 * (b - a), label=4, seed=7)
        torch.testing.assert_close(frame, alone, atol=1e-4, rtol=0)


def test_the_way_between_images_takes_the_class_that_fits_the_first(model, images):
    a, b = images[:2]
    chosen = sampling.edit_plan(model.preset, None, None, editing.stroke_levels(model))
    fits = [sampling.best_class(model, edits.stroke(x[None]), chosen, 0) for x in (a, b)]
    assert fits[0] != fits[1]
    frames = edit.interpolate(model, a, b, frames=2)
    assert torch.equal(frames, edit.interpolate(model, a, b, frames=2, label=fits[0]))


def test_the_way_between_seeds_turns_evenly_in_the_class_of_the_first(model):
    label = int(seeded_labels([3], 10))
    assert label != int(seeded_labels([4], 10))
    frames = edit.interpolate(model, 3, 4, frames=5)
    assert torch.equal(frames, edit.interpolate(model, 3, 4, frames=5, label=label))
    back = edit.interpolate(model, 4, 3, frames=5, label=label)
    torch.testing.assert_close(frames, back.flip(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", ["superres", "deblur"])
def test_noise_that_is_told_of_is_taken_out(task, model):
    """Not put back below its level, it does a third less harm and more."""
    held_out = digits("held-out")
    threes = from_uint8(held_out.images[held_out.labels == 3][:24])
    kernel = gaussian_kernel(0.7)
    given = block_means(threes, 2) if task == "superres" else edits.blur(threes, kernel)
    given = given + 0.4 * SeededNoise(range(len(threes)))(given)

    def error(noise):
        options = {"noise": noise, "steps": 20, "label": 3}
        if task == "superres":
            answers = edit.superres(model, given, 2, **options)
        else:
            answers = edit.deblur(model, given, kernel, **options)
        return float((answers - threes).square().mean().sqrt())

    assert error(0.4) < 0.75 * error(0.0)
    with pytest.raises(UserError, match="--noise 3"):
        error(3.0)


def test_a_teacher_and_an_unknown_class_are_refused(model, images):
    teacher = load_model("digits-edm")
    for edited in (
        lambda: edit.stroke(teacher, images),
        lambda: edit.interpolate(teacher, images[0], images[1]),
    ):
        with pytest.raises(UserError, match="digits-edm is a teacher model: edits need"):
            edited()
    for label in (-5, 10):
        with pytest.raises(UserError, match=f"no class {label}"):
            edit.stroke(model, images, label=label)
        with pytest.raises(UserError, match=f"no class {label}"):
            edit.interpolate(model, 3, 7, label=label)


def test_more_noise_than_all_levels_is_refused(model, images):
    with pytest.raises(UserError, match=r"noise of 1\.6 in what was given, and levels up to 1\.5"):
        edit.superres(model, images[:, :, ::2, ::2], noise=1.6, sigmas=[1.5])
