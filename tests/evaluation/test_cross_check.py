"""clean-fid's number beside ours, from the same images and the same weight file."""

import pytest
import scipy
import torch
from packaging import version

from cmtool.errors import MissingError, UserError
from cmtool.evaluation import cross_check
from cmtool.evaluation.features import inception_extractor
from cmtool.evaluation.measure import evaluate
from tests.published import detector


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "mode"), [("clean", "clean"), ("edm", "legacy_tensorflow")])
def test_both_numbers_agree(monkeypatch, weights, folders, protocol, mode):
    monkeypatch.setattr("cleanfid.fid.frechet_distance", fails)  # its own takes minutes
    content = evaluate(
        folders / "a", reference=folders / "b", num=8, reference_num=7, protocol=protocol,
        feature_weights=weights, trust=True, cross_check=True,
    )  # fmt: skip
    checked = content["cross_check"]
    assert checked["tool"].startswith("clean-fid 0.")
    assert checked["mode"] == mode
    assert checked["distance"] == "cmtool's"
    assert checked["value"] == pytest.approx(content["value"], rel=1e-4)
    assert checked["difference"] == checked["value"] - content["value"] != 0


@pytest.mark.slow
def test_the_features_are_clean_fids(weights, tmp_path):
    """Of a file of another name, and of grey images: they differ from ours by rounding alone."""
    renamed = tmp_path / "mine.pt"
    renamed.symlink_to(weights)
    images = torch.randint(0, 256, (3, 1, 20, 24), dtype=torch.uint8)
    for resize in ("clean", "tf"):
        ours = inception_extractor(renamed, "", resize=resize)
        theirs = cross_check.clean_fid_extractor(ours)
        a, b = ours(images), theirs(images)
        assert not torch.equal(a, b)
        assert float((a - b).norm() / b.norm()) < 1e-4
        other = inception_extractor(renamed, "", resize="tf" if resize == "clean" else "clean")
        assert float((other(images) - b).norm() / b.norm()) > 1e-3


@pytest.mark.slow
def test_a_file_that_clean_fid_does_not_read_is_named(tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.save(detector().state_dict(), path)
    with pytest.raises(MissingError, match="clean-fid cannot read"):
        cross_check.clean_fid_extractor(inception_extractor(path, ""))


@pytest.mark.filterwarnings("ignore")
def test_where_clean_fids_distance_fails_ours_is_used_and_named(monkeypatch):
    from cleanfid import fid

    from cmtool.evaluation.gaussian import Gaussian, frechet_distance

    a, b = (Gaussian(torch.ones(2).double() * s, torch.eye(2).double() * s, 9) for s in (1, 3))
    ours = inception_like("clean")
    if version.parse(scipy.__version__) < version.parse("1.18"):
        theirs = cross_check.compare(ours, 2.5, a, b)
        assert theirs["distance"] == "clean-fid's"
        assert theirs["value"] == pytest.approx(frechet_distance(a, b))
    monkeypatch.setattr(fid, "frechet_distance", fails)
    found = cross_check.compare(ours, 2.5, a, b)
    assert found["distance"] == "cmtool's"
    assert found["value"] == frechet_distance(a, b)
    assert found["difference"] == found["value"] - 2.5


def fails(*_):
    raise TypeError("sqrtm() got an unexpected keyword argument 'disp'")


def inception_like(resize):
    from cmtool.evaluation.features import build_extractor

    return build_extractor("digits")._replace(resize=resize)


@pytest.mark.parametrize(
    ("metric", "protocol", "runs"), [("kid", "edm", 1), ("fid", "digits", 1), ("fid", "clean", 2)]
)
def test_what_clean_fid_cannot_repeat_is_refused(metric, protocol, runs):
    with pytest.raises(UserError, match="--cross-check"):
        cross_check.check_usage(metric, protocol, runs)
