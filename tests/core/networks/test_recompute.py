"""Residual blocks that are computed again in the backward pass, for less memory."""

import pytest
import torch

from cmtool.core.ema import frozen_copy
from cmtool.core.networks import layers
from cmtool.core.rng import keyed_generator, seeded
from cmtool.errors import UserError
from cmtool.presets.build import build_network
from cmtool.presets.schema import Choice, ModelSection
from cmtool.system.devices import autocast
from cmtool.training.state import recompute_activations

ADM = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [1],
       "head_channels": 16, "norm_groups": 4, "dropout": 0.3}  # fmt: skip
SONG = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "dropout": 0.3}
EDM2 = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attention_levels": [1],
        "head_channels": 16, "dropout": 0.3}  # fmt: skip
NETWORKS = {"adm": ADM, "edm2": EDM2, "song": SONG}


def network(name):
    section = ModelSection(network=Choice(name=name, **NETWORKS[name]), image_size=(8, 8))
    with seeded(keyed_generator("network")):
        net = build_network(section)
        for p in net.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    return net


def step(net, precision):
    """The answer, the gradients, and the bytes kept between the two passes."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keeping, seeded(keyed_generator("step")), autocast("cpu", precision):
        out = net(x, torch.linspace(-1, 1, 4))
    total = sum(kept.values())
    out.square().mean().backward()  # outside, where the generators are others
    return out.detach(), [p.grad for p in net.parameters()], total


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_masks_and_gradients_for_less_memory(name, precision):
    plain, again = network(name), network(name)
    recompute_activations(again, name)
    out, gradients, kept = step(plain, precision)
    other, others, fewer = step(again, precision)
    assert torch.equal(out, other)
    for mine, theirs in zip(gradients, others, strict=True):
        assert torch.equal(mine, theirs)
    assert fewer < kept / 2


@pytest.mark.parametrize("name", NETWORKS)
def test_without_gradients_nothing_is_put_aside(name, monkeypatch):
    again = network(name)
    recompute_activations(again, name)
    monkeypatch.setattr(layers, "checkpoint", None)
    with torch.no_grad():
        assert frozen_copy(again)(torch.randn(4, 3, 8, 8), torch.linspace(-1, 1, 4)).shape[0] == 4


def test_a_network_without_blocks_is_refused():
    section = ModelSection(network=Choice(name="mlp"), image_size=(1, 1))
    with pytest.raises(UserError, match="'mlp' has no residual blocks"):
        recompute_activations(build_network(section), "mlp")
