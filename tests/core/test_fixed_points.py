"""On Gaussian data the exact consistency function is where each method of 2024 and 2025 ends.

Expectations over the data and the noise are exact, by quadrature, so that nothing is sampled.
"""

import math
from functools import partial

import pytest
import torch

from cmtool.core import methods
from cmtool.core.distances import l2, pseudo_huber
from cmtool.core.losses import inverse_gap, uniform_weight
from cmtool.core.methods import Given, Models
from cmtool.core.noise import NoiseRange, Stage, tightened
from cmtool.core.paths import PathPoints
from cmtool.core.solvers import heun
from cmtool.core.tensors import expand
from tests.problems import Gaussian

PROBLEM = Gaussian(eps=0.0)
"""The boundary is at 0."""
STAGE = Stage(images=10**9)
LEVELS = [0.02, 0.3, 1.0, 7.0, 60.0]


def nodes(n=24):
    """The nodes and weights of N(0, 1), by Golub and Welsch; float64."""
    j = torch.diag(torch.arange(1, n, dtype=torch.float64).sqrt(), 1)
    values, vectors = torch.linalg.eigh(j + j.T)
    return values, vectors[0] ** 2


def everything(sigma, sigma_lo=None):
    """All pairs of x0 and noise, one pixel each, and what they weigh."""
    z, w = nodes()
    a, b = torch.meshgrid(z, z, indexing="ij")
    x0 = PROBLEM.m + PROBLEM.s * a.reshape(-1, 1, 1, 1)
    hi = torch.full((len(x0),), sigma, dtype=torch.float64)
    lo = torch.zeros_like(hi) if sigma_lo is None else torch.full_like(hi, sigma_lo)
    given = Given(x0, None, b.reshape(-1, 1, 1, 1), hi, lo, STAGE)
    return given, torch.outer(w, w).reshape(-1)


class Map(torch.nn.Module):
    """The exact map between two levels, its scale to a power that is learned: 1 is right."""

    def __init__(self, power):
        super().__init__()
        self.power = torch.nn.Parameter(torch.tensor(float(power), dtype=torch.float64))

    def forward(self, x, sigma, labels=None, sigma_to=None):
        to = torch.zeros_like(sigma) if sigma_to is None else sigma_to
        ratio = (PROBLEM.s**2 + expand(to**2, x)) / (PROBLEM.s**2 + expand(sigma**2, x))
        end = PROBLEM.m + (x - PROBLEM.m) * ratio.sqrt() ** self.power
        gap = expand(sigma - to, x)
        jump = x - expand(sigma, x) * (x - end) / torch.where(gap == 0, 1.0, gap)
        return torch.where(gap == 0, PROBLEM.denoiser(x, sigma), jump)


def gradient(method, at, sigma, sigma_lo=None, target=None, **choices):
    """The gradient of the expected loss by the power, at one level or pair of levels."""
    f = Map(at)
    models = Models(f, target or f, PROBLEM.denoiser)
    given, weights = everything(sigma, sigma_lo)
    loss = (method(models, given, **choices) * weights).sum()
    loss.backward()
    return float(f.power.grad)


DISTILL = {
    "ecd": (
        methods.consistency_distillation,
        {"solver": heun, "distance": partial(pseudo_huber, c=0.03), "weight": inverse_gap},
    ),
    "scd": (
        methods.scm_distillation,
        {"weight": uniform_weight, "sigma_data": 0.6, "tangent": "norm"},
    ),
}


@pytest.mark.parametrize("sigma", LEVELS)
def test_scd_stays_at_the_consistency_function_and_comes_back_to_it(sigma):
    method, choices = DISTILL["scd"]
    assert abs(gradient(method, 1.0, sigma, **choices)) < 1e-6
    assert gradient(method, 1.2, sigma, **choices) > 0
    assert gradient(method, 0.8, sigma, **choices) < 0


