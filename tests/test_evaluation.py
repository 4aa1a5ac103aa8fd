import pytest

from cmtool import evaluation
from cmtool.core.data import load_dataset


def test_the_training_images_are_at_distance_zero_from_themselves():
    data = load_dataset("digits")
    score = evaluation.fd_digits(data, "cpu")
    assert score(data.images) == pytest.approx(0, abs=1e-6)
    assert score(data.images[:500] // 2) > 10
