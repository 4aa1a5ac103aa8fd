"""Two networks as one: x0 of a guided model is that of its two models, by the equation."""

import pytest
import torch
from torch import nn

from cmtool.core.networks.guided import Guided, main_weights
from cmtool.core.types import NO_CLASS
from cmtool.presets.build import build_denoiser, build_network
from cmtool.presets.toml import load_preset


def parts(**model):
    """The preset of a guided digits teacher, its model, and its two networks as models."""
    preset = load_preset("digits-edm", {f"model.{key}": value for key, value in model.items()})
    torch.manual_seed(0)
    both = build_network(preset.model).eval()
    for parameter in both.parameters():  # nothing that is zero at first hides a part
        nn.init.normal_(parameter, std=0.05)
    alone = preset.model.model_copy(update={"guidance": None})
    card = preset.model_copy(update={"model": alone})
    return build_denoiser(preset, both), *(build_denoiser(card, n) for n in (both.main, both.guide))


def point():
    gen = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.01, 0.7, 60.0], dtype=torch.float64)
    x = torch.randn(3, 3, 8, 8, generator=gen) * sigma[:, None, None, None].float()
    return x, sigma, torch.tensor([3, 8, 0])


@pytest.mark.parametrize("weight", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("hears", [True, False])
def test_x0_moves_away_from_the_guides_x0(weight, hears):
    made, main, guide = parts(guidance=weight, guide_hears_class=hears)
    x, sigma, labels = point()
    heard = labels if hears else torch.full_like(labels, NO_CLASS)
    with torch.no_grad():
        strong, weak = main(x, sigma, labels), guide(x, sigma, heard)
        found = made(x, sigma, labels)
    assert not torch.allclose(strong, weak, atol=1e-2)
    torch.testing.assert_close(found, weak + weight * (strong - weak), rtol=1e-4, atol=1e-5)


def test_a_guide_with_the_weights_of_the_other_changes_nothing():
    made, main, _ = parts(guidance=3.0)
    made.network.guide.load_state_dict(made.network.main.state_dict())
    x, sigma, labels = point()
    with torch.no_grad():
        torch.testing.assert_close(made(x, sigma, labels), main(x, sigma, labels))


def test_a_model_without_classes_is_guided_too():
    made = Guided(nn.Identity(), nn.Identity(), 2.0, hears_class=False)
    made.main.forward, made.guide.forward = lambda x, *_: 3 * x, lambda x, *_: x
    x = torch.ones(2, 1, 2, 2)
    assert torch.equal(made(x, torch.zeros(2)), 5 * x)
    assert main_weights(made) == main_weights(nn.Identity()) == {}
