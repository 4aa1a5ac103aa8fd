import math

import pytest
import torch
from torch import nn

from cmtool.core.ema import (
    Ema,
    Profile,
    frozen_copy,
    gamma_of,
    inner_product,
    posthoc_weights,
    power_decay,
    update_average,
)


def sigma_rel_of(gamma):
    """The standard deviation of a power's profile as a share of the run (eq. 123)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def test_update_is_a_convex_combination_from_the_first_step():
    old, new = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 6.0])]
    update_average(old, new, 0.75)
    torch.testing.assert_close(old[0], torch.tensor([1.5, 3.0]))
    update_average(old, new, 0.25)
    torch.testing.assert_close(old[0], torch.tensor([2.625, 5.25]))
    update_average(old, new, 0.0)
    assert torch.equal(old[0], new[0])


def test_a_copy_is_float32_and_frozen():
    model = nn.Linear(2, 2).to(torch.bfloat16)
    twin = frozen_copy(model)
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in twin.parameters())
    assert model.weight.requires_grad


def test_the_average_drops_no_units_and_its_model_still_does():
    model = nn.Dropout(0.5)
    assert not Ema(model, rate=0.9).model.training
    assert model.training
    assert frozen_copy(model).training


def test_a_halflife_halves():
    ema = Ema(nn.Linear(1, 1), halflife_images=1000)
    assert ema.decay(100, 10**6) ** 10 == pytest.approx(0.5)


def test_the_paper_rate_is_the_halflife_of_edm():
    ema = Ema(nn.Linear(1, 1), halflife_images=50e6)
    assert ema.decay(4096, 10**9) == pytest.approx(0.9999432189950708, rel=1e-12)


def test_ramp_up_forgets_the_start():
    ema = Ema(nn.Linear(1, 1), halflife_images=1e6, rampup=0.05)
    assert ema.decay(64, 64) == pytest.approx(0.5 ** (64 / 3.2))
    assert ema.decay(64, 10**9) == pytest.approx(0.5 ** (64 / 1e6))
    rate = Ema(nn.Linear(1, 1), rate=0.9999, rampup=0.05)
    assert rate.decay(64, 64) == pytest.approx(0.5 ** (64 / 3.2))
    assert rate.decay(64, 10**9) == pytest.approx(0.9999)


def test_a_first_update_with_a_ramp_up_copies():
    assert Ema(nn.Linear(1, 1), halflife_images=1e6, rampup=0.05).decay(1, 0) == 0


def test_a_fixed_rate_is_fixed():
    assert Ema(nn.Linear(1, 1), rate=0.9).decay(64, 1) == 0.9


WIDTHS = [0.001, 0.05, 0.1, 0.28]


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_width_and_exponent_are_inverses(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)


def test_the_widths_of_edm2():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(12**-0.5) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94])
def test_a_step_counts_in_an_average_by_its_power(gamma):
    """The closed form of the weights, and its width."""
    steps = 400
    weights = torch.zeros(steps, dtype=torch.float64)
    for step in range(1, steps + 1):
        decay = power_decay(gamma, step)
        weights *= decay
        weights[step - 1] = 1 - decay
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(weights, (t ** (gamma + 1)).diff(), rtol=1e-10, atol=1e-15)
    middle = (t[1:] + t[:-1]) / 2
    mean = (weights * middle).sum()
    width = (weights * (middle - mean) ** 2).sum().sqrt()
    assert width.item() == pytest.approx(sigma_rel_of(gamma), rel=1e-3)


def test_the_power_average_of_a_ramp():
    """Weights that grow by 1 a step have the average T (gamma + 1) / (gamma + 2), nearly."""
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, sigma_rel=0.1)
    for step in range(1000):
        model.weight.data.fill_(step + 0.5)
        decay = ema.decay(7, 7 * step)
        update_average(ema.model.parameters(), model.parameters(), decay)
        if step == 0:
            assert ema.model.weight.item() == 0.5
    gamma = gamma_of(0.1)
    expected = 1000 * (gamma + 1) / (gamma + 2)
    assert ema.model.weight.item() == pytest.approx(expected, rel=1e-4)


STORED = [Profile(t, gamma_of(s)) for t in range(100, 1700, 100) for s in (0.05, 0.1)]


def test_inner_products_are_integrals():
    t = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 1000

    def profile(p):
        return (p.gamma + 1) * t**p.gamma / p.step ** (p.gamma + 1) * (t <= p.step)

    for a, b in [(Profile(300, 2.5), Profile(400, 6.0)), (Profile(400, 0.5), Profile(100, 7.0))]:
        integral = (profile(a) * profile(b)).sum().item() / 1000
        assert inner_product(a, b) == pytest.approx(integral, rel=1e-4)
        assert inner_product(a, b) == inner_product(b, a)


@pytest.mark.parametrize("index", [3, 16, 31])
def test_a_stored_average_is_made_of_itself(index):
    factors = posthoc_weights(STORED, STORED[index])
    expected = torch.eye(len(STORED), dtype=torch.float64)[index]
    torch.testing.assert_close(factors, expected, rtol=0, atol=1e-10)


def test_another_width_made_of_stored_averages_is_near_to_one_that_was_kept():
    """The parameter is a random walk; the average of 0.075 was not stored."""
    walk = torch.randn(1600, generator=torch.Generator().manual_seed(0)).double().cumsum(0)
    kept = {s: torch.zeros((), dtype=torch.float64) for s in (0.05, 0.075, 0.1)}
    stored = []
    for step, value in enumerate(walk.tolist(), start=1):
        for s, average in kept.items():
            average.lerp_(torch.tensor(value).double(), 1 - power_decay(gamma_of(s), step))
        if step % 100 == 0:
            stored += [kept[0.05].item(), kept[0.1].item()]
    made = posthoc_weights(STORED, Profile(1600, gamma_of(0.075))) @ torch.tensor(stored).double()
    apart = abs(kept[0.1] - kept[0.05]).item()
    assert abs(made - kept[0.075]).item() < 0.02 * apart


def test_the_factors_solve_the_normal_equations():
    """Few averages, so that the system is well-conditioned and can be solved as it is."""
    stored, wanted = [STORED[i] for i in (1, 6, 15, 31)], Profile(1600, gamma_of(0.12))
    gram = torch.tensor([[inner_product(a, b) for b in stored] for a in stored]).double()
    right = torch.tensor([inner_product(a, wanted) for a in stored]).double()
    solved = torch.linalg.solve(gram, right)
    found = posthoc_weights(stored, wanted)
    torch.testing.assert_close(found, solved / solved.sum(), rtol=1e-3, atol=1e-4)
