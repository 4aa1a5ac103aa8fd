import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmtool.core.networks.edm2 import MPLinear
from cmtool.core.networks.layers import Dropout, GroupNorm32, Linear32, rounded_copy, upsampled
from cmtool.core.tangents import derivative
from tests.networks import OPTIONS, network

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


@pytest.mark.parametrize("half", [False, True])
def test_layers_in_float32_do_not_ask_what_no_graph_can_hold(monkeypatch, half):
    """PyTorch 2.11's compiler breaks its graph at is_autocast_available, in each such layer."""

    def asked(_):
        raise AssertionError("is_autocast_available")

    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    for device in ("cpu", "meta"):
        for layer in (Linear32(3, 4), MPLinear(3, 4)):
            x = torch.ones(2, 3, device=device)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                assert layer.to(device)(x).dtype == torch.float32


@pytest.mark.parametrize("half", [False, True])
def test_pixels_are_repeated_out_of_reach_of_autocast(monkeypatch, half):
    """That of a GPU would turn them into float32; a CPU's leaves them as they are."""
    seen, real = [], F.interpolate

    def interpolate(x, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(x, **options)

    monkeypatch.setattr(F, "interpolate", interpolate)
    x = torch.randn(1, 2, 3, 3, dtype=torch.bfloat16 if half else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = upsampled(x)
    assert torch.equal(y, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert (y.dtype, seen) == (x.dtype, [False])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_network_rounded_beforehand_answers_with_the_same_bits_under_autocast(name, half):
    f = network(name).eval()
    twin = rounded_copy(f, half)
    g = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(2, 3, 8, 12, generator=g), torch.tensor([0.5, 40.0])
    with torch.autocast("cpu", half), torch.no_grad():
        expected = f(x, sigma, torch.tensor([1, 3]))
        assert torch.equal(twin(x, sigma, torch.tensor([1, 3])), expected)
    kinds = {type(m): m.weight.dtype for m in twin.modules() if hasattr(m, "weight")}
    assert kinds.get(nn.Conv2d, half) == kinds.get(nn.Linear, half) == half
    assert all(kinds.get(kind, torch.float32) == torch.float32 for kind in (GroupNorm32, Linear32))
    assert all(p.dtype == torch.float32 for p in f.parameters())
