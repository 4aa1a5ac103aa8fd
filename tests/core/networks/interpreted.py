"""The norm of a GPU on Triton's interpreter: its kernels without a GPU, one program after another.

`test_cuda_normalise.py` runs these with TRITON_INTERPRET=1, which Triton reads when it is loaded.
The interpreter cuts numbers off where a GPU rounds them to bfloat16: they may be a whole unit in
the last place apart.
"""

import pytest
import torch

from cmtool.core.networks import layers
from cmtool.core.networks.cuda import launches, normalise
from cmtool.core.networks.cuda.normalise import by_steps, group_norm
from cmtool.core.networks.layers import GroupNorm32
from cmtool.core.tangents import forward_mode
from cmtool.presets.build import build_network
from cmtool.presets.toml import load_preset
from cmtool.system.devices import shapes_only
from tests.networks import network

PUBLISHED = ["bedroom256-cd-l2", "cifar10-edm-ve", "cifar10-edm-vp", "imagenet64-cd-l2"]
UNITS = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""A unit in the last place; in float32 what a few thousand numbers' sums are apart."""


def norms():
    """Channels and groups of all norms of the published networks."""
    found = set()
    for name in PUBLISHED:
        with shapes_only():
            net = build_network(load_preset(name).model)
        found |= {
            (m.num_channels, m.num_groups) for m in net.modules() if isinstance(m, GroupNorm32)
        }
    return sorted(found)


def given(shape, dtype, scaled, mean=2.0, added=False):
    """Images pixel by pixel, weight, bias, scale and shift as halves of one embedding, addend."""
    g = torch.Generator().manual_seed(0)
    b, c, *_ = shape
    x = (mean + torch.randn(shape, generator=g)).to(dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, c, generator=g)
    emb = torch.randn(b, 2 * c, generator=g)
    scale, shift = emb.chunk(2, 1) if scaled else (None, None)
    more = torch.randn(c, b, generator=g).mT if added else None  # neighbours lie apart
    return [x, weight.clone(), bias.clone(), scale, shift, more]


def both(tensors, groups, silu, eps=1e-5):
    """The answer and the gradients of the kernel, and those of the plain steps in float32."""
    seed = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    seed = seed.to(tensors[0].dtype)
    found = []
    for compute in (group_norm, by_steps):
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        first = leaves[0] if compute is group_norm else leaves[0].float()
        y = compute(first, *leaves[1:], groups, eps, silu)
        wanted = [t for t in leaves if t is not None]
        found.append([y, *torch.autograd.grad(y, wanted, seed.to(y.dtype))])
    return found


def check(shape, groups, dtype, *, scaled, silu, **options):
    tensors = given(shape, dtype, scaled, **options)
    ours, exact = both(tensors, groups, silu)
    assert ours[0].dtype == ours[1].dtype == dtype
    assert ours[0].stride() == tensors[0].stride()
    for place, (mine, theirs) in enumerate(zip(ours, exact, strict=True)):
        theirs, unit = theirs.detach().float(), UNITS[dtype if place < 2 else torch.float32]
        most, least = float(theirs.abs().max()), 1e-6
        if place == 6 or (place == 4 and not scaled):  # the addend's: a sum that may cancel
            most, least = max(most, float(exact[1].abs().max())), 2e-6
        rest = 3e-5 * most + least
        assert ((mine.float() - theirs).abs() <= unit * theirs.abs() + rest).all(), place


@pytest.mark.parametrize(("channels", "groups"), norms())
def test_the_norms_of_the_published_networks(channels, groups):
    check((1, channels, 2, 3), groups, torch.bfloat16, scaled=True, added=True, silu=True)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_form_of_the_norm(dtype, scaled, added, silu):
    check((2, 24, 3, 5), 4, dtype, scaled=scaled, added=added, silu=silu)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 4, 1, 1), 2), ((2, 36, 1, 9), 2), ((1, 7, 4, 2), 7), ((3, 10, 5, 3), 1),
     ((1, 30, 33, 40), 5)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_shapes(shape, groups, dtype):
    check(shape, groups, dtype, scaled=True, added=True, silu=True)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_images_in_chunks(scaled, added, monkeypatch):
    monkeypatch.setattr(launches, "TILES", 1)
    monkeypatch.setattr(launches, "TILE", 128)
    launches.plan.cache_clear()
    try:
        assert launches.plan(2, 12, 77, 3).chunks == 5  # of 16 pixels, but for the last
        check((2, 12, 7, 11), 3, torch.float32, scaled=scaled, added=added, silu=True)
    finally:
        launches.plan.cache_clear()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_mean_large_beside_the_spread_costs_no_digits(chunked, monkeypatch):
    """Sums of squares would leave nothing of the variance: 3000^2 has all of float32's digits."""
    monkeypatch.setattr(launches, "TILES", 1 if chunked else 1 << 20)
    launches.plan.cache_clear()
    x, weight, bias, *_ = given((1, 6, 24, 24), torch.float32, scaled=False, mean=3000.0)
    y = group_norm(x, weight, bias, None, None, None, 2, 1e-6, False)
    exact = by_steps(x.double(), weight.double(), bias.double(), None, None, None, 2, 1e-6, False)
    launches.plan.cache_clear()
    # a unit in the last place of the mean is 2.4e-4
    torch.testing.assert_close(y.double(), exact, atol=3e-3, rtol=1e-4)


def test_the_gradient_may_lie_in_any_way_and_be_differentiated_again():
    tensors = given((2, 6, 2, 3), torch.float32, scaled=True, added=True)
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    found = []
    for compute in (group_norm, by_steps):
        y = compute(*tensors, 3, 0.3, True)
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), tensors)
        plain = torch.autograd.grad(compute(*tensors, 3, 0.3, True).sum(), tensors)
        found.append([*first, *second, *plain])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Networks on the CPU take the kernels as they would on a GPU."""
    monkeypatch.setattr(normalise, "runs_on", lambda device: True)
    monkeypatch.setattr(layers, "is_channels_last", lambda x: False)


@pytest.mark.parametrize("name", ["adm", "song"])
def test_a_network_answers_and_learns_as_by_the_plain_steps(name, as_on_gpu, monkeypatch):
    found, calls, forward = [], [], launches.forward
    monkeypatch.setattr(launches, "forward", lambda *a: calls.append(0) or forward(*a))
    g = torch.Generator().manual_seed(0)
    x, sigma, labels = torch.randn(1, 3, 4, 4, generator=g), torch.tensor([0.5]), torch.tensor([1])
    f = network(name).eval()
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(normalise, "runs_on", lambda device: False)
        y = f(x, sigma, labels)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(f.parameters()))])
    norms = [m for m in f.modules() if isinstance(m, GroupNorm32)]
    assert len(calls) == len(norms)
    for ours, theirs in zip(*found, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * scale)


def test_forward_mode_goes_the_plain_way(as_on_gpu, monkeypatch):
    """So do continuous time, sCM and MeanFlow, which differentiate their networks by torch.func."""
    f, found = network("adm").eval(), []
    at = (torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5]))
    slope = (torch.ones_like(at[0]), torch.ones(1))
    monkeypatch.setattr(launches, "forward", None)  # nobody calls it
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(normalise, "runs_on", lambda device: False)
        y, tangent = forward_mode(lambda x, s: f(x, s, torch.tensor([1])), at, slope)
        weight = f.network.out[0].weight
        found.append([y, tangent, *torch.autograd.grad(tangent.square().sum(), [weight])])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
