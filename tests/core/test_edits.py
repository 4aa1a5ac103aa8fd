import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool.cli.edit import EDITS
from cmtool.core.edits import (
    block_means,
    blur,
    colorize,
    deblur,
    denoise,
    estimate_sigma,
    gaussian_kernel,
    inpaint,
    interpolate,
    luma,
    motion_kernel,
    none_at_first,
    spectrum,
    stroke,
    superres,
    while_above,
)
from cmtool.core.samplers import multistep
from cmtool.data.images import from_uint8, to_uint8
from cmtool.errors import InputError, UserError
from tests.problems import Gaussian, randn_like_from


def of_inpaint(reference, factor, known):
    edit = inpaint(reference, known)
    return edit, lambda x: x[known.expand_as(x)], reference[known.expand_as(reference)]


def of_superres(reference, factor, known):
    low = block_means(reference, factor)
    return superres(low, factor), lambda x: block_means(x, factor), low


def of_colorize(reference, factor, known):
    return colorize(luma(reference)), luma, luma(reference)


def of_nothing(reference, factor, known):
    return stroke(reference), lambda x: x[:0], reference[:0]


def of_deblur(reference, factor, known):
    kernel = gaussian_kernel(0.3 * factor)[1:-1, 1:-1]
    h, w = reference.shape[-2:]
    if kernel.shape[0] > min(h, w):
        kernel = torch.ones(1, 1)
    share = spectrum(kernel / kernel.sum(), reference)

    def kept(x):
        return torch.view_as_real(torch.fft.rfft2(x) * (share.abs() >= 0.1))

    kernel = kernel / kernel.sum()
    return deblur(blur(reference, kernel), kernel), kept, kept(reference)


KEEPS = {"inpaint": of_inpaint, "superres": of_superres, "colorize": of_colorize,
         "deblur": of_deblur, "stroke": of_nothing, "denoise": of_nothing,
         "variations": of_nothing, "outpaint": of_inpaint}  # fmt: skip


def test_every_edit_is_tested():
    assert KEEPS.keys() == EDITS.keys()


@pytest.mark.parametrize("name", KEEPS)
@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9), b=st.integers(1, 3), f=st.integers(1, 3),
       seed=st.integers(0, 99))  # fmt: skip
def test_projection_is_idempotent_affine_and_keeps_what_was_given(name, h, w, b, f, seed):
    g = torch.Generator().manual_seed(seed)
    if name == "superres":
        h, w = h * f, w * f
    reference, x, y = torch.randn(3, b, 3, h, w, generator=g)
    known = torch.rand(1, 1, h, w, generator=g) < 0.5
    edit, kept, given_ = KEEPS[name](reference, f, known)
    project = edit.project
    torch.testing.assert_close(project(project(x)), project(x))
    middle = project(0.3 * x + 0.7 * y)
    torch.testing.assert_close(middle, 0.3 * project(x) + 0.7 * project(y))
    torch.testing.assert_close(kept(project(x)), given_)
    torch.testing.assert_close(kept(edit.init), given_)


@pytest.mark.parametrize("name", sorted(KEEPS.keys() - {"deblur"}))
@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), f=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_answer_lies_in_range_and_keeps_what_was_given_to_half_a_level(name, h, w, f, seed):
    g = torch.Generator().manual_seed(seed)
    picture = torch.randint(256, (2, 3, h * f, w * f), generator=g, dtype=torch.uint8)
    reference = from_uint8(picture)
    known = torch.rand(1, 1, h * f, w * f, generator=g) < 0.5
    edit, kept, given_ = KEEPS[name](reference, f, known)
    wild = edit.project(3 * torch.randn(reference.shape, generator=g))
    answer = edit.finish(wild)
    assert float(answer.abs().max()) <= 1
    torch.testing.assert_close(kept(answer), given_.clamp(-0.9999, 0.9999), atol=2e-4, rtol=0)
    rounded = from_uint8(to_uint8(answer))
    assert float((kept(rounded) - given_).abs().max() if len(given_) else 0) <= 1 / 127.5


def test_the_answer_is_the_nearest_that_keeps_what_was_given():
    g = torch.Generator().manual_seed(0)
    x, low = 2 * torch.randn(1, 1, 2, 2, generator=g).double(), torch.tensor([[[[0.3]]]]).double()
    answer = superres(low, 2).finish(x)
    ways = torch.rand(400_000, 1, 2, 2, generator=g).double() * 2 - 1
    ways = ways + (low - block_means(ways, 2))
    ways = ways[(ways.abs() <= 1).flatten(1).all(1)]
    gaps = (ways - x).square().sum((1, 2, 3))
    best = float((answer - x).square().sum())
    assert best <= float(gaps.min()) + 1e-9
    assert best == pytest.approx(float(gaps.min()), rel=0.02)


