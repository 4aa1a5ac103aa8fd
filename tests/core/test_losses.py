from functools import partial

import pytest
import torch
from torch import nn

from cmtool.core.distances import l2
from cmtool.core.losses import (
    WEIGHTINGS,
    Pair,
    consistency_loss,
    denoising_loss,
    karras,
    noise_pair,
    progressive_loss,
    teacher_pair,
    uniform_weight,
)
from cmtool.core.noise import NoiseRange, Stage, karras_sigmas, lognormal
from cmtool.core.rng import seeded
from cmtool.core.solvers import SOLVERS
from cmtool.core.tensors import expand, level
from cmtool.system.devices import autocast
from tests.networks import network
from tests.objectives import alone, objective_of
from tests.problems import Gaussian, slope


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_noise_pair_shares_image_and_noise():
    x0, noise = drawn(2, 5, 3, 2, 2)
    hi, lo = torch.linspace(1, 5, 5).double(), torch.linspace(0.1, 0.5, 5).double()
    pair = noise_pair(x0, hi, lo, noise)
    torch.testing.assert_close((pair.x_hi - x0) / expand(hi, x0), noise)
    torch.testing.assert_close((pair.x_lo - x0) / expand(lo, x0), noise)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_teacher_pair_stays_on_the_path(name, order):
    """One step of size h is wrong by h^(order + 1)."""
    problem = Gaussian()
    x0, noise = drawn(2, 1, 1, 1, 1)
    sizes, errors = [8, 16, 32, 64], []
    for n in sizes:
        hi = torch.tensor([2.0]).double()
        lo = hi - 1 / n
        pair = teacher_pair(x0, hi, lo, noise, None, problem.denoiser, SOLVERS[name])
        errors.append(float((pair.x_lo - problem.at(pair.x_hi, hi, lo)).abs()))
    assert slope(sizes, errors) == pytest.approx(order + 1, abs=0.1)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_exact_map_has_almost_no_loss_and_a_wrong_one_has(name):
    problem = Gaussian()
    x0, noise = drawn(2, 64, 1, 1, 1)
    sigmas = karras_sigmas(400, problem.eps, 20.0)
    hi, lo = sigmas[150:214], sigmas[149:213]
    pair = teacher_pair(x0, hi, lo, noise, None, problem.denoiser, SOLVERS[name])
    loss = partial(consistency_loss, pair=pair, labels=None, distance=l2, weight=uniform_weight)
    exact = loss(problem.consistency, problem.consistency)
    wrong = loss(problem.denoiser, problem.denoiser)
    assert exact.shape == (64,)
    assert float(exact.max()) < 0.05 * float(wrong.mean())


def test_consistency_loss_differentiates_the_student_only():
    student, target = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    pair = noise_pair(
        torch.ones(2, 1, 2, 2), torch.ones(2) * 2, torch.ones(2), torch.ones(2, 1, 2, 2)
    )
    loss = consistency_loss(
        lambda x, s, y: student(x), lambda x, s, y: target(x), pair, None, l2, uniform_weight
    )
    loss.sum().backward()
    assert student.weight.grad is not None
    assert target.weight.grad is None


def test_student_and_target_drop_the_same_units():
    dropout = nn.Dropout(0.5)
    x = torch.ones(4, 8, 4, 4)
    pair = noise_pair(x, torch.ones(4) * 2, torch.ones(4), torch.zeros_like(x))
    seen = []

    def f(x, sigma, labels):
        seen.append(dropout(x))
        return seen[-1]

    with seeded(torch.Generator().manual_seed(0)):
        consistency_loss(f, f, pair, None, l2, uniform_weight)
        other = dropout(x)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adm", "song"])
def test_every_network_drops_the_same_units_in_both_passes(name, precision):
    """So two passes over one point agree to the last bit, and without the masks they do not."""
    f, x = network(name), drawn(2, 3, 8, 8).float()
    labels, sigma = torch.tensor([1, 7]), torch.tensor([0.7, 4.0]).double()
    same = Pair(x, sigma, x, sigma)
    with autocast("cpu", precision), seeded(torch.Generator().manual_seed(0)):
        loss = consistency_loss(f, f, same, labels, l2, uniform_weight)
        apart = l2(f(x, sigma, labels), f(x, sigma, labels))
    assert (loss == 0).all()
    assert (apart > 0).all()


def test_the_weight_is_a_function_of_both_levels():
    pair = noise_pair(torch.zeros(1, 1, 1, 1), torch.tensor([2.0]), torch.tensor([0.5]),
                      torch.ones(1, 1, 1, 1))  # fmt: skip
    loss = consistency_loss(
        lambda x, s, y: x, lambda x, s, y: x, pair, None, l2, lambda hi, lo: hi + 10 * lo
    )
    assert float(loss) == pytest.approx(7.0 * 1.5**2)


def test_denoising_loss_by_hand():
    x0 = torch.full((1, 1, 2, 2), 0.5)
    loss = denoising_loss(
        lambda x, s, y: x, x0, torch.tensor([2.0]), torch.full_like(x0, 0.1), None,
        partial(karras, sigma_data=0.5),
    )  # fmt: skip
    assert float(loss) == pytest.approx((1 / 4 + 4) * 0.2**2)