@pytest.mark.parametrize("sigma", LEVELS)
def test_sct_stays_at_the_consistency_function(sigma):
    """With a large c normalising is a factor, and the mean over data is that of the teacher."""
    choices = {"weight": uniform_weight, "sigma_data": 0.6, "tangent": "norm", "c": 1e6}
    scale = abs(gradient(methods.scm_training, 1.2, sigma, **choices))
    assert abs(gradient(methods.scm_training, 1.0, sigma, **choices)) < 1e-6 * scale
    assert gradient(methods.scm_training, 1.2, sigma, **choices) > 0
    assert gradient(methods.scm_training, 0.8, sigma, **choices) < 0


def ode_teacher(solver_steps=400):
    """A solver that goes from one level to another along the exact path."""

    def exact(denoiser, x, sigma, sigma_next, labels):
        return PROBLEM.at(x, expand(sigma, x), expand(sigma_next, x))

    return exact


@pytest.mark.parametrize("sigma", LEVELS)
def test_ecd_stays_at_the_consistency_function_and_comes_back_to_it(sigma):
    """With the exact path of the teacher in place of a solver's step."""
    method, choices = DISTILL["ecd"]
    lo = float(tightened(torch.tensor([sigma]), 6, q=2.0, k=8.0, b=1.0))
    choices = choices | {"solver": ode_teacher()}
    frozen = Map(1.0)
    assert abs(gradient(method, 1.0, sigma, lo, frozen, **choices)) < 1e-6
    assert gradient(method, 1.2, sigma, lo, frozen, **choices) > 1e-4
    assert gradient(method, 0.8, sigma, lo, frozen, **choices) < -1e-4


@pytest.mark.parametrize("sigma", LEVELS)
def test_training_on_pairs_tends_to_the_consistency_function_as_the_gap_closes(sigma):
    """iCT and ECT: the gradient by l2, over the gap, falls with the gap."""
    found = []
    for share in (1e-2, 1e-3, 1e-4):
        pair = (sigma, sigma * (1 - share))
        choices = {"distance": l2, "weight": uniform_weight}
        found.append(gradient(methods.consistency_training, 1.0, *pair, **choices) / share)
        wrong = gradient(methods.consistency_training, 1.2, *pair, **choices) / share
    assert abs(found[1]) < 0.11 * abs(found[0])
    assert abs(found[2]) < 0.11 * abs(found[1])
    assert abs(found[2]) < 1e-3 * abs(wrong)


@pytest.mark.parametrize("sigma", LEVELS)
def test_tcm_ends_where_its_first_stage_does(sigma):
    """A pair that straddles the transition: the frozen map below, the exact path between."""
    weights = {"distance": l2, "weight": uniform_weight, "transition": sigma}
    frozen, share = Map(1.0), 1e-4
    right = gradient(methods.truncated_training, 1.0, sigma, sigma * (1 - share), frozen, **weights)
    wrong = gradient(methods.truncated_training, 1.2, sigma, sigma * (1 - share), frozen, **weights)
    assert abs(right) < 1e-3 * abs(wrong)
    assert wrong > 0


@pytest.mark.parametrize("sigma", LEVELS)
def test_cmt_ends_at_the_consistency_function(sigma):
    """Points of the exact path, and its end."""

    def loss_of(power):
        f = Map(power)
        given, weights = everything(sigma)
        x = given.x0 + sigma * given.noise
        end = PROBLEM.at(x, sigma, 0.0)
        point = given._replace(x0=end, noise=(x - end) / sigma)
        distance = partial(pseudo_huber, c=0.03)
        loss = methods.mid_training(Models(f, f), point, distance=distance, weight=uniform_weight)
        (loss * weights).sum().backward()
        return float(f.power.grad)

    assert abs(loss_of(1.0)) < 1e-3 * loss_of(1.2)
    assert loss_of(1.2) > 0
    assert loss_of(0.8) < 0


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_mean_flow_stays_at_the_map_between_two_levels(sigma, share):
    """At power 0, where the loss is a square and its mean over the data is exact."""
    choices = {"power": 0.0}
    wrong = gradient(methods.mean_flow, 1.2, sigma, sigma * share, **choices)
    assert abs(gradient(methods.mean_flow, 1.0, sigma, sigma * share, **choices)) < 1e-6 * wrong
    assert wrong > 0