def test_a_blur_is_that_of_a_convolution_that_goes_on_at_the_other_side():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 8, generator=g, dtype=torch.float64)
    for kernel in (gaussian_kernel(0.7), motion_kernel(3.0, 30.0)):
        h, w = kernel.shape
        around = torch.nn.functional.pad(x, (w // 2,) * 2 + (h // 2,) * 2, mode="circular")
        weights = kernel.flip(0, 1).expand(3, 1, h, w)
        expected = torch.nn.functional.conv2d(around, weights, groups=3)
        torch.testing.assert_close(blur(x, kernel), expected)
        assert float(kernel.sum()) == pytest.approx(1)


def test_a_motion_is_as_long_and_as_steep_as_it_says():
    kernel = motion_kernel(9.0, 30.0)
    rows, columns = torch.meshgrid(*(torch.arange(n) - n // 2 for n in kernel.shape), indexing="ij")
    mean = [float((kernel * axis).sum()) for axis in (rows, columns)]
    assert mean == pytest.approx([0, 0], abs=1e-9)
    spread = float((kernel * (rows**2 + columns**2)).sum())
    assert spread == pytest.approx(9.0**2 / 12, rel=0.05)
    assert float((kernel * rows * columns).sum()) < 0  # up to the right
    steep = float((kernel * rows**2).sum() / (kernel * columns**2).sum())
    assert steep == pytest.approx(1 / 3, abs=0.05)
    assert float(motion_kernel(1e-9, 0)[1, 1]) == pytest.approx(1)


def test_what_a_blur_left_too_little_of_is_not_blown_up():
    kernel, g = gaussian_kernel(1.5), torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 16, 16, generator=g)
    noise = 0.01 * torch.randn(1, 3, 16, 16, generator=g)
    clean, noisy = (deblur(blur(x, kernel) + n, kernel).init for n in (0 * noise, noise))
    assert float((noisy - clean).square().mean().sqrt()) < 0.1
    with pytest.raises(UserError, match="blur of 11x11 pixels"):
        deblur(torch.zeros(1, 3, 9, 30), kernel)


def test_colours_orthogonal_to_the_luma_are_free():
    g = torch.Generator().manual_seed(0)
    gray, x = torch.randn(1, 1, 3, 3, generator=g), torch.randn(1, 3, 3, 3, generator=g)
    moved = colorize(gray).project(x) - x
    along = torch.tensor([0.2989, 0.5870, 0.1140]).reshape(3, 1, 1)
    torch.testing.assert_close(torch.linalg.cross(moved[0], along.expand_as(moved[0]), dim=0),
                               torch.zeros(3, 3, 3), atol=1e-6, rtol=0)  # fmt: skip


@pytest.mark.parametrize(
    ("size", "factor", "good"),
    [((12, 8), 5, "use one of 2, 4"), ((12, 8), 3, "use one of 2, 4"),
     ((8, 12), 3, "use one of 2, 4"),
     ((9, 8), 2, "crop the picture")],
)  # fmt: skip
def test_a_factor_that_does_not_divide_names_those_that_do(size, factor, good):
    shown = f"factor of {factor} does not divide the size {size[1]}x{size[0]}"
    with pytest.raises(UserError, match=shown) as error:
        block_means(torch.zeros(1, 3, *size), factor)
    assert error.value.hint == good


def test_a_factor_below_one_is_refused():
    with pytest.raises(UserError, match="factor of 0"):
        superres(torch.zeros(1, 3, 4, 4), 0)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(superres(x, 1).project(torch.zeros_like(x)), x)


def test_interpolation_keeps_the_norm_and_reaches_both_ends():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 3, 8, 8, generator=g)
    b = b / b.norm() * a.norm()
    path = interpolate(a, b, torch.linspace(0, 1, 9))
    torch.testing.assert_close(path[:1], a)
    torch.testing.assert_close(path[-1:], b)
    norms = path.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, a.norm().expand(9), rtol=1e-5, atol=0)
    angles = torch.nn.functional.cosine_similarity(path[:-1].flatten(1), path[1:].flatten(1)).acos()
    torch.testing.assert_close(angles, angles[:1].expand(8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("degrees", [0.1, 1, 30, 60, 89, 120, 179])
def test_interpolation_turns_at_one_speed_whatever_the_angle(degrees):
    g = torch.Generator().manual_seed(0)
    first, other = torch.linalg.qr(torch.randn(48, 2, generator=g).double()).Q.T * 48**0.5
    w, angle = torch.linspace(0, 1, 7).double(), math.radians(degrees)
    a, across = first.reshape(1, 3, 4, 4), other.reshape(1, 3, 4, 4)
    path = interpolate(a, math.cos(angle) * a + math.sin(angle) * across, w)
    turned = (w * angle).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(path, turned.cos() * a + turned.sin() * across)


def test_equal_ends_stay_where_they_are():
    a = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(interpolate(a, a, torch.tensor([0.3])), a)


def test_the_first_draw_for_a_noisy_image_is_none():
    draw = none_at_first(torch.ones_like)
    x = torch.zeros(1, 1, 2, 2)
    assert [float(draw(x).sum()) for _ in range(3)] == [0.0, 4.0, 4.0]


def test_denoising_one_level_is_the_exact_map():
    problem, noisy = Gaussian(), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    edit = denoise(noisy)
    assert edit.is_noisy
    x0 = multistep(
        problem.consistency, edit.init, [2.0], none_at_first(randn_like_from(0)),
        sigma_min=problem.eps, project=edit.project,
    )  # fmt: skip
    torch.testing.assert_close(x0, problem.at(noisy, 2.0, problem.eps))


def test_what_is_noisy_is_put_back_at_levels_above_its_noise():
    projected = while_above(lambda x0: x0 + 1, [80.0, 2.0, 0.5, 0.1], 0.5)
    assert [float(projected(torch.zeros(()))) for _ in range(4)] == [1, 1, 0, 0]
    always = while_above(lambda x0: x0 + 1, [80.0, 0.002], 0.0)
    assert [float(always(torch.zeros(()))) for _ in range(2)] == [1, 1]


def test_a_blurred_frequency_that_noise_drowns_is_generated():
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    kernel = gaussian_kernel(0.7)
    share = spectrum(kernel, image).abs()
    kept = {}
    for noise in (0.0, 0.2, 5.0):
        start = torch.fft.rfft2(deblur(image, kernel, noise).init.double()).abs()
        kept[noise] = start[0, 0] > 1e-4
        least = min(max(0.1, 1.5 * noise), 0.9)
        assert torch.equal(kept[noise], share >= least)
    assert kept[0.0].sum() > kept[0.2].sum() > kept[5.0].sum() > 0


def test_the_noise_level_is_the_median_of_the_fine_details_over_its_share_in_a_deviation():
    """Donoho & Johnstone: half of a normal law lies within 0.6745 deviations."""
    parts = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # each block's diagonal detail is half of it
    block = torch.cat([2 * c * parts for c in (0.1, -0.2, 0.3, 0.4, -5.0)], 1)
    image = torch.zeros(2, 1, 3, 11)  # the odd row and column are in no block
    image[1, 0, :2, :10] = block
    image[:, :, 2], image[:, :, :, 10] = 9, 9
    assert estimate_sigma(image).tolist() == pytest.approx([0, 0.3 / 0.6745])
    lines = torch.arange(4.0).expand(1, 1, 4, 4)
    for smooth in (lines, lines.mT, lines.square() + lines.mT.square()):
        assert float(estimate_sigma(smooth)) == 0


@pytest.mark.parametrize("sigma", [0.02, 0.2, 1.0])
def test_the_noise_level_of_a_smooth_picture_is_found(sigma):
    ramp = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64)
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = estimate_sigma(ramp + sigma * noise)
    torch.testing.assert_close(found, torch.full((2,), sigma), rtol=0.05, atol=0)


def test_the_start_does_not_see_the_hole():
    reference = torch.full((1, 3, 2, 2), 0.9)
    known = torch.tensor([[[[True, False], [False, True]]]])
    edit = inpaint(reference, known)
    assert torch.equal(edit.init, torch.where(known, 0.9, 0.0).expand(1, 3, 2, 2))


def test_inpainting_keeps_known_pixels_through_sampling():
    reference = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    known = torch.rand(1, 1, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    edit, problem = inpaint(reference, known), Gaussian()
    x0 = multistep(
        problem.consistency, edit.init, [80.0, 2.0, 0.5], randn_like_from(0),
        sigma_min=problem.eps, project=edit.project,
    )  # fmt: skip
    where = known.expand_as(x0)
    assert torch.equal(x0[where], reference[where])
    assert not torch.equal(x0[~where], reference[~where])


@pytest.mark.parametrize(("h", "w"), [(5, 4), (7, 4), (5, 6), (1, 6)])
def test_a_mask_of_another_size_names_both(h, w):
    with pytest.raises(InputError, match=f"mask is {w}x{h} but the image is 6x7"):
        inpaint(torch.zeros(1, 3, 7, 6), torch.ones(1, 1, h, w, dtype=torch.bool))


def test_the_weights_of_a_path_go_to_where_the_noise_is(monkeypatch):
    """The meta device stands in for a GPU; what is read of it is replaced."""
    monkeypatch.setattr(math, "sin", lambda _: 0.5)
    a, b = torch.zeros(2, 1, 3, 4, 4, device="meta")
    assert interpolate(a, b, torch.linspace(0, 1, 5)).shape == (5, 3, 4, 4)
