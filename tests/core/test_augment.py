import math

import pytest
import torch

from cmtool.core.augment import (
    LABELS,
    OCTAVES,
    SHIFT,
    SYM6,
    Warps,
    affine,
    augmented,
    draw_warps,
    resampled,
    rotation,
    warp_labels,
    warped,
)
from cmtool.core.losses import karras
from cmtool.core.networks.song import Song, SongOptions
from cmtool.core.noise import Stage, lognormal
from cmtool.core.precond import Preconditioned, edm_scalings, log_label
from cmtool.core.rng import step_generator
from tests.objectives import alone, objective_of

SIZES = [(8, 8), (32, 32), (10, 14), (1, 5), (2, 3)]


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def still(count=1, **changes):
    """Warps that do nothing but what is given, the same for each image."""
    whole = {name: torch.zeros(count, dtype=torch.float64) for name in Warps._fields}
    whole |= {name: torch.zeros(count, dtype=torch.bool) for name in ("flip_x", "flip_y")}
    for name, value in changes.items():
        whole[name] = torch.full((count,), value, dtype=whole[name].dtype)
    return Warps(**whole)


def smooth(height, width, channels=3):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(x / 5 + c) * torch.cos(y / 6 - c) for c in range(channels)]
    return torch.stack(waves)[None]


def test_sym6_is_orthogonal_and_has_six_vanishing_moments():
    h = torch.tensor(SYM6, dtype=torch.float64)
    shifts = torch.stack([h[2 * n :] @ h[: 12 - 2 * n] for n in range(6)])
    assert torch.allclose(shifts, torch.eye(6, dtype=torch.float64)[0], atol=1e-11)
    k = torch.arange(12, dtype=torch.float64)
    moments = torch.stack([(k**n * (-1) ** k * h).sum() for n in range(7)])
    assert moments[:6].abs().max() < 1e-8
    assert moments[6].abs() > 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_drawn_changes_nothing(size, channels):
    x = noise(4, channels, *size)
    assert torch.equal(warped(x, still(4)), x)
    out = resampled(x, torch.eye(2).expand(4, 2, 2), torch.zeros(4, 2))
    assert torch.allclose(out, x, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in Warps._fields if name != "axis"])
def test_each_warp_alone_moves_its_images_and_no_other(name):
    x = noise(3, 3, 8, 8)
    one = still(3, **{name: True if name.startswith("flip") else 0.7})
    one = Warps(*(w * torch.tensor([False, True, False]) for w in one))
    moved = warped(x, one)
    assert [torch.equal(a, b) for a, b in zip(moved, x, strict=True)] == [True, False, True]


@pytest.mark.parametrize("size", SIZES)
def test_flips_are_exact(size):
    x = noise(3, 3, *size)
    assert torch.equal(warped(x, still(3, flip_x=True)), x.flip(3))
    assert torch.equal(warped(x, still(3, flip_y=True)), x.flip(2))
    assert torch.equal(warped(x, still(3, flip_x=True, flip_y=True)), x.flip(2, 3))


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, -2), (-5, 4), (31, 17)])
def test_whole_pixels_move_exactly_and_bring_in_the_mirror_image(dx, dy):
    h, w = 10, 14
    x = noise(2, 3, h, w)
    moved = warped(x, still(2, shift_x=dx / (SHIFT * w), shift_y=dy / (SHIFT * h)))

    def mirror(index, side):
        index = index % (2 * side - 2)
        return min(index, 2 * side - 2 - index)

    rows = torch.tensor([mirror(i - dy, h) for i in range(h)])
    columns = torch.tensor([mirror(j - dx, w) for j in range(w)])
    assert torch.allclose(moved, x[:, :, rows][:, :, :, columns], atol=2e-5)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_exact_to_the_filters_tolerance(turns):
    x = smooth(32, 32)
    turned = warped(x, still(angle=turns * math.pi / 2))
    inside = (..., slice(8, -8), slice(8, -8))
    assert torch.allclose(turned[inside], torch.rot90(x, turns, (2, 3))[inside], atol=0.04)


