"""EDM2's network: what goes in with variance 1 comes out so, and who changes its weights."""

import pytest
import torch

from cmtool.core.distances import l2
from cmtool.core.losses import consistency_loss, noise_pair, uniform_weight
from cmtool.core.networks import layers
from cmtool.core.networks.edm2 import (
    SIZES,
    Edm2,
    Edm2Block,
    Edm2Options,
    LogVariance,
    MPAttention,
    MPConv,
    MPFourier,
    MPLayer,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    unit,
)
from cmtool.core.precond import Preconditioned, edm_scalings, log_label
from cmtool.errors import InputError
from cmtool.system.devices import shapes_only

TINY = Edm2Options(
    model_channels=8, channel_mult=(1, 2), num_blocks=1, attention_levels=(1,), head_channels=8
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(options=TINY, num_classes=4):
    """A network all of whose gains are 0.7."""
    torch.manual_seed(0)
    network = Edm2(options, 3, num_classes)
    for name, p in network.named_parameters():
        if name.endswith("gain"):
            p.data.fill_(0.7)
    return network


def run(network, labels=True, seed=1):
    given = torch.tensor([0, 3]) if labels else None
    return network(noise(2, 3, 8, 8, seed=seed), torch.tensor([-1.0, 0.5]), given)


PUBLISHED = {
    "xs": 124_710_949, "s": 280_209_381, "m": 497_803_173, "l": 777_492_325, "xl": 1_119_276_837,
}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_are_the_published_ones(size):
    """At 64 pixels, with 1000 classes, and the head that belongs to the loss."""
    with shapes_only():
        whole = Edm2(Edm2Options(model_channels=SIZES[size]), 3, 1000), LogVariance(128)
    assert sum(p.numel() for module in whole for p in module.parameters()) == PUBLISHED[size]


VARIANCES = {
    "silu": lambda: mp_silu(noise(100_000)),
    "sum": lambda: mp_sum(noise(100_000), noise(100_000, seed=1), 0.3),
    "cat": lambda: mp_cat(*PARTS, 0.3),
    "conv": lambda: MPConv(64, 64, 3)(noise(8, 64, 32, 32))[..., 1:-1, 1:-1],
    "linear": lambda: MPLinear(64, 512)(noise(512, 64)),
    "fourier": lambda: MPFourier(4096)(noise(64)),
}
PARTS = noise(200, 10, 10, 10), noise(200, 10, 10, 10, seed=1)


@pytest.mark.parametrize("name", VARIANCES)
def test_the_variance_is_kept(name):
    torch.manual_seed(9)
    tolerance = 0.005 if name == "silu" else 0.02
    assert VARIANCES[name]().square().mean().item() == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.7])
def test_shares_of_a_sum_and_of_what_is_joined(t):
    """Of what is joined each part has its share, however many channels it has."""
    a, b = torch.ones(1, 9, 2, 2), torch.zeros(1, 3, 2, 2)
    total = (1 - t) ** 2 + t**2
    assert mp_sum(a, 0 * a, t).square().mean().item() == pytest.approx((1 - t) ** 2 / total)
    first = mp_cat(a, b, t).square().mean().item()
    assert first == pytest.approx((1 - t) ** 2 / total)
    second = mp_cat(0 * a, b + 1, t).square().mean().item()
    assert second == pytest.approx(t**2 / total)


def test_a_unit_vector_is_one_of_root_mean_square_one():
    x = 7 * noise(3, 5, 4)
    ours = unit(x, (1,)).square().mean(1).sqrt()
    torch.testing.assert_close(ours, torch.ones(3, 4), rtol=1e-4, atol=0)
    assert unit(0 * x, (1,)).abs().max() == 0


def test_the_size_of_weights_does_not_matter():
    network, larger = tiny(), tiny()
    for part in larger.modules():
        if isinstance(part, MPLayer):
            part.weight.data.mul_(30)
    torch.testing.assert_close(run(larger), run(network), rtol=5e-3, atol=5e-3)


