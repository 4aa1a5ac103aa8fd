"""The norm of images that lie pixel by pixel, beside PyTorch's of images channel by channel."""

import copy

import pytest
import torch

from cmtool.core.networks.cpu import normalise
from cmtool.core.networks.layers import GroupNorm32, Linear32
from cmtool.core.tangents import derivative
from cmtool.system.devices import on_device
from tests.networks import network

GROUPS, CHANNELS = 3, 12


def norm(eps=0.3):
    g = torch.Generator().manual_seed(0)
    module = GroupNorm32(GROUPS, CHANNELS, eps=eps)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(CHANNELS, generator=g))
    return module


def inputs(scaled, dtype=torch.float32):
    """Images with a mean that is large beside their spread; scale and shift."""
    g = torch.Generator().manual_seed(1)
    x = (5 + torch.randn(4, CHANNELS, 6, 5, generator=g)).to(dtype)
    return [x, *torch.randn(2, 4, CHANNELS, generator=g)] if scaled else [x]


def last(x):
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_answer_and_its_layout(scaled, silu):
    x, *rest = inputs(scaled)
    ours = norm()(last(x), *rest, silu=silu)
    torch.testing.assert_close(ours, norm()(x, *rest, silu=silu), atol=1e-5, rtol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scaled", [False, True])
def test_in_half_precision_only_the_answer_is_rounded(scaled):
    x, *rest = inputs(scaled, torch.bfloat16)
    ours = norm()(last(x), *rest, silu=True)
    exact = norm()(x.float(), *rest, silu=True)
    assert ours.dtype == torch.bfloat16
    # half a unit in the last of eight places, and what the sums of float32 are apart
    assert ((ours.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("at_once", [1 << 19, 1])
def test_the_gradients(scaled, silu, at_once, monkeypatch):
    monkeypatch.setattr(normalise, "CACHED", at_once)
    found = []
    for place in (last, torch.clone):
        module, given = norm(), [t.requires_grad_() for t in inputs(scaled)]
        y = module(place(given[0]), *given[1:], silu=silu)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        (y * weight).sum().backward()
        found.append([y, *(t.grad for t in [*given, *module.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("silu", [False, True])
def test_in_half_precision_only_the_gradient_of_x_is_rounded(silu):
    found = []
    for place, dtype in ((last, torch.bfloat16), (torch.clone, torch.float32)):
        module = norm()
        x, *rest = inputs(scaled=True, dtype=torch.bfloat16)
        given = [t.requires_grad_() for t in (x.to(dtype), *rest)]
        y = module(place(given[0]), *given[1:], silu=silu)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
        y.backward(weight.to(dtype))
        found.append([t.grad for t in [*given, *module.parameters()]])
    (ours, *of_rest), (exact, *expected) = found
    assert ((ours.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()
    for of_one, theirs in zip(of_rest, expected, strict=True):
        torch.testing.assert_close(of_one, theirs, atol=1e-4, rtol=1e-5)


def test_the_gradients_in_float64():
    x, *rest = (t.double().requires_grad_() for t in inputs(scaled=True))
    module = norm().double()
    assert torch.autograd.gradcheck(lambda x, *rest: module(last(x), *rest, silu=True), (x, *rest))


def test_a_few_images_at_a_time_are_the_same_as_all(monkeypatch):
    x, *rest = inputs(scaled=True)
    whole = norm()(last(x), *rest)
    monkeypatch.setattr(normalise, "CACHED", x[0].numel())
    assert torch.equal(norm()(last(x), *rest), whole)


def test_of_its_size_only_the_input_is_kept():
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x, *rest = inputs(scaled=True, dtype=torch.bfloat16)
    x, module = last(x).requires_grad_(), norm()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x, *rest, silu=True)
    assert sorted(kept.values())[-1] == 2 * x.numel()
    assert sum(kept.values()) < 3 * x.numel()


@pytest.mark.parametrize("name", ["adm", "song"])
def test_a_network_answers_and_learns_the_same_in_either_layout(name):
    g = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(2, 3, 8, 12, generator=g), torch.tensor([0.5, 40.0])
    plain, found = network(name).eval(), []
    for f in (plain, on_device(copy.deepcopy(plain), "cpu")):
        y = f(x, sigma, torch.tensor([1, 3]))
        (gradient,) = torch.autograd.grad(y.square().mean(), [next(f.parameters())])
        found.append((y.detach(), gradient))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_forward_mode_and_the_gradient_of_what_it_gives():
    found = []
    for place in (last, torch.clone):
        x = inputs(scaled=False)[0].requires_grad_()
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        module = norm()
        along = lambda t, place=place, module=module: module(place(t), silu=True)  # noqa: E731
        y, tangent = derivative(along, (x,), (direction,))
        found.append([y, tangent, *torch.autograd.grad(tangent.square().sum(), [x, module.weight])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_embeddings_are_not_rounded_under_autocast():
    layer, x = Linear32(16, 16), torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), exact)
        assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()))