def test_the_warps_together_are_one_affine_map_of_smooth_pictures():
    """A picture that is a linear function of the place is that function of the place it is from."""
    h, w = 24, 40
    y, x = torch.meshgrid(
        torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2, indexing="ij"
    )
    picture = torch.stack([x, y])[None]
    warps = still(octaves=0.7, angle=0.3, stretch=-0.8, axis=1.1, shift_x=0.4, shift_y=-0.3)
    grow, along = 2 ** (OCTAVES * 0.7), 2 ** (OCTAVES * -0.8)
    turn = rotation(torch.tensor([1.1])).double()[0]
    stretch = turn @ torch.diag(torch.tensor([along, 1 / along], dtype=torch.float64)) @ turn.T
    forward = grow * stretch @ rotation(torch.tensor([-0.3])).double()[0]
    shift = torch.tensor([0.4 * SHIFT * w, -0.3 * SHIFT * h], dtype=torch.float64)
    inverse, found = affine(warps, w, h)
    assert torch.allclose(inverse[0] @ forward, torch.eye(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found[0], shift)
    out = warped(picture, warps)[0]
    place = torch.stack([x, y], -1).double() - shift
    wanted = (place @ torch.linalg.inv(forward).T).permute(2, 0, 1).float()
    inside = (slice(None), slice(9, -9), slice(12, -12))
    assert torch.allclose(out[inside], wanted[inside], atol=0.05)


def test_warps_are_as_strong_as_edms():
    """Deviations of 0.2 in log2 of the scales and of an eighth of the side (its AugmentPipe)."""
    inverse, shift = affine(still(shift_x=1.0, shift_y=-2.0), 32, 16)
    assert shift.tolist() == [[4, -4]]
    assert torch.equal(inverse[0], torch.eye(2, dtype=torch.float64))
    inverse, _ = affine(still(octaves=5.0), 32, 16)
    torch.testing.assert_close(inverse[0], torch.eye(2, dtype=torch.float64) / 2)
    inverse, _ = affine(still(stretch=5.0), 32, 16)
    torch.testing.assert_close(inverse[0], torch.diag(torch.tensor([0.5, 2]).double()))


def test_labels_have_edms_order():
    warps = still(
        flip_x=True, octaves=0.3, angle=0.5, stretch=0.7, axis=0.2, shift_x=1.5, shift_y=-2
    )
    wanted = [
        1, 0, 0.3, math.cos(0.5) - 1, math.sin(0.5),
        0.7 * math.cos(0.2), 0.7 * math.sin(0.2), 1.5, -2,
    ]  # fmt: skip
    assert warp_labels(warps)[0].tolist() == pytest.approx(wanted)
    assert warp_labels(still(flip_y=True))[0].tolist() == [0, 1, *[0] * 7]
    assert (warp_labels(still()) == 0).all()


@pytest.mark.parametrize("p", [0.12, 1.0])
def test_each_warp_comes_as_often_and_as_far_as_it_should(p):
    n = 40_000
    w = draw_warps(n, p, torch.Generator().manual_seed(0))
    near = {"abs": 5 / math.sqrt(n)}
    assert float(w.flip_x.double().mean()) == pytest.approx(0.5, **near)
    assert float(w.flip_y.double().mean()) == pytest.approx(0.5 * p, **near)
    for value in (w.octaves, w.stretch, w.shift_x, w.shift_y):
        assert float((value != 0).double().mean()) == pytest.approx(p, **near)
        assert float(value.mean()) == pytest.approx(0, **near)
        assert float(value[value != 0].square().mean()) == pytest.approx(1, abs=0.1)
    assert float((w.angle != 0).double().mean()) == pytest.approx(p, **near)
    assert float(w.angle.abs().max()) == pytest.approx(math.pi, abs=0.01)
    assert float((w.axis != 0).double().mean()) == pytest.approx(p / 2, **near)
    assert torch.equal(w.shift_x != 0, w.shift_y != 0)
    assert not ((w.axis != 0) & (w.stretch == 0)).any()
    labels = warp_labels(w).mean(0)
    wanted = [0.5, p / 2, 0, -p, 0, 0, 0, 0, 0]  # E[cos] = 0
    assert labels.tolist() == pytest.approx(wanted, abs=6 / math.sqrt(n))


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_no_warp_tells_of_another(p):
    n = 40_000
    w = draw_warps(n, p, torch.Generator().manual_seed(0))
    drawn = [w.octaves != 0, w.angle != 0, w.stretch != 0, w.shift_x != 0] if p < 1 else []
    values = torch.stack([each.double() for each in (*w, *drawn)])
    related = torch.corrcoef(values) - torch.eye(len(values), dtype=torch.float64)
    assert float(related.abs().max()) < 5 / math.sqrt(n)


def test_warps_are_a_function_of_the_generator_alone_and_belong_to_one_image_each():
    x = noise(6, 3, 8, 8)
    a, said = augmented(x, step_generator(1, 2, 3), p=0.5)
    b, again = augmented(x, step_generator(1, 2, 3), p=0.5)
    assert torch.equal(a, b)
    assert torch.equal(said, again)
    assert said.dtype == x.dtype
    other = torch.cat([x[:3], noise(3, 3, 8, 8, seed=1)])
    c, _ = augmented(other, step_generator(1, 2, 3), p=0.5)
    assert torch.allclose(a[:3], c[:3], atol=1e-6)
    assert not torch.equal(a, augmented(x, step_generator(1, 2, 4), p=0.5)[0])


def test_autocast_changes_nothing():
    x = noise(6, 3, 8, 8)
    wanted, _ = augmented(x, step_generator(0, 0, 0), p=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found, said = augmented(x, step_generator(0, 0, 0), p=1.0)
    assert torch.equal(found, wanted)
    assert said.dtype == torch.float32


def test_the_network_hears_in_training_how_its_images_were_warped():
    heard = []

    class Listener(Song):
        def forward(self, x, noise_label, labels=None, augment_labels=None):
            heard.append(augment_labels)
            return super().forward(x, noise_label, labels, augment_labels)

    options = SongOptions(model_channels=16, channel_mult=(1, 2), num_blocks=1, augment_dim=LABELS)
    network = Listener(options, 3)
    denoiser = Preconditioned(network, edm_scalings, log_label, sigma_data=0.5, sigma_min=0.002)
    fixed = still(4, octaves=1.0, shift_x=-2.0)

    def augment(x, generator):
        return warped(x, fixed), warp_labels(fixed).to(x)

    objective = objective_of("denoising", lognormal, weight=karras, augment=augment)
    x0 = noise(4, 3, 16, 16)
    objective(alone(denoiser), x0, None, Stage(), step_generator(0, 0, 0)).loss.mean().backward()
    assert torch.equal(heard[0], warp_labels(fixed).float())
    assert network.map_augment.weight.grad.abs().sum(0)[[2, 7]].min() > 0
    assert network.map_augment.weight.grad[:, [0, 1, 3, 4, 5, 6, 8]].abs().max() == 0
    denoiser(x0, torch.ones(4))
    assert heard[1] is None


def test_the_loss_is_that_of_the_warped_images():
    seen = []

    def student(x, sigma, labels, *, augment_labels):
        seen.append((x, sigma))
        return torch.zeros_like(x)

    def augment(x, generator):
        return x + 1, torch.zeros(len(x), LABELS)

    objective = objective_of("denoising", lognormal, augment=augment)
    x0 = noise(2, 3, 4, 4)
    loss = objective(alone(student), x0, None, Stage(), step_generator(0, 0, 0)).loss
    assert torch.allclose(loss, (x0 + 1).square().flatten(1).mean(1))
    plain = objective_of("denoising", lognormal)
    clean = []
    student = lambda x, sigma, labels: clean.append(x) or x  # noqa: E731
    plain(alone(student), x0, None, Stage(), step_generator(0, 0, 0))
    assert torch.allclose(seen[0][0], clean[0] + 1, atol=1e-5)


def test_shapes_alone_are_warped_too():
    """The memory and the work of a step are found on the meta device."""
    x = torch.empty(4, 3, 8, 8, device="meta")
    assert warped(x, still(4, octaves=0.5)).shape == x.shape
