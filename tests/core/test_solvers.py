import pytest
import torch

from cmtool.core.noise import karras_sigmas
from cmtool.core.solvers import SOLVERS, denoised, dpm2, euler, heun, integrate
from cmtool.core.tensors import level
from tests.problems import Gaussian, slope

ORDER = {"euler": 1, "heun": 2, "dpm2": 2}


@pytest.mark.parametrize("name", SOLVERS)
def test_global_error_falls_at_the_order_of_the_solver(name):
    problem, x = Gaussian(), torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64)
    exact = problem.at(x, 5.0, problem.eps)
    sizes = [64, 128, 256, 512]
    errors = []
    for n in sizes:
        sigmas = karras_sigmas(n + 1, problem.eps, 5.0).flip(0)
        errors.append(float((integrate(SOLVERS[name], problem.denoiser, x, sigmas) - exact).abs()))
    assert slope(sizes, errors) == pytest.approx(ORDER[name], abs=0.1)


@pytest.mark.parametrize(
    ("index", "by_heun", "by_euler"),
    [(0, 0.71983871, 0.71983575), (10, 0.65565611, 0.61847093), (16, 0.99989468, 0.99983358)],
)
def test_one_step_matches_the_published_numbers(index, by_heun, by_euler):
    sigmas = karras_sigmas(18).flip(0)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    toy = Gaussian(m=0.0, s=0.5)
    now, then = level(sigmas[index], x), level(sigmas[index + 1], x)
    assert float(heun(toy.denoiser, x, now, then, None)) == pytest.approx(by_heun, abs=5e-9)
    assert float(euler(toy.denoiser, x, now, then, None)) == pytest.approx(by_euler, abs=5e-9)


@pytest.mark.parametrize(
    ("name", "to_zero", "end"),
    [("heun", denoised, 0.52762464), ("euler", denoised, 0.42303144), ("dpm2", dpm2, 0.50959353)],
)
def test_a_walk_to_zero_matches_the_published_numbers(name, to_zero, end):
    sigmas = torch.cat([karras_sigmas(18).flip(0), torch.zeros(1, dtype=torch.float64)])
    x = torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    toy = Gaussian(m=0.0, s=0.5)
    result = integrate(SOLVERS[name], toy.denoiser, x, sigmas, to_zero=to_zero)
    assert float(result) == pytest.approx(end, abs=5e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_each_image_has_its_own_levels(name):
    problem, x = Gaussian(), torch.randn(3, 2, 1, 1, dtype=torch.float64)
    now, then = torch.tensor([3.0, 2.0, 1.0]).double(), torch.tensor([1.0, 0.5, 0.4]).double()
    together = SOLVERS[name](problem.denoiser, x, now, then, None)
    for i in range(3):
        alone = SOLVERS[name](problem.denoiser, x[i : i + 1], now[i : i + 1], then[i : i + 1], None)
        torch.testing.assert_close(together[i : i + 1], alone)
