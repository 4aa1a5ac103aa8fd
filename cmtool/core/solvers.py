"""Solvers walk the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, one step each.

Every solver is a function `(denoiser, x, sigma, sigma_next, labels) -> x_next` with x
(B, C, H, W) and both levels (B,); sigma_next may lie on either side of sigma but is not 0.
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


def integrate(
    solver: Solver, denoiser: Denoiser, x: Tensor, sigmas: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Return the end of the path through x (B, C, H, W) along the levels `sigmas` (n,).

    A last level of 0 is reached by the denoised image itself, which is what an Euler step to 0
    gives for every solver.
    """
    ends_at_zero = float(sigmas[-1]) == 0
    walk = sigmas[:-1] if ends_at_zero else sigmas
    for sigma, sigma_next in itertools.pairwise(walk):
        x = solver(denoiser, x, level(sigma, x), level(sigma_next, x), labels)
    return denoiser(x, level(walk[-1], x), labels) if ends_at_zero else x


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun}
