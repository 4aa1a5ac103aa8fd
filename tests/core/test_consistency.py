import pytest
import torch

from cmtool.core.consistency import deviations, paths
from cmtool.core.noise import NoiseRange
from cmtool.core.samplers import sampling_levels
from cmtool.core.solvers import heun
from tests.problems import Gaussian

PROBLEM = Gaussian()


def followed(substeps):
    noise = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    grid = sampling_levels(6 * substeps + 1, NoiseRange(PROBLEM.eps, 80.0, 7.0))
    return list(paths(PROBLEM.denoiser, noise, grid, heun))[::substeps]


def test_the_exact_map_deviates_by_the_solvers_error_alone():
    noise = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(followed(8)[0].x, 80 * noise)  # whose variance is one
    coarse, fine = (deviations(PROBLEM.consistency, PROBLEM.denoiser, followed(n)) for n in (8, 16))
    assert len(fine) == 6
    for a, b in zip(coarse[1:], fine[1:], strict=True):
        assert b.end < a.end / 2.5 < 0.01  # of second order
    assert [row.sigma for row in fine] == sorted((row.sigma for row in fine), reverse=True)


def test_paths_and_deviations_are_of_the_images_classes():
    heard, labels = [], torch.tensor([3, 1])

    def f(x, sigma, labels=None):
        heard.append(labels)
        return 0.5 * x

    noise = torch.ones(2, 1, 1, 1).double()
    points = list(paths(f, noise, [4.0, 2.0, 1.0], heun, labels))
    deviations(f, f, points, labels)
    assert len(heard) == 2 * 2 + 2 * 3
    assert all(given is labels for given in heard)


def test_deviations_in_closed_form():
    points = followed(64)
    end = points[-1].x

    def off(x, sigma, labels=None):  # wrong by the logarithm of the level
        return PROBLEM.consistency(x, sigma) + sigma.log()[:, None, None, None]

    rows = deviations(off, PROBLEM.denoiser, points)
    for row, after in zip(rows, [r.sigma for r in rows[1:]] + [PROBLEM.eps], strict=True):
        assert row.end == pytest.approx(abs(torch.tensor(row.sigma).log().item()), abs=2e-3)
        assert row.next == pytest.approx(torch.tensor(row.sigma / after).log().item(), abs=2e-3)
        x = next(p.x for p in points if p.sigma == row.sigma)
        mean = PROBLEM.denoiser(x, torch.full((4,), row.sigma).double())
        assert row.teacher == pytest.approx(float((mean - end).square().mean().sqrt()))
