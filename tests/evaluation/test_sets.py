import pytest
import torch

from cmtool.data.datasets import Dataset
from cmtool.data.drawing import png_bytes
from cmtool.data.images import from_uint8
from cmtool.errors import InputError
from cmtool.evaluation.features import build_extractor
from cmtool.evaluation.metrics import BOTH, GAUSSIAN
from cmtool.evaluation.sets import Setup, Statistics, collect, open_set, save_features


@pytest.fixture(scope="module")
def setup():
    return Setup("digits", build_extractor("digits"))


def pictures(n):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_a_set_is_one_whatever_stands_for_it(setup, tmp_path):
    images = pictures(5)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(png_bytes(image))
    expected = collect(open_set(images), BOTH, setup)
    for given in (from_uint8(images), tmp_path, str(tmp_path), paths, list(map(str, paths))):
        found = collect(open_set(given), BOTH, setup)
        assert found.fingerprint == expected.fingerprint
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.gaussian.covariance, expected.gaussian.covariance)
    assert len(open_set(paths[0])) == 1
    with pytest.raises(InputError, match=r"images of shape \(3, 8, 8\)"):
        open_set(images[0])


def test_the_order_of_features_is_that_of_images_whatever_their_last_bits_are(setup):
    images, extractor = pictures(40), setup.extractor
    features = extractor.network
    noisy = extractor._replace(network=lambda x: features(x) * (1 + 1e-6))
    found, other = (
        collect(
            open_set(images.flip(0) if turned else images), BOTH, setup._replace(extractor=each)
        )
        for turned, each in enumerate((extractor, noisy))
    )
    torch.testing.assert_close(found.rows, other.rows, rtol=1e-5, atol=1e-6)


def test_statistics_give_what_they_were_made_of(setup, tmp_path):
    opened = open_set(pictures(9))
    assert isinstance(opened, Dataset)
    found = collect(opened, BOTH, setup)
    save_features(tmp_path / "a.npz", found, setup)
    stored = open_set(tmp_path / "a.npz")
    assert isinstance(stored, Statistics)
    again = collect(stored, BOTH, setup)
    assert torch.equal(again.rows, found.rows)
    assert torch.equal(again.gaussian.mean, found.gaussian.mean)
    assert again.about["made_from"] == found.about
    assert collect(stored, GAUSSIAN, setup).num == 9


def test_progress_counts_the_images(setup):
    seen = []
    counting = setup._replace(batch=100, progress=lambda *call: seen.append(call))
    collect(open_set(pictures(600)), GAUSSIAN, counting)
    assert seen == [("images", 300, 600), ("images", 600, 600)]  # in groups that fill the network
