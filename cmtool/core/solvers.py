"""Solvers walk the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, one step each.

Every solver is a function `(denoiser, x, sigma, sigma_next, labels) -> x_next` with x
(B, C, H, W) and both levels (B,); sigma_next may lie on either side of sigma. Only `euler` and
`dpm2` may end at 0, where the slope is not defined.
"""

from __future__ import annotations

import itertools

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


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpm2": dpm2}
