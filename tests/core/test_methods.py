"""Methods: what their rows promise, sigma_lo = 0, modules of their own, and a map of two levels."""

import itertools
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

from cmtool.core import methods
from cmtool.core.distances import l2
from cmtool.core.losses import consistency_loss, noise_pair, uniform_weight
from cmtool.core.methods import METHODS, Given, MethodRow, Models
from cmtool.core.networks.mlp import Mlp, MlpOptions
from cmtool.core.noise import (
    Levels,
    NoiseRange,
    Stage,
    karras_sigmas,
    lognormal,
    on_grid,
    ramp,
    two_lognormals,
    uniform,
)
from cmtool.core.objective import make_objective
from cmtool.core.precond import Preconditioned, edm_scalings, log_label
from cmtool.core.rng import step_generator
from cmtool.core.samplers import multistep
from cmtool.core.solvers import heun
from cmtool.core.tensors import expand, level
from cmtool.system.dist import ALONE
from cmtool.training.fit import FitSettings, fit
from cmtool.training.state import TrainState
from tests.objectives import alone, objective_of
from tests.problems import Gaussian, randn_like_from

ONE_LEVEL = {"denoising": lognormal, "mid_training": lognormal} | {
    name: ramp for name in METHODS if name.startswith(("continuous", "live", "scm"))
}
LEVELS = ONE_LEVEL | {"mean_flow": two_lognormals, "adaptive_training": on_grid}
STAGE = Stage(n=9, images=10**9, grid=karras_sigmas(9))
"""A grid for those that want one, and no warm-up."""


def mlp(two_time=False, sigma_min=0.002):
    torch.manual_seed(0)
    network = Mlp(MlpOptions(width=32, depth=2, two_time=two_time), channels=2)
    return Preconditioned(network, edm_scalings, log_label, sigma_data=0.5, sigma_min=sigma_min)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_loss_per_image_that_the_student_learns_from(name):
    student, teacher = mlp(two_time=METHODS[name].makes == "flow map"), mlp()
    objective = objective_of(name, LEVELS.get(name, uniform), teacher=teacher)
    x0 = torch.randn(5, 2, 1, 1)
    loss, sigma = objective(alone(student, name), x0, None, STAGE, step_generator(0, 0, 0))
    assert loss.shape == sigma.shape == (5,)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_every_model_hears_the_labels_and_the_loss_is_filed_under_the_higher_level(name):
    heard, labels = {"student": [], "target": [], "teacher": []}, torch.tensor([4, 2, 0])

    def listener(who):
        def f(x, sigma, labels=None, sigma_to=None):
            heard[who].append(labels)
            return x * expand(sigma, x).cos()

        return f

    models = {who: listener(who) for who in heard}
    objective = objective_of(name, LEVELS.get(name, uniform), teacher=models["teacher"])
    given = (torch.randn(3, 2, 1, 1), labels, STAGE, step_generator(0, 0, 0))
    loss, sigma = objective(alone(models["student"], name, models["target"]), *given)
    hi, lo = LEVELS.get(name, uniform)(3, STAGE, NoiseRange(), step_generator(0, 0, 0))
    assert torch.equal(sigma, hi)
    assert loss.shape == lo.shape
    asked = [given for each in heard.values() for given in each]
    assert all(torch.equal(given, labels[: len(given)]) for given in asked)
    walks = name == "mid_training"  # its teacher walks the paths, which are drawn before
    is_taught = METHODS[name].needs_teacher and name != "progressive_distillation" and not walks
    has_target = METHODS[name].targets != ("none",)
    assert [bool(each) for each in heard.values()] == [True, has_target, is_taught]


