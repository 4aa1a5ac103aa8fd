"""Classifier-free guidance, by the exact denoisers of Gaussians."""

import pytest
import torch

from cmtool.core.guidance import guided
from cmtool.core.types import NO_CLASS

MEANS, NARROW, WIDE = torch.tensor([-0.5, 0.2, 0.6], dtype=torch.float64), 0.3, 0.9
"""Class c is N(MEANS[c], NARROW^2), and all images together are taken for N(0, WIDE^2)."""


def posterior(x, sigma, mean, std):
    return (x * std**2 + mean * sigma**2) / (std**2 + sigma**2)


def classes(x, sigma, labels=None, sigma_to=None):
    is_known, sigma = (labels != NO_CLASS)[:, None, None, None], sigma[:, None, None, None]
    mean = MEANS[labels.clamp(min=0)][:, None, None, None]
    of_class, of_all = posterior(x, sigma, mean, NARROW), posterior(x, sigma, 0.0, WIDE)
    return torch.where(is_known, of_class, of_all)


def point(n=12):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 2, 2, generator=gen, dtype=torch.float64)
    return x, torch.rand(n, generator=gen, dtype=torch.float64) * 3 + 0.01, torch.arange(n) % 3


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0, 3.5])
def test_the_score_is_that_of_the_class_to_a_power_over_that_of_all(weight):
    x, sigma, labels = point()
    found = guided(classes, weight)(x, sigma, labels)
    x.requires_grad_(True)
    s = sigma[:, None, None, None]
    log = {
        name: -((x - mean) ** 2) / (2 * (std**2 + s**2))
        for name, mean, std in (("class", MEANS[labels][:, None, None, None], NARROW),
                                ("all", 0.0, WIDE))
    }  # fmt: skip
    tilted = weight * log["class"] + (1 - weight) * log["all"]  # up to a constant
    (score,) = torch.autograd.grad(tilted.sum(), x)
    torch.testing.assert_close(found, x + s**2 * score, rtol=1e-12, atol=1e-12)


def test_weight_one_is_the_model_itself_and_no_labels_are_passed_on():
    assert guided(classes, 1.0) is classes
    x, sigma, _ = point()
    assert torch.equal(guided(lambda x, *_: 2 * x, 3.0)(x, sigma), 2 * x)


def test_images_that_have_lost_their_class_are_not_moved():
    x, sigma, labels = point()
    labels[::2] = NO_CLASS
    found, plain = guided(classes, 3.0)(x, sigma, labels), classes(x, sigma, labels)
    torch.testing.assert_close(found[::2], plain[::2])
    assert not torch.isclose(found[1::2], plain[1::2]).any()


def test_the_level_of_a_flow_map_goes_along():
    x, sigma, labels = point()

    def f(x, sigma, labels=None, sigma_to=None):
        return classes(x, sigma, labels) * sigma_to[:, None, None, None]

    found = guided(f, 2.0)(x, sigma, labels, sigma / 2)
    plain = guided(classes, 2.0)(x, sigma, labels)
    torch.testing.assert_close(found, plain * sigma[:, None, None, None] / 2)
