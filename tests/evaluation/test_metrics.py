import numpy as np
import pytest
import scipy
import torch
from packaging import version

from cmtool.errors import InputError
from cmtool.evaluation.metrics import (
    Gaussian,
    GaussianSums,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    root_of,
)


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


def test_features_that_are_not_finite_have_no_distance_or_score():
    good = features()
    for bad in (float("nan"), float("inf")):
        broken = good.clone()
        broken[3, 2] = bad
        for measure in (
            lambda x: kernel_distance(good, x),
            lambda x: kernel_distance(x, good),
            lambda x: precision_recall(good, x),
            inception_score,
        ):
            with pytest.raises(InputError, match="not finite"):
                measure(broken)


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
    three.share(lambda mine: mine + next(others))
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


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 17_000.0])
def test_features_that_cannot_be_summed_are_refused(bad):
    rows = features(n=3)
    rows[1, 2] = bad
    with pytest.raises(InputError, match="not finite, or above"):
        of(rows)


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


@pytest.mark.filterwarnings("ignore")
def test_distances_are_those_of_clean_fid():
    from cleanfid import fid

    a, b = features(n=300, d=16, seed=1), features(n=250, d=16, seed=2, scale=1.2, shift=0.1)
    np.random.seed(7)  # noqa: NPY002
    theirs = fid.kernel_distance(a.numpy(), b.numpy(), num_subsets=20, max_subset_size=100)
    ours = kernel_distance(a, b, subsets=20, size=100, seed=7)
    assert ours.value == pytest.approx(theirs, rel=1e-9)
    assert 0 < ours.error < 1
    if version.parse(scipy.__version__) < version.parse("1.18"):  # it asks for what has gone
        theirs = fid.frechet_distance(
            a.numpy().mean(0), np.cov(a.numpy(), rowvar=False),
            b.numpy().mean(0), np.cov(b.numpy(), rowvar=False),
        )  # fmt: skip
        assert frechet_distance(of(a), of(b)) == pytest.approx(theirs, rel=1e-8)


def test_kernel_distance_of_one_law_has_mean_zero():
    values = [
        kernel_distance(features(seed=2 * i), features(seed=2 * i + 1), subsets=1, size=400).value
        for i in range(40)
    ]
    spread = torch.tensor(values)
    assert abs(float(spread.mean())) < 3 * float(spread.std()) / 40**0.5
    far = kernel_distance(features(seed=1), features(seed=2, shift=1.0), subsets=5, size=400)
    assert far.value > 10 * far.error


def test_the_error_of_a_kernel_distance_is_that_of_the_mean_of_its_subsets():
    a, b = features(n=30, seed=1), features(n=30, seed=2)
    means = [kernel_distance(a, b, subsets=n, size=20).value for n in range(1, 7)]
    values = [n * m - (n - 1) * means[n - 2] for n, m in enumerate(means, 1)]
    expected = np.std(values, ddof=1) / 6**0.5
    assert kernel_distance(a, b, subsets=6, size=20).error == pytest.approx(expected)


def test_kernel_distance_of_whole_sets_has_no_error():
    a, b = features(n=20, seed=1), features(n=20, seed=2)
    whole = kernel_distance(a, b)
    assert np.isnan(whole.error)
    k = (torch.cat([a, b]) @ torch.cat([a, b]).T / 6 + 1) ** 3
    own = sum(float(part.sum() - part.trace()) / (20 * 19) for part in (k[:20, :20], k[20:, 20:]))
    assert whole.value == pytest.approx(own - 2 * float(k[:20, 20:].mean()))
    assert kernel_distance(a, b, size=19).error > 0
    assert kernel_distance(a, features(n=21, seed=3)).error > 0


def test_inception_score_of_known_predictions():
    uniform = torch.zeros(100, 7)
    assert inception_score(uniform).value == pytest.approx(1)
    certain = torch.full((70, 7), -1e4)
    certain[torch.arange(70), torch.arange(70) % 7] = 0.0
    assert inception_score(certain).value == pytest.approx(7)
    never = torch.tensor([[0.0, 0.0, -1e4]])  # a class that no image can be of
    assert inception_score(never.expand(9, 3)).value == pytest.approx(1)
    halves = inception_score(torch.cat([uniform[:70], certain]), split=70)
    assert halves.value == pytest.approx(4)
    assert halves.error == pytest.approx(3)


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    made = torch.tensor([[0.5], [30.0]])
    # distances to the nearest other: 1, 1, 1, 8 of the real ones, 29.5 of both made ones
    result = precision_recall(real, made, k=1)
    assert result.precision == 0.5
    assert result.recall == 1.0
    assert precision_recall(real + 100, real, k=1) == (0.0, 0.0)


def test_rows_that_come_often_cover_themselves_and_nothing_else():
    rows = features(n=130, d=50, seed=1, shift=3.0)
    often = rows.repeat(5, 1)[torch.randperm(650, generator=torch.Generator().manual_seed(1))]
    for chunk in (64, 4096):
        assert precision_recall(often, rows, chunk=chunk).precision == 1
        assert precision_recall(often, rows + 1e-4, chunk=chunk).precision == 0


def test_a_neighbourhood_needs_more_images_than_neighbours():
    for real, made in ((3, 9), (9, 3)):
        with pytest.raises(InputError, match="3 images to evaluate"):
            precision_recall(features(n=real), features(n=made))


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_precision_and_recall_against_itself_are_one_in_any_chunks(chunk):
    a, b = features(n=60, seed=1), features(n=50, seed=2, scale=0.7)
    assert precision_recall(a, a, chunk=chunk) == (1.0, 1.0)
    assert precision_recall(a, b, chunk=chunk) == precision_recall(a, b)


def test_precision_and_recall_equal_a_reference_written_out():
    real, made = features(n=80, seed=1), features(n=70, seed=2, scale=1.3)

    def share(points, centres):
        inside = 0
        radius = [sorted(float((c - o).norm()) for o in centres)[3] for c in centres]
        for p in points:
            inside += any(float((p - c).norm()) <= r for c, r in zip(centres, radius, strict=True))
        return inside / len(points)

    assert precision_recall(real, made) == (share(made, real), share(real, made))