def test_points_of_paths_lie_on_them_and_each_comes_once_a_block():
    """The bank is a function of (seed, block, shard), and a path has every level."""
    images = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    asked, walked = [], []

    def draw(step, shard):
        asked.append((step, shard))
        return images + shard, torch.arange(6)

    def teacher(x, sigma, labels=None):
        walked.append(len(x))
        return PROBLEM.denoiser(x, sigma)

    span = NoiseRange(0.01, 20.0)
    source = PathPoints(draw, teacher, span, seed=3, points=400, walk="dpmpp_2m")
    again = PathPoints(draw, teacher, span, seed=3, points=400, walk="dpmpp_2m")
    seen = []
    for step in (0, 1, 399):
        x0, labels, noise, sigma = source(step, 0)
        x = x0 + expand(sigma, x0) * noise
        end = PROBLEM.at(x, expand(sigma, x), 0.0)
        torch.testing.assert_close(x0, end, rtol=2e-2, atol=2e-2)
        assert labels.tolist() == list(range(6))
        seen.append(sigma)
    assert asked == [(0, 0)]  # one walk for a whole block
    assert len(walked) == 400
    assert torch.equal(seen[0][1:], seen[1][:-1])  # the next step takes the next point
    resumed = again(399, 0)
    assert torch.equal(resumed.noise, noise)
    assert torch.equal(resumed.sigma, sigma)
    other = source(400, 0)
    assert asked[-1] == (1, 0)
    assert not torch.equal(other.x0, x0)
    assert not torch.equal(source(400, 1).x0, other.x0)


@pytest.mark.parametrize(("points", "mixed", "size"), [(4, 3, 5), (16, 4, 16), (8, 2, 3)])
def test_mixed_paths_give_every_point_of_every_path_once(points, mixed, size):
    def draw(step, shard):
        x0 = torch.arange(size, dtype=torch.float64).reshape(-1, 1, 1, 1) + 100 * step
        return x0, torch.arange(size) + 100 * step

    def ends(x, sigma, labels=None):
        return labels.double().reshape(-1, 1, 1, 1).expand_as(x)

    span = NoiseRange(0.01, 20.0)
    mixing = PathPoints(draw, ends, span, 3, points, "euler", None, mixed)
    plain = PathPoints(draw, ends, span, 3, points, "euler")
    block = points * mixed

    def all_of(source, steps):
        taken = []
        for step in steps:
            x0, labels, noise, sigma = source(step, 0)
            assert len(x0) == size
            x = x0 + expand(sigma, x0) * noise
            taken += list(zip(labels.tolist(), sigma.tolist(), x.flatten().tolist(), strict=True))
        return taken

    second = range(block, 2 * block)
    one, other = all_of(mixing, second), all_of(plain, second)
    torch.testing.assert_close(torch.tensor(sorted(one)), torch.tensor(sorted(other)))
    assert one != other
    for step in second:  # every step has levels as different as can be
        sigma = mixing(step, 0).sigma
        assert len(set(sigma.tolist())) == min(points, size)
    again = PathPoints(draw, ends, span, 3, points, "euler", None, mixed)
    assert torch.equal(again(block + 5, 0).noise, mixing(block + 5, 0).noise)
    batches = [set(mixing(step, 0).labels.tolist()) for step in second]
    assert len({frozenset(batch) for batch in batches}) > points  # other paths at each step


def test_levels_of_a_path_are_even_in_the_logarithm():
    source = PathPoints(
        lambda *_: (torch.zeros(5, 1, 1, 1), None), PROBLEM.denoiser, NoiseRange(), 0, points=5
    )
    _, _, _, sigma = source(0, 0)
    ratio = math.exp(math.log(0.002 / 80) / 4)
    expected = torch.tensor([80 * ratio**i for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(sigma, expected)
