"""Continuous time: the limits of the losses of a pair, and what the limits lead to."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmtool.core.distances import DISTANCES, is_norm, l1, l2, pseudo_huber
from cmtool.core.losses import (
    consistency_loss,
    continuous_loss,
    live_loss,
    noise_pair,
    noise_point,
    teacher_pair,
    teacher_point,
    uniform_weight,
)
from cmtool.core.networks import NETWORKS
from cmtool.core.noise import NoiseRange, Stage, karras_sigmas, ramp
from cmtool.core.precond import edm_scalings
from cmtool.core.rng import same_dropout, seeded
from cmtool.core.solvers import SOLVERS
from cmtool.core.tangents import OdePoint, curvature, half_square, tangent
from cmtool.core.tensors import expand
from tests.networks import network
from tests.objectives import alone, objective_of
from tests.problems import Gaussian, slope

PROBLEM = Gaussian()
CURVED = [n for n, distance in DISTANCES.items() if not is_norm(distance) and n != "lpips"]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(dtype=torch.float64):
    x, dx = drawn(2, 2, 3, 8, 8).to(dtype)
    return OdePoint(x, torch.tensor([0.7, 4.0]).double(), dx), torch.tensor([1, 7])


def gradient(loss, f):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), f.parameters())])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tangent_is_the_derivative_along_the_path(name):
    f, (point, labels) = network(name).double(), images()
    dropout = torch.get_rng_state()

    def at(h):
        torch.set_rng_state(dropout)  # the same units at both points
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the other kernels have no tangent
            return f(point.x + h * point.slope, point.sigma + h, labels)

    torch.set_rng_state(dropout)
    x0, dx0 = tangent(f, point, labels)
    assert torch.equal(x0, at(0))
    difference = (at(1e-5) - at(-1e-5)) / 2e-5
    assert dx0.abs().min() < 0.1 * dx0.abs().max()
    torch.testing.assert_close(dx0, difference, rtol=1e-5, atol=1e-7)


def test_the_exact_map_has_no_tangent_and_another_has():
    x0, noise = drawn(2, 64, 1, 1, 1)
    sigma = torch.linspace(0.3, 20, 64).double()
    point = teacher_point(x0, sigma, noise, None, PROBLEM.denoiser)
    assert float(tangent(PROBLEM.consistency, point, None)[1].abs().max()) < 1e-14
    assert float(tangent(PROBLEM.denoiser, point, None)[1].abs().mean()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_tangent_is_float32_and_drops_the_same_units_under_autocast(name, dtype):
    f, (point, labels) = network(name), images(torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), same_dropout() as replay:
        x0 = f(*point[:2], labels)
        replay()
        with torch.no_grad():
            x0_target, dx0 = tangent(f, point, labels)
        other, _ = tangent(f, point, labels)
    with same_dropout() as replay, torch.no_grad():
        first = tangent(f, point, labels)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            replay()
            assert all(map(torch.equal, first, tangent(f, point, labels)))
    assert x0_target.dtype == dx0.dtype == torch.float32
    assert not dx0.requires_grad
    same = float((x0.detach() - x0_target).abs().mean())
    if dtype == torch.float32:
        assert same < 1e-6
    if name != "mlp":
        assert same < 0.25 * float((x0 - other).detach().abs().mean())


def test_the_tangent_goes_through_fused_attention():
    """On a GPU networks use it, and it has no forward mode on any device."""

    def f(x, sigma, labels=None):
        q = (x * expand(sigma, x)).flatten(2)[:, None]
        return F.scaled_dot_product_attention(q, q, x.flatten(2)[:, None])

    (x, sigma, dx), _ = images()
    _, along = tangent(f, OdePoint(x, sigma, dx), None)
    h = 1e-5
    difference = (f(x + h * dx, sigma + h) - f(x - h * dx, sigma - h)) / (2 * h)
    torch.testing.assert_close(along, difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(DISTANCES.keys() - {"lpips"}))
def test_a_distance_is_a_norm_or_has_a_curvature(name):
    x0, v = drawn(2, 4, 3, 40, 32)
    h_v = curvature(DISTANCES[name], x0, v)
    assert bool((h_v == 0).all()) == is_norm(DISTANCES[name])
    near = [DISTANCES[name](x0 + h * v, x0) / h for h in (1e-4, 2e-4)]
    if is_norm(DISTANCES[name]):
        torch.testing.assert_close(near[0], near[1])
        torch.testing.assert_close(near[0], DISTANCES[name](v, torch.zeros_like(v)))
    else:
        small = 1e-5 if name == "pseudo_huber" else 1e-4  # well inside its c
        expected = DISTANCES[name](x0 + small * v, x0) / small**2
        torch.testing.assert_close(half_square(DISTANCES[name], x0, v), expected, rtol=1e-2, atol=0)


def test_values_by_hand():
    v = torch.tensor([1.0, -2.0, 0.5, 0.0]).reshape(1, 1, 2, 2)
    x0 = torch.full_like(v, 0.3)
    assert float(half_square(l2, x0, v)) == pytest.approx(5.25 / 4)  # eq. 21, as a mean
    assert float(half_square(partial(pseudo_huber, c=0.1), x0, v)) == pytest.approx(5.25 / 0.2)
    f = lambda x, sigma, labels=None: 3 * x + expand(sigma**2, x)  # noqa: E731
    point = OdePoint(x0, torch.tensor([2.0]), v)
    live = partial(live_loss, f, f, point, None, weight=lambda hi, lo: 10 * hi)
    g = 3 * v + 4
    assert float(live(distance=l1)) == pytest.approx(float(20 * g.abs().mean()))
    assert float(live(distance=l2)) == pytest.approx(float(20 * (g**2).mean()))
    held = continuous_loss(f, f, point, None, l2, lambda hi, lo: 10 * hi)
    assert float(held) == pytest.approx(float(20 * (g**2).mean()))  # shifted to the other's value


def test_the_target_is_held_fixed_and_live_is_not():
    student, target = nn.Conv2d(1, 1, 1).double(), nn.Conv2d(1, 1, 1).double()
    point = OdePoint(*drawn(2, 4, 1, 2, 2)[:1], torch.ones(4).double(), drawn(4, 1, 2, 2))
    continuous_loss(
        lambda x, s, y: student(x), lambda x, s, y: target(x), point, None, l2, uniform_weight
    ).sum().backward()
    assert student.weight.grad is not None
    assert target.weight.grad is None
    live_loss(
        lambda x, s, y: student(x), lambda x, s, y: target(x), point, None, l2, uniform_weight,
    ).sum().backward()  # fmt: skip
    assert target.weight.grad is not None


def test_both_passes_drop_the_same_units():
    """Of f = w x with some units dropped the loss is then w times half of its gradient."""
    drop, w = nn.Dropout(0.5), torch.tensor(3.0, requires_grad=True)

    def f(x, sigma, labels=None):
        return drop(w * x)

    one = torch.ones(1, 1, 16, 16)
    with seeded(torch.Generator().manual_seed(0)):
        loss = continuous_loss(
            f, f, OdePoint(one, torch.ones(1), one), None, l2, uniform_weight
        ).sum()
    (gradient,) = torch.autograd.grad(loss, w)
    assert loss.item() > 0
    assert gradient.item() == pytest.approx(2 * loss.item() / 3)


STEPS = [2.0**-k for k in range(8, 12)]


def order_and_error(limits, limit):
    errors = [float((g - limit).norm() / limit.norm()) for g in limits]
    return slope([1 / h for h in STEPS], errors), errors[-1]


@pytest.mark.parametrize("name", CURVED)
@pytest.mark.parametrize("method", ["cd", "ct"])
def test_the_gradient_is_the_limit_of_the_pairs(method, name):
    """Theorems 5 and 6: grad L^N / h, h the difference of the levels; in sign and in size."""
    f = network("mlp", 2, 0).double()
    teacher = network("mlp", 2, 0, edm_scalings).double()
    x0, noise = drawn(2, 8, 2, 4, 4)
    sigma = torch.linspace(0.8, 5, 8).double()
    distance = partial(pseudo_huber, c=1.0) if name == "pseudo_huber" else DISTANCES[name]
    point = noise_point(x0, sigma, noise)
    if method == "cd":
        point = teacher_point(x0, sigma, noise, None, teacher)
    limits = []
    for h in STEPS:
        pair = noise_pair(x0, sigma, sigma - h, noise)
        if method == "cd":
            pair = teacher_pair(x0, sigma, sigma - h, noise, None, teacher, SOLVERS["euler"])
        limits.append(gradient(consistency_loss(f, f, pair, None, distance, uniform_weight), f) / h)
    limit = gradient(continuous_loss(f, f, point, None, distance, uniform_weight), f)
    order, error = order_and_error(limits, limit)
    assert order == pytest.approx(1, abs=0.1)
    assert error < 0.01


@pytest.mark.parametrize("name", ["l1", "l2", "pseudo_huber"])
def test_live_is_the_limit_of_a_pair_differentiated_on_both_sides(name):
    """Theorems 3 and 4: L^N / h^2, and L^N / h for a norm; value and gradient."""
    f = network("mlp", 2, 0).double()
    teacher = network("mlp", 2, 0, edm_scalings).double()
    x0, noise = drawn(2, 8, 2, 4, 4)
    sigma = torch.linspace(0.8, 5, 8).double()
    distance = DISTANCES[name]
    norm = is_norm(distance)
    distance = partial(pseudo_huber, c=1.0) if name == "pseudo_huber" else distance
    values, limits = [], []
    for h in STEPS:
        pair = teacher_pair(x0, sigma, sigma - h, noise, None, teacher, SOLVERS["euler"])
        loss = distance(f(pair.x_hi, pair.sigma_hi), f(pair.x_lo, pair.sigma_lo))
        loss = loss / h if norm else loss / h**2
        values.append(loss.detach())
        limits.append(gradient(loss, f))
    point = teacher_point(x0, sigma, noise, None, teacher)
    live = live_loss(f, f, point, None, distance, uniform_weight)
    assert order_and_error(values, live.detach())[0] == pytest.approx(1, abs=0.1)
    order, error = order_and_error(limits, gradient(live, f))
    assert order == pytest.approx(1, abs=0.15)
    assert error < 0.01


def test_the_ramp_is_the_limit_of_the_grids():
    """(N - 1) grad L^N with lambda = 1 / (dsigma/du) is the mean over u of sigma = u^rho."""
    f, span = network("mlp", 2, 0).double(), NoiseRange(0.3, 10.0)
    x0, noise = drawn(2, 1, 2, 4, 4)
    low, high = (s ** (1 / span.rho) for s in span[:2])

    def thinning(sigma, _):  # du/dsigma, u the place on the ramp in [0, 1]
        return 1 / (span.rho * (high - low) * sigma ** (1 - 1 / span.rho))

    def expanded(sigmas):
        return x0.expand(len(sigmas), -1, -1, -1), noise.expand(len(sigmas), -1, -1, -1)

    u = low + (high - low) * (torch.arange(4000).double() + 0.5) / 4000
    many, noises = expanded(u)
    point = noise_point(many, u**span.rho, noises)
    limit = gradient(continuous_loss(f, f, point, None, l2, uniform_weight), f)
    errors, sizes = [], [33, 65, 129]
    for n in sizes:
        grid = karras_sigmas(n, *span)
        many, noises = expanded(grid[1:])
        pair = noise_pair(many, grid[1:], grid[:-1], noises)
        loss = consistency_loss(f, f, pair, None, l2, thinning)
        errors.append(float((gradient(loss, f) * (n - 1) - limit).norm() / limit.norm()))
    assert slope([n - 1 for n in sizes], errors) == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.05


def test_the_ramp_covers_its_range_evenly_in_the_root():
    span = NoiseRange(0.002, 80.0)
    sigma, _ = ramp(100_000, Stage(), span, torch.Generator().manual_seed(0))
    low, high = (s ** (1 / span.rho) for s in span[:2])
    place = (sigma ** (1 / span.rho) - low) / (high - low)
    assert 0 <= float(place.min()) < 1e-4
    assert 1 - 1e-4 < float(place.max()) <= 1
    assert float(place.mean()) == pytest.approx(1 / 2, abs=0.005)
    assert float(place.var()) == pytest.approx(1 / 12, abs=0.002)


def test_training_on_data_is_in_the_mean_distillation_of_the_exact_teacher():
    """The gradient is linear in the slope, whose mean given x is the ODE's (Remark 10)."""
    f = network("mlp", 1, 0).double()
    x, sigma = drawn(16, 1, 1, 1) * 3, torch.linspace(0.4, 5, 16).double()
    mean = PROBLEM.denoiser(x, sigma)
    spread = expand((1 / PROBLEM.s**2 + 1 / sigma**2) ** -0.5, x)

    def run(x0):
        point = OdePoint(x, sigma, (x - x0) / expand(sigma, x))
        return gradient(continuous_loss(f, f, point, None, l2, uniform_weight), f)

    exact = run(mean)
    both = (run(mean + spread) + run(mean - spread)) / 2
    torch.testing.assert_close(both, exact)
    assert not torch.allclose(run(mean + spread), exact, rtol=0.1)


