"""Samplers: from noise to images with a Denoiser.

Each has the signature `(f, init, sigmas, randn_like, *, sigma_min, labels, project)`: `init` is
(B, C, H, W) and zero for plain sampling, `sigmas` descend, `project` is an edit's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cmtool.core.noise import NoiseRange, karras_sigmas
from cmtool.core.solvers import euler, heun, integrate
from cmtool.core.tensors import level
from cmtool.core.types import Denoiser, Projection, RandnLike, Solver
from cmtool.errors import UserError


def identity(x0: Tensor) -> Tensor:
    """Return x0 (B, C, H, W) unchanged."""
    return x0


def multistep(
    f: Denoiser,
    init: Tensor,
    sigmas: Sequence[float] | Tensor,
    randn_like: RandnLike,
    *,
    sigma_min: float,
    labels: Tensor | None = None,
    project: Projection = identity,
) -> Tensor:
    """Return images (B, C, H, W) by multistep consistency sampling, one call of f per level.

    Algorithm 1 of Song et al. (2023) when `init` is zero and `project` the identity, Algorithm 4
    (zero-shot editing) otherwise. One level is one-step sampling. Raises UserError unless the
    levels descend and stay at or above sigma_min.
    """
    check_levels(sigmas, sigma_min)
    x0 = project(f(init + sigmas[0] * randn_like(init), level(sigmas[0], init), labels))
    for sigma in sigmas[1:]:
        noise_scale = (sigma**2 - sigma_min**2) ** 0.5
        x = x0 + noise_scale * randn_like(x0)
        x0 = project(f(x, level(sigma, x), labels))
    return x0


def ode(
    denoiser: Denoiser,
    init: Tensor,
    sigmas: Sequence[float] | Tensor,
    randn_like: RandnLike,
    *,
    solver: Solver,
    sigma_min: float,
    labels: Tensor | None = None,
    project: Projection = identity,
) -> Tensor:
    """Return images (B, C, H, W) by walking the teacher's ODE down `sigmas` and on to 0.

    The deterministic sampler of Karras et al. (2022), Algorithm 1; `project` is applied at the
    end. n levels cost n evaluations with Euler and 2n - 1 with Heun.
    """
    check_levels(sigmas, sigma_min)
    x = init + sigmas[0] * randn_like(init)
    walk = torch.as_tensor([*sigmas, 0.0], dtype=torch.float64)
    return project(integrate(solver, denoiser, x, walk, labels))


def sampling_levels(n: int, noise_range: NoiseRange) -> list[float]:
    """Return n descending levels for a teacher: the Karras grid, from sigma_max to sigma_min."""
    if n == 1:
        return [noise_range.sigma_max]
    return karras_sigmas(n, *noise_range).flip(0).tolist()


def check_levels(sigmas: Sequence[float] | Tensor, sigma_min: float) -> None:
    """Raise UserError unless the levels descend strictly and none lies below sigma_min."""
    values = [float(sigma) for sigma in sigmas]
    shown = ",".join(f"{v:g}" for v in values)
    if not values:
        raise UserError("no noise levels", "give at least one, for example --sigmas 80")
    if not all(map(math.isfinite, values)):
        raise UserError(f"noise levels {shown} are not finite", "give numbers")
    if any(a <= b for a, b in itertools.pairwise(values)):
        raise UserError(f"noise levels {shown} do not descend", "list them from high to low")
    if not values[-1] >= sigma_min:
        raise UserError(f"noise level {values[-1]:g} is below sigma_min {sigma_min:g}", "raise it")


def clip(x0: Tensor) -> Tensor:
    """Return x0 clamped to [-1, 1], as the released sampler does at every evaluation."""
    return x0.clamp(-1, 1)


def clipped(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser with every answer clamped to [-1, 1]."""

    def clipped_denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        return clip(denoiser(x, sigma, labels))

    return clipped_denoiser


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "multistep": multistep,
    "euler": partial(ode, solver=euler),
    "heun": partial(ode, solver=heun),
}