@pytest.mark.parametrize("name", METHODS)
def test_the_student_alone_learns_but_in_live_distillation_its_module_does(name):
    """There the wrapped student is asked once only, and `target` is its module."""
    two_time = METHODS[name].makes == "flow map"
    models = {who: mlp(two_time) for who in ("student", "target", "teacher")}
    objective = objective_of(name, LEVELS.get(name, uniform), teacher=models["teacher"])
    given = (torch.randn(3, 2, 1, 1), None, STAGE, step_generator(0, 0, 0))
    loss, _ = objective(alone(models["student"], name, models["target"]), *given)
    loss.mean().backward()
    learns = {who for who, f in models.items() if any(p.grad is not None for p in f.parameters())}
    assert learns == {"target" if name == "live_distillation" else "student"}


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_a_progressive_step_is_halved_by_the_grid_twice_as_fine(rho):
    span = NoiseRange(0.3, 10.0, rho)
    coarse, fine = karras_sigmas(5, *span), karras_sigmas(9, *span)
    x0, noise = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    asked = []

    def previous(x, sigma, labels=None):
        asked.append((x, sigma))
        return 0 * x

    given = Given(x0, None, noise, coarse[1:], coarse[:-1], Stage(n=5))
    methods.progressive_distillation(
        Models(previous, previous), given, noise_range=span, distance=l2, weight=uniform_weight
    )
    torch.testing.assert_close(asked[0][0], x0 + expand(coarse[1:], x0) * noise)
    torch.testing.assert_close(asked[0][1], coarse[1:])
    torch.testing.assert_close(asked[1][1], fine[1::2])


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_a_method_of_one_level_weighs_its_images_by_that_level(name):
    """The other level, which a weight may ask for, is 0: the clean image."""

    def f(x, sigma, labels=None):
        return x * expand(sigma, x).cos()

    def loss_of(weight):
        objective = objective_of(name, LEVELS[name], teacher=Gaussian().denoiser, weight=weight)
        x0 = torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(1))
        return objective(alone(f, name), x0, None, STAGE, step_generator(0, 0, 0))

    plain, sigma = loss_of(uniform_weight)
    weighed, _ = loss_of(lambda hi, lo: 3 * hi + 10 * lo)
    torch.testing.assert_close(weighed, (3 * sigma).to(plain) * plain)


def test_where_the_lower_level_is_zero_the_target_is_the_clean_image():
    """Whatever the network says there: at sigma 0 this one says NaN."""
    x0, noise = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    hi, lo = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0])
    asked = []

    def f(x, sigma, labels):
        asked.append(sigma)
        return 2 * x * expand(sigma, x) / expand(sigma, x)

    pair = noise_pair(x0, hi, lo, noise)
    loss = consistency_loss(f, f, pair, None, l2, uniform_weight)
    torch.testing.assert_close(loss[::2], l2(2 * pair.x_hi, x0)[::2])
    torch.testing.assert_close(loss[1], l2(2 * pair.x_hi, 2 * pair.x_lo)[1])
    assert (asked[1] > 0).all()  # the network is never asked for sigma 0


def two_level_regression(models: Models, given: Given, *, distance, weight) -> torch.Tensor:
    """A map between any two levels, taught by twelve steps of the teacher's ODE between them."""
    x0, _, noise, hi, lo, _ = given
    x = at = x0 + expand(hi, x0) * noise
    with torch.no_grad():
        for here, there in itertools.pairwise(hi * (lo / hi) ** (i / 12) for i in range(13)):
            at = heun(models.teacher, at, here, there, None)
        end = x - expand(hi, x) * (at - x) / expand(lo - hi, x)
    return weight(hi, lo) * distance(models.student(x, hi, None, lo), end)


def test_a_map_of_two_levels_trains_and_samples_with_what_is_there(monkeypatch):
    """One function and one row: no sampler, solver or command knows of it."""
    monkeypatch.setitem(
        METHODS, "two_level", MethodRow(two_level_regression, "flow map", needs_teacher=True)
    )
    problem, span = Gaussian(), NoiseRange(0.01, 10.0)
    student = mlp(two_time=True, sigma_min=span.sigma_min)

    def any_two(batch, stage, noise_range, generator):
        u = torch.rand(2, batch, dtype=torch.float64, generator=generator)
        lo, hi = (0.01 ** (1 - u) * 10.0**u).sort(0).values
        hi[::4], lo[::2] = span.sigma_max, span.sigma_min  # where samples begin and end
        return Levels(hi, lo)

    objective = objective_of("two_level", any_two, span, problem.denoiser)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    state = TrainState(student, None, {}, optimizer)
    x0 = problem.m + problem.s * torch.randn(512, 2, 1, 1, generator=torch.Generator())
    settings = FitSettings(steps=300, batch=512, seed=0, lr=1e-2, decay_to=0.0)
    run = fit(state, objective, lambda *_: (x0, None), lambda k, n: Stage(0, k / n), settings)
    losses = [float(info.loss.mean()) for info in run]
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    student.eval()
    with torch.no_grad():
        x = 10 * torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(1))
        hi = level(10.0, x)
        far, near = student(x, hi), student(x, hi, None, level(9.0, x))
        assert not torch.allclose(far, near)  # it hears where it is to go
        init = torch.zeros(2000, 2, 1, 1)
        drawn = multistep(student, init, [10.0], randn_like_from(3), sigma_min=0.01)
    assert float(drawn.mean()) == pytest.approx(problem.m, abs=0.1)
    assert float(drawn.std()) == pytest.approx(problem.s, abs=0.15)


