import math

import pytest
import torch

from cmtool.core.noise import NoiseRange
from cmtool.core.samplers import (
    SAMPLERS,
    ancestral,
    clipped,
    count_calls,
    in_chunks,
    multistep,
    sampling_levels,
    stochastic_heun,
    tiled,
)
from cmtool.core.solvers import denoised
from cmtool.errors import UserError
from tests.problems import Gaussian, randn_like_from, slope


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


TEACHERS = [name for name in SAMPLERS if name != "multistep"]
ORDER = {"euler": 1, "heun": 2, "dpm2": 2, "dpmpp_2m": 2}


@pytest.mark.parametrize("name", TEACHERS)
def test_samplers_of_teachers_reach_the_data_distribution(name):
    problem = Gaussian(s=0.5)
    init = torch.full((200_000, 1, 1, 1), problem.m, dtype=torch.float64)
    n = 400 if name == "ancestral" else 100  # order 1 in its noise too
    sigmas = sampling_levels(n, NoiseRange(0.002, 50.0))
    x0 = SAMPLERS[name](problem.denoiser, init, sigmas, randn_like_from(2), sigma_min=0.002)
    assert float(x0.mean()) == pytest.approx(problem.m, abs=0.005)
    assert float(x0.std()) == pytest.approx(problem.s, rel=0.05)


@pytest.mark.parametrize("name", ORDER)
def test_ode_samplers_near_the_end_of_the_path_at_their_order(name):
    problem, start = Gaussian(), torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64)
    exact = problem.denoiser(
        problem.at(start, 5.0, problem.eps), torch.tensor([problem.eps], dtype=torch.float64)
    )
    sizes, errors = [64, 128, 256, 512], []
    for n in sizes:
        sigmas = sampling_levels(n + 1, NoiseRange(problem.eps, 5.0))
        x0 = SAMPLERS[name](
            problem.denoiser, start - 5.0, sigmas, torch.ones_like, sigma_min=problem.eps,
            **({"to_zero": denoised} if name == "dpm2" else {}),
        )  # fmt: skip
        errors.append(float((x0 - exact).abs()))
    assert slope(sizes, errors) == pytest.approx(ORDER[name], abs=0.1)


@pytest.mark.parametrize(
    ("name", "calls"),
    [("multistep", 3), ("euler", 3), ("heun", 5), ("dpm2", 6), ("dpmpp_2m", 3), ("ancestral", 3),
     ("stochastic_heun", 5)],
)  # fmt: skip
def test_calls_are_counted(name, calls):
    assert count_calls(SAMPLERS[name], [80.0, 2.0, 0.5]) == calls


def test_ancestral_levels_are_the_published_ones():
    seen = []

    def f(x, sigma, labels=None):
        seen.append(float(x))
        return torch.zeros_like(x)

    ancestral(f, torch.zeros(1, 1, 1, 1).double(), [80.0, 57.585985], torch.ones_like,
              sigma_min=0.002)  # fmt: skip
    assert seen == pytest.approx([80.0, 41.451820 + 39.973644], abs=1e-5)


@pytest.mark.parametrize(("churn", "n", "gamma"), [(40, 256, 0.15625), (80, 18, 0.41421356)])
def test_churn_raises_the_level_by_the_published_share(churn, n, gamma):
    seen = []

    def f(x, sigma, labels=None):
        seen.append(float(sigma))
        return x

    sigmas = sampling_levels(n, NoiseRange())
    stochastic_heun(f, torch.zeros(1, 1, 1, 1), sigmas, torch.ones_like, s_churn=churn,
                    s_tmin=0, s_tmax=math.inf, sigma_min=0.002)  # fmt: skip
    assert seen[0] == pytest.approx(80 * (1 + gamma))


def test_churn_is_of_the_middle_levels_but_a_noise_is_drawn_at_each():
    draws = []

    def counted(like):
        draws.append(1)
        return torch.zeros_like(like)

    seen = []

    def f(x, sigma, labels=None):
        seen.append(float(sigma))
        return x

    stochastic_heun(f, torch.zeros(1, 1, 1, 1), [80.0, 10.0, 0.01], counted, s_churn=1.0,
                    sigma_min=0.002)  # fmt: skip
    assert seen == pytest.approx([80.0, 10.0, 10.0 * (4 / 3), 0.01, 0.01])
    assert len(draws) == 4


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (9, 20), (11, 11)])
def test_tiles_cover_a_picture_and_agree_on_what_is_local(size):
    shapes = set()

    def local(x, sigma, labels=None):
        shapes.add(tuple(x.shape))
        return 3 * x + 1

    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(tiled(local, (8, 8))(x, torch.ones(2)), 3 * x + 1)
    assert shapes == {(2, 3, 8, 8)}


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


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_the_network_sees_equal_batches(count):
    seen = []

    def f(x, sigma, labels=None):
        seen.append(len(x))
        return x * sigma[:, None, None, None] + labels[:, None, None, None]

    x, sigma, labels = torch.randn(count, 1, 2, 2), torch.rand(count), torch.arange(count)
    result = in_chunks(f, 4)(x, sigma, labels)
    torch.testing.assert_close(result, f(x, sigma, labels))
    assert set(seen[:-1]) == {4}
