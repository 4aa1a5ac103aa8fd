import math

import pytest
import torch

from cmtool.core.distances import DISTANCES, l1, l2, pseudo_huber


@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_is_one_number_per_image_symmetric_and_zero_on_itself(name):
    x, y = torch.randn(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    d = DISTANCES[name]
    assert d(x, y).shape == (5,)
    assert (d(x, y) > 0).all()
    torch.testing.assert_close(d(x, y), d(y, x))
    torch.testing.assert_close(d(x, x), torch.zeros(5), atol=1e-7, rtol=0)


def test_values_by_hand():
    x = torch.zeros(1, 3, 2, 2)
    y = torch.full_like(x, 0.5)
    assert float(l1(x, y)) == 0.5
    assert float(l2(x, y)) == 0.25
    expected = math.sqrt(12 * 0.25 + 0.3**2) - 0.3
    assert float(pseudo_huber(x, y, c=0.3)) == pytest.approx(expected)


def test_pseudo_huber_takes_its_norm_over_the_image_with_the_published_constant():
    x = torch.zeros(1, 3, 32, 32)
    y = torch.full_like(x, 0.2)
    c = 0.0299  # 0.00054 sqrt(3 * 32 * 32)
    expected = math.sqrt(3072 * 0.04 + c**2) - c
    assert float(pseudo_huber(x, y)) == pytest.approx(expected, rel=1e-5)