class Family(nn.Module):
    """Maps of 1-D Gaussian data; power 1/2 and centre m is the exact one."""

    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(0.2).double())
        self.centre = nn.Parameter(torch.tensor(0.0).double())

    def forward(self, x, sigma, labels=None):
        s, eps = PROBLEM.s, PROBLEM.eps
        shrink = ((s**2 + eps**2) / (s**2 + expand(sigma**2, x))) ** self.power
        return shrink * x + (1 - shrink) * self.centre


@pytest.mark.parametrize(
    ("method", "distance", "bound"),
    [
        ("continuous_distillation", l2, 1e-4),
        ("live_distillation", l2, 1e-4),
        ("live_distillation", l1, 1e-3),
        ("continuous_training", l2, 0.03),  # the noise's variance is left
    ],
)
def test_training_finds_the_exact_map(method, distance, bound):
    f, steps = Family(), 250
    objective = objective_of(
        method, ramp, NoiseRange(PROBLEM.eps, 10.0), PROBLEM.denoiser, distance=distance
    )
    optimizer = torch.optim.Adam(f.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x0 = PROBLEM.m + PROBLEM.s * torch.randn(256, 1, 1, 1, generator=generator).double()
        optimizer.zero_grad()
        objective(alone(f), x0, None, Stage(), generator).loss.mean().backward()
        optimizer.step()
        schedule.step()
    power, centre = f.power.item(), f.centre.item()
    print(f"power {power} (0.5), centre {centre} ({PROBLEM.m})")
    assert power == pytest.approx(0.5, abs=bound)
    assert centre == pytest.approx(PROBLEM.m, abs=bound)