def test_progressive_loss_by_hand():
    """Of a previous student that says x / 2, and a student that says 3 x."""
    hi, mid, lo = 5.0, 2.0, 0.5
    x = torch.tensor([1.0, -2.0]).reshape(1, 1, 1, 2)
    asked = []

    def student(x, sigma, labels):
        asked.append(float(sigma))
        return 3 * x

    loss = progressive_loss(
        student, lambda x, sigma, labels: x / 2, x, *(torch.tensor([s]) for s in (hi, mid, lo)),
        None, l2, lambda hi, lo: hi + 10 * lo,
    )  # fmt: skip
    x_mid = (hi + mid) / (2 * hi)  # of x = 1: x + (mid - hi) x / (2 hi)
    x_lo = x_mid * (mid + lo) / (2 * mid)
    x0 = 1 - hi * (1 - x_lo) / (hi - lo)
    assert asked == [hi]
    assert float(loss) == pytest.approx((hi + 10 * lo) * (3 - x0) ** 2 * 2.5, rel=1e-5)


def test_the_posterior_mean_minimises_the_denoising_loss():
    problem, n = Gaussian(), 200_000
    x0 = problem.m + problem.s * drawn(n, 1, 1, 1)
    noise, sigma = drawn(n, 1, 1, 1, seed=1), torch.ones(n).double()

    def mean_loss(shift, scale):
        def f(x, sigma, y):
            return problem.m + (problem.denoiser(x, sigma) - problem.m) * scale + shift

        return float(denoising_loss(f, x0, sigma, noise, None, uniform_weight).mean())

    best = mean_loss(0, 1)
    assert best == pytest.approx(1 / (1 / problem.s**2 + 1), rel=0.01)
    assert best < min(mean_loss(0.05, 1), mean_loss(-0.05, 1), mean_loss(0, 1.1), mean_loss(0, 0.9))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weighting_is_positive_and_per_image(name):
    hi = torch.tensor([0.01, 0.5, 80.0])
    weight = WEIGHTINGS[name](hi, hi / 2)
    assert weight.shape == (3,)
    assert (weight > 0).all()


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("uniform", {}, [1, 1]),
        ("inverse_gap", {}, [1 / 0.25, 1 / 3]),
        ("karras", {}, [4 + 4, 1 / 16 + 4]),
        ("karras", {"sigma_data": 0.2}, [4 + 25, 1 / 16 + 25]),
        ("snr", {}, [4, 1 / 16]),
        ("snr_plus_one", {}, [5, 17 / 16]),
        ("truncated_snr", {}, [4, 1]),
    ],
)
def test_weightings_by_hand(name, options, values):
    hi, lo = torch.tensor([0.5, 4.0]), torch.tensor([0.25, 1.0])
    assert WEIGHTINGS[name](hi, lo, **options).tolist() == pytest.approx(values)


def test_objectives_are_functions_of_their_generator():
    f, x0 = Gaussian().denoiser, drawn(8, 1, 2, 2)
    for objective in (
        objective_of("denoising", lognormal, weight=karras),
        objective_of("consistency_training"),
    ):

        def run(seed, objective=objective):
            generator = torch.Generator().manual_seed(seed)
            return objective(alone(f), x0, None, Stage(n=18), generator)

        assert torch.equal(run(1).loss, run(1).loss)
        assert not torch.equal(run(1).loss, run(2).loss)
        assert run(1).sigma.shape == (8,)


STEPS = 4000


class Table(nn.Module):
    """A consistency model of 1-D Gaussian data: slope and offset for each level of a grid."""

    def __init__(self, sigmas, eps):
        super().__init__()
        self.sigmas, self.eps = sigmas, eps
        self.slope = nn.Parameter(torch.ones(len(sigmas), dtype=torch.float64) * 0.5)
        self.offset = nn.Parameter(torch.zeros(len(sigmas), dtype=torch.float64))

    def forward(self, x, sigma, labels=None):
        i = torch.searchsorted(self.sigmas, sigma.contiguous())
        free = expand(self.slope[i], x) * x / expand(1 + sigma, x) + expand(self.offset[i], x)
        return torch.where(expand(sigma, x) == self.eps, x, free)


@pytest.mark.parametrize("solver", SOLVERS)
def test_distillation_nears_the_exact_map_as_the_grid_gets_finer(solver):
    """Theorem 1 of Song et al. (2023) on a trained map: N = 9, 18, 36."""
    problem = Gaussian()
    errors = []
    for n in (9, 18, 36):
        span = NoiseRange(problem.eps, 10.0)
        sigmas = karras_sigmas(n, *span)
        student = Table(sigmas, problem.eps)
        objective = objective_of(
            "consistency_distillation",
            noise_range=span,
            teacher=problem.denoiser,
            solver=SOLVERS[solver],
        )
        optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=STEPS)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            x0 = problem.m + problem.s * torch.randn(256, 1, 1, 1, generator=generator).double()
            loss = objective(alone(student), x0, None, Stage(n=n), generator).loss.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        x = 10.0 * drawn(4000, 1, 1, 1, seed=5)
        with torch.no_grad():
            gap = student(x, level(10.0, x)) - problem.consistency(x, level(10.0, x))
        errors.append(float(gap.square().mean().sqrt()))
    print(f"{solver}: error against the exact map for N = 9, 18, 36: {errors}")
    order = slope([8, 17, 35], errors)
    assert order == pytest.approx({"euler": 1, "heun": 2, "dpm2": 2}[solver], abs=0.25)
