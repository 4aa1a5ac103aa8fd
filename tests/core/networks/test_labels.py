"""What a network hears of a class, and of none."""

import pytest
import torch

from cmtool.core.types import NO_CLASS
from tests.networks import network

TABLES = {"adm": "label_emb", "edm2": "emb_label", "song": "map_label"}


@pytest.mark.parametrize("name", TABLES)
def test_an_image_of_no_class_hears_nothing_of_any_class(name):
    f = network(name).eval()
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0])
    with torch.no_grad():
        mixed = f(x, sigma, torch.tensor([NO_CLASS, 4]))
        told = f(x, sigma, torch.tensor([7, 4]))
        getattr(f.network, TABLES[name]).weight.zero_()
        untold = f(x, sigma, torch.tensor([7, 4]))
    torch.testing.assert_close(mixed[0], untold[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[1], told[1], rtol=0, atol=1e-6)
    assert not torch.allclose(told[0], untold[0], atol=1e-3)
