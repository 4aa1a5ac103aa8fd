import pytest
import torch

from cmtool.core.noise import NoiseRange
from cmtool.core.samplers import SAMPLERS, clipped, multistep, sampling_levels
from cmtool.errors import UserError
from tests.problems import Gaussian, randn_like_from


def test_one_step_is_the_exact_map():
    problem, init = Gaussian(), torch.zeros(4, 1, 2, 2, dtype=torch.float64)
    noise = randn_like_from(0)(init)
    x0 = multistep(problem.consistency, init, [5.0], lambda _: noise, sigma_min=problem.eps)
    torch.testing.assert_close(x0, problem.at(5.0 * noise, 5.0, problem.eps))


@pytest.mark.parametrize("sigmas", [[50.0], [50.0, 2.0], [50.0, 5.0, 0.8, 0.3]])
def test_multistep_has_the_exact_mean_and_variance(sigmas):
    problem = Gaussian()
    init = torch.full((400_000, 1, 1, 1), problem.m, dtype=torch.float64)
    x0 = multistep(problem.consistency, init, sigmas, randn_like_from(1), sigma_min=problem.eps)
    variance = problem.s**2 + problem.eps**2
    if len(sigmas) == 1:  # the start has variance sigma^2 where the path has s^2 + sigma^2
        variance *= sigmas[0] ** 2 / (problem.s**2 + sigmas[0] ** 2)
    assert float(x0.mean()) == pytest.approx(problem.m, abs=0.005)
    assert float(x0.var()) == pytest.approx(variance, rel=0.01)


def test_each_level_costs_one_call_at_that_level():
    seen = []

    def f(x, sigma, labels=None):
        seen.append(float(sigma[0]))
        return x * 0

    multistep(f, torch.zeros(2, 1, 1, 1), [80.0, 1.5, 0.002], randn_like_from(0), sigma_min=0.002)
    assert seen == [80.0, 1.5, 0.002]


def test_the_last_level_may_be_sigma_min_and_adds_no_noise():
    x0 = multistep(
        lambda x, sigma, labels=None: x,
        torch.zeros(1, 1, 1, 1),
        [1.0, 0.002],
        lambda like: torch.full_like(like, 3.0),
        sigma_min=0.002,
    )
    assert float(x0) == 3.0


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_ode_samplers_reach_the_data_distribution(name):
    problem = Gaussian(s=0.5)
    sampler = SAMPLERS[name]
    init = torch.full((200_000, 1, 1, 1), problem.m, dtype=torch.float64)
    sigmas = sampling_levels(100, NoiseRange(0.002, 50.0))
    x0 = sampler(problem.denoiser, init, sigmas, randn_like_from(2), sigma_min=0.002)
    assert float(x0.mean()) == pytest.approx(problem.m, abs=0.005)
    assert float(x0.std()) == pytest.approx(problem.s, rel=0.05)


@pytest.mark.parametrize("bad", [[], [1.0, 2.0], [1.0, 1.0], [1.0, 0.001]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_levels_are_refused(name, bad):
    with pytest.raises(UserError):
        SAMPLERS[name](
            Gaussian().denoiser, torch.zeros(1, 1, 1, 1), bad, torch.randn_like, sigma_min=0.002
        )


def test_projection_follows_every_call():
    kept = torch.tensor(0.25)
    seen = []

    def f(x, sigma, labels=None):
        seen.append(x)
        return x

    result = multistep(
        f,
        torch.zeros(1, 1, 1, 1),
        [2.0, 1.0],
        torch.ones_like,
        sigma_min=0.002,
        project=lambda x0: x0 * 0 + kept,
    )
    assert float(seen[1]) == pytest.approx(0.25 + (1 - 0.002**2) ** 0.5)
    assert float(result) == 0.25


def test_clipped_clamps_the_answer():
    f = clipped(lambda x, sigma, labels=None: x * 5)
    assert f(torch.ones(1, 1, 1, 1), torch.ones(1)).item() == 1.0
