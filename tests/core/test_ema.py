import pytest
import torch
from torch import nn

from cmtool.core.ema import Ema, frozen_copy, update_average


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
