import pytest
import torch

from cmtool.errors import InputError
from cmtool.evaluation.gaussian import Gaussian, GaussianSums, frechet_distance, root_of


def of(rows):
    sums = GaussianSums(rows.shape[1])
    sums.add(rows)
    return sums.gaussian()


def features(n=500, d=6, seed=0, shift=0.0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) * scale + shift


def test_streamed_statistics_equal_numpy_for_any_batching_far_from_zero():
    rows = features(shift=1e4)
    for size in (500, 7, 1):
        sums = GaussianSums(6)
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
    for seed in range(8):
        few = of(features(n=4, d=20, seed=seed))
        assert 0 <= frechet_distance(few, few) < 1e-6


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="6 and of 7 features"):
        frechet_distance(of(features(d=6)), of(features(d=7)))
    with pytest.raises(InputError, match="not finite"):
        frechet_distance(of(features()), of(features() * float("nan")))
    with pytest.raises(InputError, match="1 image to evaluate"):
        of(features(n=1))


def test_what_is_no_covariance_is_refused_and_rounding_is_not():
    zero, one = torch.zeros(3).double(), torch.eye(3).double()
    bad = torch.diag(torch.tensor([1.0, -0.1, 1.0]).double())
    for a, b in ((one, bad), (bad, one), (-one, -one), (one, -one)):
        with pytest.raises(InputError, match="negative eigenvalues"):
            frechet_distance(Gaussian(zero, a, 9), Gaussian(zero, b, 9))
    skew = Gaussian(zero, one + torch.triu(0.01 * torch.ones(3, 3).double(), 1), 9)
    for a, b in ((skew, of(features(d=3))), (of(features(d=3)), skew)):
        with pytest.raises(InputError, match="not symmetric"):
            frechet_distance(a, b)
    flat = torch.diag(torch.tensor([1.0, -1e-8, 1.0]).double())
    for a, b in ((one, flat), (flat, one)):
        assert frechet_distance(Gaussian(zero, a, 9), Gaussian(zero, b, 9)) == pytest.approx(1)
    a, b = of(features(n=2, d=40, seed=1)), of(features(n=2, d=40, seed=2))  # a line each
    q = torch.linalg.qr(features(40, 40, seed=3)).Q
    for i, g in enumerate((a, b)):  # at a right angle, so that what they share is rounding
        g.covariance.copy_(torch.outer(q[i], q[i]))
    apart = float((a.mean - b.mean).square().sum()) + 2
    assert frechet_distance(a, b) == pytest.approx(apart)
    nothing = Gaussian(zero, 0 * one, 9)
    assert frechet_distance(nothing, Gaussian(zero + 1, 0 * one, 9)) == 3


@pytest.mark.parametrize(("share", "is_refused"), [(0.9, False), (1.1, True)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_bounds_of_rounding_are_relative_to_the_largest_value(size, share, is_refused):
    """1e-4 of it between the two halves of a covariance, 1e-3 of it below an eigenvalue of 0."""
    zero = torch.zeros(3).double()
    good = Gaussian(zero, size * torch.diag(torch.tensor([2.0, 1.0, 0.5]).double()), 9)
    skew, below = good.covariance.clone(), good.covariance.clone()
    skew[0, 1] += share * 1e-4 * 2 * size
    below[2, 2] = -share * 1e-3 * 2 * size
    for bad, message in ((skew, "not symmetric"), (below, "negative eigenvalues")):
        if is_refused:
            with pytest.raises(InputError, match=message):
                frechet_distance(Gaussian(zero, bad, 9), good)
        else:
            assert frechet_distance(Gaussian(zero, bad, 9), good) < size


def test_sums_do_not_depend_on_order_batches_or_processes():
    rows = features(n=900, d=5, shift=3.3).float()
    order = torch.randperm(900, generator=torch.Generator().manual_seed(9))
    one, two, three = (GaussianSums(5) for _ in range(3))
    one.add(rows)
    for part in rows[order].split(13):
        two.add(part)
    three.add(rows[500:])
    rest = GaussianSums(5)
    rest.add(rows[:500])
    others = iter([torch.tensor(rest.num), *rest.sums])
    three.add_others(lambda mine: mine + next(others))
    for other in (two, three):
        a, b = one.gaussian(), other.gaussian()
        assert a.num == b.num == 900
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.covariance, b.covariance)


def test_sums_are_exact_of_the_largest_features_in_the_largest_batch():
    rows = 16_384 - torch.rand(70_000, 1, generator=torch.Generator().manual_seed(0)).double()
    once, split = GaussianSums(1), GaussianSums(1)
    once.add(rows)
    for part in rows.split(999):
        split.add(part)
    assert all(map(torch.equal, once.sums, split.sums))


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 17_000.0, 16_384.0, -16_384.0])
def test_features_that_cannot_be_summed_are_refused(bad):
    rows = features(n=3)
    rows[1, 2] = bad
    with pytest.raises(InputError, match="not finite, or above") as caught:
        of(rows)
    assert "look at the feature network" in caught.value.hint


def test_statistics_that_are_not_finite_are_to_be_made_again():
    good = of(features())
    bad = Gaussian(good.mean * float("nan"), good.covariance, 9)
    with pytest.raises(InputError, match="statistics are not finite") as caught:
        frechet_distance(good, bad)
    assert caught.value.hint == "the statistics are damaged: make them again"


def test_the_quick_root_and_the_careful_one_agree():
    a, b = of(features(d=40, seed=1)), of(features(d=40, seed=2, scale=2.0, shift=0.3))
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected - 2 * cross), rel=1e-10)
    factor = root_of(a.covariance)
    torch.testing.assert_close(factor, factor.tril())  # it was Cholesky's
    torch.testing.assert_close(factor @ factor.T, a.covariance)


def test_sums_stay_where_the_features_are():
    """The meta device stands in for a GPU: to read it is an error."""
    sums = GaussianSums(5)
    sums.add(torch.zeros(3, 5, device="meta"))
    sums.add(torch.zeros(4, 5, device="meta"))
    assert (sums.num, {total.device.type for total in sums.sums}) == (7, {"meta"})


def test_what_a_gpu_was_not_asked_is_asked_in_the_end():
    sums = GaussianSums(2)
    sums.add(torch.ones(3, 2))
    sums.is_sound &= False  # as the sums of a GPU find out without a wait
    for ask in (sums.check, sums.gaussian):
        with pytest.raises(InputError, match="not finite, or above"):
            ask()
