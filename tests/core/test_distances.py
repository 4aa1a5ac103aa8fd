import math
import warnings
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from cmtool.core.distances import (
    DISTANCES,
    TRUNKS,
    is_norm,
    l1,
    l2,
    l2_32,
    linf,
    lpips,
    pseudo_huber,
)
from cmtool.core.tangents import curvature, half_square
from cmtool.errors import MissingError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder where torchvision's weights are looked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def squeeze(hub):
    """Random weights in the real format where the library looks; returns the file."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    file = hub / TRUNKS["squeeze"].file
    torch.save(squeezenet1_1().state_dict(), file)
    return file


def images():
    return torch.rand(2, 2, 3, 40, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", [name for name in DISTANCES if name != "lpips"])
def test_every_distance_is_one_number_per_image_symmetric_and_zero_on_itself(name):
    x, y = torch.randn(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    d = DISTANCES[name]
    assert d(x, y).shape == (5,)
    assert (d(x, y) > 0).all()
    torch.testing.assert_close(d(x, y), d(y, x))
    torch.testing.assert_close(d(x, x), torch.zeros(5), atol=1e-7, rtol=0)
    alone = torch.cat([d(x[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(d(x, y), alone)


def test_values_by_hand():
    x = torch.zeros(1, 3, 2, 2)
    y = torch.full_like(x, 0.5)
    assert float(l1(x, y)) == 0.5
    assert float(l2(x, y)) == 0.25
    y[0, 1, 0, 1] = -2.0
    assert float(linf(x, y)) == 2.0
    y[0, 1, 0, 1] = 0.5
    expected = math.sqrt(12 * 0.25 + 0.3**2) - 0.3
    assert float(pseudo_huber(x, y, c=0.3)) == pytest.approx(expected)


def test_pseudo_huber_without_c_is_the_norm_and_has_no_gradient_where_both_are_equal():
    x = torch.zeros(2, 1, 1, 2, requires_grad=True)
    d = pseudo_huber(x, torch.tensor([[3.0, 4.0], [0.0, 0.0]]).reshape(2, 1, 1, 2), c=0)
    assert d.tolist() == [5, 0]
    d.sum().backward()
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([-0.6, -0.8, 0, 0]))


@pytest.mark.parametrize("name", DISTANCES)
def test_norms_are_told_apart_with_options_or_without(name):
    wanted = name in ("l1", "linf")
    assert is_norm(DISTANCES[name]) == is_norm(partial(DISTANCES[name])) == wanted


def test_l2_32_compares_small_pictures():
    """Bilinear by two keeps each output pixel's mean of four, so a checkerboard is invisible."""
    x = torch.zeros(1, 3, 64, 64)
    sign = 1 - 2 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2)
    torch.testing.assert_close(l2_32(x, x + sign), torch.zeros(1))
    torch.testing.assert_close(l2_32(x, x + 0.5), torch.full((1,), 0.25))
    small, other = images()[:, :, :, :32]
    torch.testing.assert_close(l2_32(small, other), l2(small, other))


def test_l2_32_enlarges_as_it_shrinks_by_the_centres_of_pixels():
    x = torch.zeros(1, 1, 16, 16)
    y = torch.arange(16.0).expand(1, 1, 16, 16)
    ramp = ((torch.arange(32) + 0.5) / 2 - 0.5).clamp(0, 15)
    assert float(l2_32(x, y)) == pytest.approx(float(ramp.square().mean()))


