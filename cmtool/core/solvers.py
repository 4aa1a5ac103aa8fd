"""Solvers walk the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, one step each.

Every solver is a function `(denoiser, x, sigma, sigma_next, labels) -> x_next` with x
(B, C, H, W) and both levels (B,); sigma_next may lie on either side of sigma. Only `euler` and
`dpm2` may end at 0, where the slope is not defined.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from cmtool.core.tensors import expand, level
from cmtool.core.types import Denoiser, Solver


def slope(denoiser: Denoiser, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """Return dx/dsigma at (x, sigma) (Karras et al. 2022, eq. 3)."""
    return (x - denoiser(x, sigma, labels)) / expand(sigma, x)


def euler(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None
) -> Tensor:
    """Return x after one Euler step: order 1, one evaluation. DDIM in this parametrisation."""
    return x + expand(sigma_next - sigma, x) * slope(denoiser, x, sigma, labels)


def heun(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None
) -> Tensor:
    """Return x after one Heun step: order 2, two evaluations (Karras et al. 2022, Alg. 1)."""
    delta = expand(sigma_next - sigma, x)
    d = slope(denoiser, x, sigma, labels)
    d_next = slope(denoiser, x + delta * d, sigma_next, labels)
    return x + delta * (d + d_next) / 2


def dpm2(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None
) -> Tensor:
    """Return x after one midpoint step: order 2, two evaluations (DPM-Solver-2, Lu et al. 2022).

    The midpoint is that of Karras et al.'s grid, the mean of the cube roots of the levels, as in
    the released sampler.
    """
    mid = ((sigma ** (1 / 3) + sigma_next ** (1 / 3)) / 2) ** 3
    x_mid = x + expand(mid - sigma, x) * slope(denoiser, x, sigma, labels)
    return x + expand(sigma_next - sigma, x) * slope(denoiser, x_mid, mid, labels)


def denoised(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, labels: Tensor | None
) -> Tensor:
    """Return the denoised image: what an Euler step to 0 gives, without its rounding."""
    return denoiser(x, sigma, labels)


def integrate(
    solver: Solver,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    *,
    to_zero: Solver = denoised,
) -> Tensor:
    """Return the end of the path through x (B, C, H, W) along the levels `sigmas` (n,).

    A last level of 0, where the slope is not defined, is reached by `to_zero`.
    """
    for sigma, sigma_next in itertools.pairwise(sigmas):
        step = solver if float(sigma_next) else to_zero
        x = step(denoiser, x, level(sigma, x), level(sigma_next, x), labels)
    return x


def walk(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, labels: Tensor | None, *, solver: Solver
) -> Iterator[Tensor]:
    """Yield the points of the path from x at sigmas[0]: at each later level, and its end at 0."""
    for sigma, sigma_next in itertools.pairwise([*sigmas, sigmas.new_zeros(())]):
        step = solver if float(sigma_next) else denoised
        x = step(denoiser, x, level(sigma, x), level(sigma_next, x), labels)
        yield x


def dpmpp_2m_walk(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, labels: Tensor | None
) -> Iterator[Tensor]:
    """Yield the points of `walk` by DPM-Solver++(2M) (Lu et al. 2022b, Alg. 2): order 2.

    One evaluation a level: the slope of D in lambda = -ln sigma is taken from the level before. The
    step to 0 returns the denoised image.
    """
    before: tuple[Tensor, float] | None = None  # D and the step in lambda that led away from it
    for sigma, sigma_next in itertools.pairwise(map(float, sigmas)):
        d = denoiser(x, level(sigma, x), labels)
        h = math.log(sigma / sigma_next)
        ahead = d if before is None else d + (d - before[0]) * h / (2 * before[1])
        x = (sigma_next / sigma) * x - math.expm1(-h) * ahead
        before = (d, h)
        yield x
    yield denoiser(x, level(sigmas[-1], x), labels)


Walk = Callable[[Denoiser, Tensor, Tensor, Tensor | None], Iterator[Tensor]]
"""`(denoiser, x, sigmas, labels)` -> the later points of the path, each (B, C, H, W)."""

SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpm2": dpm2}
WALKS: dict[str, Walk] = {
    "dpmpp_2m": dpmpp_2m_walk,
    **{name: partial(walk, solver=solver) for name, solver in SOLVERS.items()},
}