def test_a_pass_changes_no_weight_in_training_or_out_of_it():
    network = tiny().train()
    before = [p.clone() for p in network.parameters()]
    run(network).square().mean().backward()
    with torch.no_grad():
        run(network)
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, new)


def test_normalised_weights_have_gradients_across_them():
    """The size of a row does not matter, so no gradient points along it."""
    network = tiny()
    out = run(network)
    for part in network.modules():
        if isinstance(part, MPLayer):
            part.normalise()
            assert part.weight.square().mean().item() == pytest.approx(1, abs=3e-4)
    torch.testing.assert_close(run(network), out, rtol=1e-2, atol=1e-2)
    run(network).square().mean().backward()
    for part in network.modules():
        if isinstance(part, MPLayer):
            w, g = part.weight.flatten(1), part.weight.grad.flatten(1)
            along = (w * g).sum(1).abs()
            assert (along <= 1e-3 * w.norm(dim=1) * g.norm(dim=1) + 1e-9).all()


def test_both_passes_of_a_consistency_loss_have_the_same_weights():
    """So equal points cost nothing, whatever the weights are."""
    f = Preconditioned(tiny().train(), edm_scalings, log_label, sigma_data=0.5, sigma_min=0.002)
    sigma = torch.tensor([0.5, 2.0])
    pair = noise_pair(noise(2, 3, 8, 8), sigma, sigma, noise(2, 3, 8, 8, seed=1))
    loss = consistency_loss(f, f, pair, torch.tensor([1, 2]), l2, uniform_weight)
    assert loss.abs().max() == 0


def test_no_class_is_a_class_of_zeros():
    network = tiny()
    with torch.no_grad():
        none = run(network, labels=False)
        network.emb_label.forward = lambda classes: torch.zeros(2, 16)
        assert torch.equal(run(network), none)
    with pytest.raises(InputError, match="labels given to an unconditional model"):
        run(tiny(num_classes=0))


def test_classes_are_scaled_by_the_root_of_their_number():
    network = tiny()
    given = []
    network.emb_label.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    run(network)
    assert torch.equal(given[0], 2 * torch.eye(4)[[0, 3]])


@pytest.mark.parametrize(("limit", "sides"), [(0, {4, 8}), (4, {4}), (2, set())])
def test_dropout_acts_at_and_below_a_resolution(monkeypatch, limit, sides):
    dropped = set()

    def forward(self, x):
        dropped.add(x.shape[-1])
        return x

    monkeypatch.setattr(layers.Dropout, "forward", forward)
    run(tiny(Edm2Options(**{**vars(TINY), "dropout": 0.4, "dropout_res": limit})))
    assert dropped == sides


def test_attention_is_blind_to_the_size_of_its_queries_and_keys():
    """It sees angles: a value that all pixels share comes back, whatever the input's size."""
    torch.manual_seed(0)
    attention = MPAttention(16, 2)
    x = noise(2, 16, 3, 3)
    torch.testing.assert_close(attention(9 * x), attention(x), rtol=2e-2, atol=2e-2)
    same = noise(2, 16, 1, 1).expand(2, 16, 3, 3)
    torch.testing.assert_close(attention(same), attention(same[..., :1, :1]).expand(same.shape))


def test_a_block_narrower_than_a_head_has_no_attention():
    wide = Edm2Options(**{**vars(TINY), "head_channels": 64})
    assert not any(isinstance(part, MPAttention) for part in tiny(wide).modules())
    count = sum(isinstance(part, MPAttention) for part in tiny().modules())
    assert count == 1 + 1 + 2  # one in the encoder, one at the bottom, two in the decoder


def test_activations_are_clamped():
    network = tiny(Edm2Options(**{**vars(TINY), "clip": 0.25}))
    found = []
    for part in network.modules():
        if isinstance(part, Edm2Block):
            part.register_forward_hook(lambda *given: found.append(given[2].abs().max()))
    run(network)
    assert max(found) == 0.25


def test_a_new_network_answers_nothing():
    torch.manual_seed(0)
    assert run(Edm2(TINY, 3, 4)).abs().max() == 0