def test_pseudo_huber_takes_its_norm_over_the_image_with_the_published_constant():
    x = torch.zeros(1, 3, 32, 32)
    y = torch.full_like(x, 0.2)
    c = 0.0299  # 0.00054 sqrt(3 * 32 * 32)
    expected = math.sqrt(3072 * 0.04 + c**2) - c
    assert float(pseudo_huber(x, y)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("squeeze")
def test_lpips_is_the_packages_with_the_resize_and_pooling_of_each_source():
    import lpips as package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = package.LPIPS(net="squeeze", verbose=False).eval()
    x, y = images()
    wide = [F.interpolate(i, (224, 224), mode="bilinear", align_corners=False) for i in (x, y)]
    with torch.no_grad():
        expected = theirs(*wide).flatten()
        torch.testing.assert_close(lpips(x, y, net="squeeze", pooling="max"), expected)
        torch.testing.assert_close(
            lpips(x, y, net="squeeze", pooling="max", resize="never"), theirs(x, y).flatten()
        )
        averaged = lpips(x, y, net="squeeze")
    assert not torch.allclose(averaged, expected, rtol=1e-3)
    large = [F.interpolate(i, (256, 256)) for i in (x, y)]
    same = [lpips(*large, net="squeeze", resize=how) for how in ("below_256", "never")]
    assert torch.equal(*same)
    assert not torch.equal(same[0], lpips(*large, net="squeeze", resize="always"))


@pytest.mark.parametrize(
    ("side", "how", "seen"),
    [(32, "below_256", 224), (240, "below_256", 224), (255, "below_256", 224),
     (256, "below_256", 256), (300, "below_256", 300), (300, "always", 224), (32, "never", 32)],
)  # fmt: skip
def test_lpips_is_of_pictures_of_224_below_256(side, how, seen, monkeypatch):
    def sides(x, y):
        return (x[0, 0] + y[0, 0]).numel() * torch.ones(len(x), 1, 1, 1)

    monkeypatch.setattr("cmtool.core.distances._lpips_network", lambda *_: sides)
    x = torch.zeros(2, 3, side, side)
    assert lpips(x, x, resize=how).tolist() == [seen**2] * 2


@pytest.mark.usefixtures("squeeze")
def test_lpips_differentiates_its_first_image_in_float32_and_nothing_of_its_own():
    x, y = images()
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        d = lpips(x, y, net="squeeze")
    assert d.dtype == torch.float32
    assert d.shape == (2,)
    d.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close(lpips(y, y, net="squeeze"), torch.zeros(2), atol=1e-7, rtol=0)
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    lpips(black, black.detach(), net="squeeze").sum().backward()
    assert torch.isfinite(black.grad).all()


def test_lpips_names_the_file_that_is_missing_and_where_it_comes_from(hub):
    with pytest.raises(MissingError, match=r"vgg16-397923af\.pth") as caught:
        lpips(*images())
    assert str(hub) in caught.value.what
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in caught.value.hint


@pytest.mark.parametrize("content", [b"<html>", b"PK\x03\x04" + bytes(1000)])
def test_lpips_names_a_file_that_is_damaged(hub, content):
    (hub / TRUNKS["vgg"].file).write_bytes(content)
    with pytest.raises(MissingError, match="damaged") as caught:
        lpips(*images())
    assert "delete it" in caught.value.hint


@pytest.mark.usefixtures("squeeze")
@pytest.mark.parametrize(("pooling", "bound"), [("avg", 0.02), ("max", 0.1)])  # max has kinks
def test_lpips_has_the_curvature_that_its_gradient_says(pooling, bound):
    """Which is what continuous time trains with: a Hessian-vector product through the network."""
    distance = partial(lpips, net="squeeze", pooling=pooling)
    x0, v = images()
    distance(x0, x0)
    h_v = curvature(distance, x0, v)
    gradient = torch.func.grad(lambda x: distance(x, x0).sum())
    h = 1e-3
    difference = (gradient(x0 + h * v) - gradient(x0 - h * v)) / (2 * h)
    assert float((h_v - difference).norm() / h_v.norm()) < bound
    near = distance(x0 + h * v, x0) / h**2
    torch.testing.assert_close(half_square(distance, x0, v), near, rtol=bound, atol=0)
    assert torch.isfinite(curvature(distance, torch.zeros_like(x0), v)).all()
