import numpy as np
import pytest
import scipy
import torch
from packaging import version

from cmtool.errors import InputError
from cmtool.evaluation.features import PROTOCOLS, build_extractor
from cmtool.evaluation.gaussian import frechet_distance
from cmtool.evaluation.metrics import (
    METRICS,
    Features,
    inception_score,
    kernel_distance,
    precision_recall,
)
from tests.evaluation.test_gaussian import features, of


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


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("width", [50, 300])
def test_equal_rows_have_no_distance_whatever_they_are_multiplied_with(width, shift):
    """Rounding differs by the shape of a product: any rest of it is more than a radius of 0."""
    rows = features(n=40, d=width, seed=1, shift=shift)
    often = rows.repeat(5, 1)[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    found = [precision_recall(often, rows[:n], chunk=64).precision for n in range(4, 40)]
    assert found == [1.0] * 36


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


def test_protocols_resize_as_their_sources_do_and_tell_precision_from_recall():
    resized = {name: p.resize for name, p in PROTOCOLS.items() if p.network == "inception"}
    assert resized == {"adm": "tf", "clean": "clean", "edm": "tf", "legacy-tf": "tf"}
    wide = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    inner = Features(None, wide[:1] + wide[:10] / 1e3, 10)  # near one of them
    found = METRICS["pr"].compute(inner, Features(None, wide, 50), build_extractor("digits"))
    assert found["precision"].value == 1
    assert found["recall"].value <= 0.02


def test_the_score_is_of_splits_of_5000():
    classes = torch.arange(4).repeat_interleave(2500)  # two of them in each split
    logits = 100 * torch.nn.functional.one_hot(classes).float()
    extractor = build_extractor("digits")._replace(logits=lambda rows: rows)
    made = Features(None, logits, len(logits))
    found = METRICS["is"].compute(made, Features(), extractor)["is"]
    assert found.value == pytest.approx(2)
    few = Features(None, logits[:6250], 6250)  # the last split is of one class
    found = METRICS["is"].compute(few, Features(), extractor)["is"]
    assert found.value == pytest.approx((2 + 1) / 2)


def test_metrics_have_the_settings_of_their_papers():
    """KID of 100 subsets of 1,000 (Binkowski et al.); k = 3 (Kynkaanniemi et al.)."""
    extractor = build_extractor("digits")
    images, reference = features(n=60, seed=1).float(), features(n=50, seed=2, scale=1.2).float()
    sides = Features(None, images, 60), Features(None, reference, 50)
    found = METRICS["kid"].compute(*sides, extractor)["kid"]
    assert found == kernel_distance(reference, images, subsets=100, size=1000)  # of seed 0
    found = METRICS["pr"].compute(*sides, extractor)
    expected = precision_recall(reference, images, k=3)
    assert (found["precision"].value, found["recall"].value) == expected
    sides = Features(of(images)), Features(of(reference))
    found = METRICS["fid"].compute(*sides, extractor)["fid"].value
    assert found == frechet_distance(of(images), of(reference)) > 0.1
    settings = {name: METRICS[name].settings for name in ("kid", "is", "pr")}
    assert settings == {
        "kid": {"subsets": 100, "size": 1000, "seed": 0}, "is": {"split": 5000}, "pr": {"k": 3},
    }  # fmt: skip
    assert {name for name, row in METRICS.items() if row.lowest_is_best} == {"fid", "kid"}


def test_subsets_are_no_larger_than_the_smaller_set():
    few, many = features(n=20, seed=1), features(n=50, seed=2)
    for a, b in ((few, many), (many, few)):
        found = kernel_distance(a, b, subsets=3, size=30)
        assert found == kernel_distance(a, b, subsets=3, size=20)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_gives_the_numbers_it_names_of_what_it_needs(name):
    row, extractor = METRICS[name], build_extractor("digits")
    sides = []
    for needs, seed in ((row.images, 1), (row.reference, 2)):
        rows = features(n=60, d=extractor.width, seed=seed).float()
        sides.append(Features(of(rows) if needs.gaussian else None, rows if needs.rows else None))
    found = row.compute(*sides, extractor)
    assert tuple(found) == row.values
    assert all(np.isfinite(each.value) for each in found.values())
    assert row.help.strip()
    assert f"cmtool eval {name} " in row.help
