import pytest
import torch
from torch.nn import functional as F

from cmtool.core.networks.layers import Dropout
from cmtool.core.tangents import derivative

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_draws_the_masks_of_pytorch_in_any_layout(layout, dtype):
    x = torch.randn(2, 8, 5, 5, dtype=dtype)
    dropout = torch.get_rng_state()
    expected = F.dropout(x, 0.3)
    torch.set_rng_state(dropout)
    torch.testing.assert_close(Dropout(0.3)(x.contiguous(memory_format=layout)), expected)
    assert torch.equal(Dropout(0.3).eval()(x), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_drops_the_same_units_when_it_is_differentiated_forwards(layout):
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=layout)
    dropout = torch.get_rng_state()
    expected = Dropout(0.3)(x)
    torch.set_rng_state(dropout)
    y, dy = derivative(Dropout(0.3), (x,), (torch.ones_like(x),))
    assert torch.equal(y, expected)
    assert torch.equal(dy, (expected != 0) / 0.7)
