import itertools
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


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_call_hears_the_labels_and_the_end_is_projected(name):
    heard, labels = [], torch.tensor([3, 1])

    def f(x, sigma, labels=None):
        heard.append(labels)
        return x

    init = torch.zeros(2, 1, 1, 1).double()
    x0 = SAMPLERS[name](f, init, [80.0, 2.0, 0.5], torch.ones_like, sigma_min=0.002,
                        labels=labels, project=lambda x0: 0 * x0 + 0.25)  # fmt: skip
    assert all(given is labels for given in heard)
    assert x0.flatten().tolist() == [0.25, 0.25]


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


@pytest.mark.parametrize(
    ("sigma", "gamma"), [(50.0, 0.1), (50.01, 0.0), (0.05, 0.1), (0.0499, 0.0)]
)
def test_churn_by_default_is_edms_and_its_range_has_both_its_ends(sigma, gamma):
    """S_churn 40 over 400 levels, S_tmin 0.05, S_tmax 50, S_noise 1.003 (EDM, Table 5)."""
    seen = []

    def f(x, sigma, labels=None):
        seen.append((float(sigma), float(x)))
        return x

    levels = [sigma * 0.99**i for i in range(400)]
    stochastic_heun(f, torch.zeros(1, 1, 1, 1).double(), levels, torch.ones_like, sigma_min=0)
    raised = sigma * (1 + gamma)
    noisy = sigma + 1.003 * (raised**2 - sigma**2) ** 0.5
    assert seen[0] == pytest.approx((raised, noisy), rel=1e-12)


def test_the_second_order_takes_the_middle_of_each_step_whatever_the_steps():
    """Of a D that is a line in ln sigma: the steps of this grid are far from equal."""
    levels = [80.0, 10.0, 7.0, 0.5, 0.3]

    def line(x, sigma, labels=None):
        return sigma.log().reshape(-1, 1, 1, 1).expand_as(x)

    x = 80.0
    for i, (hi, lo) in enumerate(itertools.pairwise(levels)):
        at = hi if i == 0 else (hi * lo) ** 0.5  # nothing is known before the first
        x = lo / hi * x + (1 - lo / hi) * math.log(at)
    seen = []

    def recorded(x, sigma, labels=None):
        seen.append(float(x))
        return line(x, sigma)

    SAMPLERS["dpmpp_2m"](recorded, torch.zeros(1, 1, 1, 1).double(), levels, torch.ones_like,
                         sigma_min=0.002)  # fmt: skip
    assert seen[-1] == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize(
    ("side", "tile", "places"),
    [(8, 8, [0]), (9, 8, [0, 1]), (12, 8, [0, 4]), (20, 8, [0, 4, 8, 12]),
     (21, 8, [0, 3, 6, 10, 13]), (11, 7, [0, 2, 4])],
)  # fmt: skip
@pytest.mark.parametrize("is_wide", [False, True])
def test_tiles_overlap_by_half_and_every_pixel_is_the_mean_of_its_tiles(
    side, tile, places, is_wide
):
    labels, seen = torch.tensor([5]), []

    def place_of(x, sigma, labels=None):
        seen.append((int(x[0, 0, 0, 0]), labels))
        return x[..., :1, :1].square().expand_as(x)

    shape = (1, 1, 1, side) if is_wide else (1, 1, side, 1)
    size = (1, tile) if is_wide else (tile, 1)
    picture = torch.arange(side).reshape(shape).float()
    answer = tiled(place_of, size)(picture, torch.ones(1), labels)
    assert [place for place, _ in seen] == places
    assert all(given is labels for _, given in seen)
    over = [[p**2 for p in places if p <= i < p + tile] for i in range(side)]
    assert answer.flatten().tolist() == pytest.approx([sum(each) / len(each) for each in over])


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (9, 20), (11, 11)])
def test_tiles_cover_a_picture_and_agree_on_what_is_local(size):
    shapes = set()

    def local(x, sigma, labels=None):
        shapes.add(tuple(x.shape))
        return 3 * x + 1

    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(tiled(local, (8, 8))(x, torch.ones(2)), 3 * x + 1)
    assert shapes == {(2, 3, 8, 8)}


@pytest.mark.parametrize(
    "bad", [[], [1.0, 2.0], [1.0, 1.0], [1.0, 0.001], [math.inf, 1.0], [math.nan]]
)
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


@pytest.mark.parametrize("n", [1, 2, 18])
def test_levels_of_a_teacher_begin_with_the_most_noise(n):
    levels = sampling_levels(n, NoiseRange(0.3, 50.0))
    assert len(levels) == n
    assert levels[0] == 50.0
    assert n == 1 or levels[-1] == 0.3


def test_clipped_clamps_the_answer():
    f = clipped(lambda x, sigma, labels=None: x * 5)
    x = torch.tensor([-1.0, -0.1, 0.1, 1.0]).reshape(4, 1, 1, 1)
    assert f(x, torch.ones(4)).flatten().tolist() == [-1.0, -0.5, 0.5, 1.0]


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
