import pytest
import torch

from cmtool.core.metrics import (
    DigitsFeatures,
    Gaussian,
    GaussianSums,
    frechet_distance,
    statistics,
)
from cmtool.errors import InputError


def of(rows):
    sums = GaussianSums()
    sums.add(rows)
    return sums.gaussian()


def features(n=500, d=6, seed=0, shift=0.0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) * scale + shift


def test_streamed_statistics_equal_numpy_for_any_batching_far_from_zero():
    rows = features(shift=1e4)
    for size in (500, 7, 1):
        sums = GaussianSums()
        for part in rows.split(size):
            sums.add(part)
        gaussian = sums.gaussian()
        torch.testing.assert_close(gaussian.mean, rows.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(gaussian.covariance, rows.T.cov(), rtol=1e-7, atol=1e-9)
        assert gaussian.num == 500


def test_distance_of_diagonal_gaussians_in_closed_form():
    a = Gaussian(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()), 9)
    b = Gaussian(torch.ones(3).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0]).double()), 9)
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 4, rel=1e-12)


def test_distance_of_rotated_gaussians_does_not_change():
    a, b = of(features(seed=1)), of(features(seed=2, scale=2.0, shift=0.5))
    q = torch.linalg.qr(features(6, 6, seed=3)).Q

    def turned(g):
        return Gaussian(q @ g.mean, q @ g.covariance @ q.T, g.num)

    assert frechet_distance(turned(a), turned(b)) == pytest.approx(frechet_distance(a, b))


def test_distance_to_itself_is_zero_and_it_is_symmetric():
    a, b = of(features(seed=1)), of(features(seed=2, scale=2.0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_a_singular_covariance_is_no_obstacle():
    few = of(features(n=4, d=20, seed=1))
    many = of(features(n=1000, d=20, seed=2))
    # against the form with singular values of the centred features
    a = (features(n=4, d=20, seed=1) - few.mean) / 3**0.5
    b = (features(n=1000, d=20, seed=2) - many.mean) / 999**0.5
    expected = (few.mean - many.mean).square().sum() + (a**2).sum() + (b**2).sum()
    expected -= 2 * torch.linalg.svdvals(a @ b.T).sum()
    assert frechet_distance(few, many) == pytest.approx(float(expected), rel=1e-6)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="6 and of 7 features"):
        frechet_distance(of(features(d=6)), of(features(d=7)))
    with pytest.raises(InputError, match="not finite"):
        frechet_distance(of(features()), of(features() * float("nan")))
    with pytest.raises(InputError, match="1 image to evaluate"):
        of(features(n=1))


def test_digits_features_have_their_width_and_refuse_other_sizes():
    network = DigitsFeatures().eval()
    images = torch.zeros(5, 3, 8, 8)
    assert network(images).shape == (5, DigitsFeatures.WIDTH)
    assert statistics(network, images.split(2)).num == 5
    with pytest.raises(InputError, match="not 9x8 with 3 channels"):
        network(torch.zeros(1, 3, 8, 9))