class LogVariance(nn.Module):
    """A learned weight, as the method's own module."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)
        nn.init.zeros_(self.line.weight)
        nn.init.zeros_(self.line.bias)

    def forward(self, sigma):
        return self.line(sigma.log().float()[:, None])[:, 0]


def weighed(models: Models, given: Given, *, distance, weight) -> torch.Tensor:
    """Consistency training whose loss is weighed by what the method's own module learns."""
    plain = methods.consistency_training(models, given, distance=distance, weight=weight)
    log_variance = models.own(given.sigma_hi)
    return plain / log_variance.exp() + log_variance


def test_a_module_of_the_method_is_trained_with_the_student():
    student, own = mlp(), LogVariance()
    objective = make_objective(
        partial(weighed, distance=l2, weight=uniform_weight), uniform, NoiseRange()
    )
    optimizer = torch.optim.Adam([*student.parameters(), *own.parameters()], lr=1e-2)
    state = TrainState(student, None, {}, optimizer, own=own)
    x0 = torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    settings = FitSettings(steps=30, batch=64, seed=0, lr=1e-2, group=ALONE)
    infos = list(fit(state, objective, lambda *_: (x0, None), lambda k, n: Stage(n=9), settings))
    assert float(own.line.bias.detach()) != 0
    assert float(own.line.weight.detach()) != 0
    assert float(infos[-1].loss.mean()) < float(infos[0].loss.mean())


def test_a_step_is_skipped_when_the_gradient_of_that_module_is_not_finite():
    student, own = mlp(), LogVariance()

    def steep(models, given):
        root = (models.own.line.bias - models.own.line.bias.detach()).abs().sqrt()
        return (
            consistency_loss(
                models.student,
                models.target,
                noise_pair(given.x0, given.sigma_hi, given.sigma_lo, given.noise),
                None,
                l2,
                uniform_weight,
            )
            + root.sum()
        )

    optimizer = torch.optim.SGD([*student.parameters(), *own.parameters()], lr=1e-2)
    state = TrainState(student, None, {}, optimizer, own=own)
    settings = FitSettings(steps=1, batch=8, seed=0, lr=1e-2)
    objective = make_objective(steep, uniform, NoiseRange())
    before = [p.clone() for p in student.parameters()]
    x0 = torch.randn(8, 2, 1, 1)
    (info,) = fit(state, objective, lambda *_: (x0, None), lambda k, n: Stage(n=9), settings)
    assert info.skipped
    assert all(map(torch.equal, before, student.parameters()))


@pytest.mark.parametrize("name", METHODS)
def test_a_row_says_whether_two_passes_share_their_dropout_masks(name, monkeypatch):
    replays = []

    @contextmanager
    def counting():
        yield lambda: replays.append(name)

    for module in ("losses", "meanflow", "scm"):
        monkeypatch.setattr(f"cmtool.core.{module}.same_dropout", counting)
    student = mlp(two_time=METHODS[name].makes == "flow map")
    objective = objective_of(name, LEVELS.get(name, uniform), teacher=mlp())
    given = (torch.randn(3, 2, 1, 1), None, STAGE, step_generator(0, 0, 0))
    objective(alone(student, name), *given)
    assert bool(replays) == METHODS[name].shares_masks
