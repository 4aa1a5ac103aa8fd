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
from cmtool.core.solvers import denoised, dpm2, dpmpp_2m_walk, euler, heun, integrate
from cmtool.core.tensors import chunks_of, clip, identity, level
from cmtool.core.types import Denoiser, Projection, RandnLike, Solver
from cmtool.errors import UserError

Run = Callable[[Denoiser, Sequence[tuple[Tensor | None, ...]]], list[Tensor]]
"""`(denoiser, parts) -> answers`: what the denoiser answers to each part, in order."""


def one_by_one(denoiser: Denoiser, parts: Sequence[tuple[Tensor | None, ...]]) -> list[Tensor]:
    """Return what a denoiser answers to each part."""
    return [denoiser(*part) for part in parts]  # type: ignore[arg-type]  # x and sigma are there


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
    to_zero: Solver = denoised,
    sigma_min: float,
    labels: Tensor | None = None,
    project: Projection = identity,
) -> Tensor:
    """Return images (B, C, H, W) by walking the teacher's ODE down `sigmas` and on to 0.

    The deterministic sampler of Karras et al. (2022), Algorithm 1; `project` is applied at the
    end. The last step, to 0, is `to_zero`'s.
    """
    check_levels(sigmas, sigma_min)
    x = init + sigmas[0] * randn_like(init)
    walk = torch.as_tensor([*sigmas, 0.0], dtype=torch.float64)
    return project(integrate(solver, denoiser, x, walk, labels, to_zero=to_zero))


def dpmpp_2m(
    denoiser: Denoiser,
    init: Tensor,
    sigmas: Sequence[float] | Tensor,
    randn_like: RandnLike,
    *,
    sigma_min: float,
    labels: Tensor | None = None,
    project: Projection = identity,
) -> Tensor:
    """Return images (B, C, H, W) by DPM-Solver++(2M) (Lu et al. 2022b, Alg. 2): order 2."""
    check_levels(sigmas, sigma_min)
    start = init + sigmas[0] * randn_like(init)
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    *_, x = dpmpp_2m_walk(denoiser, start, levels, labels)
    return project(x)


def ancestral(
    denoiser: Denoiser,
    init: Tensor,
    sigmas: Sequence[float] | Tensor,
    randn_like: RandnLike,
    *,
    sigma_min: float,
    labels: Tensor | None = None,
    project: Projection = identity,
) -> Tensor:
    """Return images (B, C, H, W) by ancestral sampling: Euler down too far, then fresh noise.

    The generative process of DDPM (Ho et al. 2020) in the levels of Karras et al.; the variance of
    each level is kept: sigma_down^2 + sigma_up^2 = sigma_next^2.
    """
    check_levels(sigmas, sigma_min)
    x = init + sigmas[0] * randn_like(init)
    for sigma, sigma_next in itertools.pairwise([*map(float, sigmas), 0.0]):
        sigma_up = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        x = euler(denoiser, x, level(sigma, x), level(sigma_down, x), labels)
        x = x + sigma_up * randn_like(x)
    return project(x)


def stochastic_heun(
    denoiser: Denoiser,
    init: Tensor,
    sigmas: Sequence[float] | Tensor,
    randn_like: RandnLike,
    *,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
    sigma_min: float,
    labels: Tensor | None = None,
    project: Projection = identity,
) -> Tensor:
    """Return images (B, C, H, W) by Heun with churn (Karras et al. 2022, Algorithm 2).

    Before each step between s_tmin and s_tmax the level is raised by the factor 1 + gamma with
    fresh noise, gamma = min(s_churn / n, sqrt(2) - 1). The defaults are those of EDM for
    ImageNet-64. A noise is drawn at every step, as in the sources, so that changing the range
    leaves the later draws alone.
    """
    check_levels(sigmas, sigma_min)
    x = init + sigmas[0] * randn_like(init)
    n = len(sigmas)
    for sigma, sigma_next in itertools.pairwise([*map(float, sigmas), 0.0]):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        raised = sigma * (1 + gamma)
        x = x + math.sqrt(raised**2 - sigma**2) * s_noise * randn_like(x)
        step = heun if sigma_next else denoised
        x = step(denoiser, x, level(raised, x), level(sigma_next, x), labels)
    return project(x)


def count_calls(sampler: Callable[..., Tensor], sigmas: Sequence[float]) -> int:
    """Return how often a sampler calls the network for an image, by running it on one pixel."""
    calls = 0

    def counting(x: Tensor, sigma: Tensor, *given: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    sampler(counting, torch.zeros(1, 1, 1, 1), sigmas, torch.zeros_like, sigma_min=0.0)
    return calls


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
        ordered = ",".join(f"{v:g}" for v in sorted(set(values), reverse=True))
        raise UserError(f"noise levels {shown} do not go from high to low", f"give {ordered}")
    if not values[-1] >= sigma_min:
        raise UserError(f"noise level {values[-1]:g} is below sigma_min {sigma_min:g}", "raise it")


def clipped(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser with every answer clamped to [-1, 1]."""

    def clipped_denoiser(x: Tensor, sigma: Tensor, *given: Tensor | None) -> Tensor:
        return clip(denoiser(x, sigma, *given))

    return clipped_denoiser


def tiled(denoiser: Denoiser, size: tuple[int, int]) -> Denoiser:
    """Return a denoiser of images larger than `size` (H, W), which it makes tile by tile.

    Tiles overlap by about half and their answers are averaged (MultiDiffusion, Bar-Tal et al.
    2023). An image of the size itself is passed on.
    """

    def tiled_denoiser(x: Tensor, sigma: Tensor, *given: Tensor | None) -> Tensor:
        if tuple(x.shape[-2:]) == size:
            return denoiser(x, sigma, *given)
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for top in _offsets(x.shape[-2], size[0]):
            for left in _offsets(x.shape[-1], size[1]):
                part = (..., slice(top, top + size[0]), slice(left, left + size[1]))
                total[part] += denoiser(x[part], sigma, *given)
                count[part] += 1
        return total / count

    return tiled_denoiser


def in_chunks(denoiser: Denoiser, size: int, run: Run = one_by_one) -> Denoiser:
    """Return a denoiser that always sees `size` images at once, the last one repeated to fill up.

    How many images a product or a convolution is for decides how it is summed: only in equal
    batches is the answer for an image, to the last bit, a function of that image. `run` calls it
    for each chunk.
    """

    def chunked_denoiser(x: Tensor, sigma: Tensor, *given: Tensor | None) -> Tensor:
        more = ([None] * len(x) if t is None else chunks_of(t, size) for t in given)
        parts = list(zip(chunks_of(x, size), chunks_of(sigma, size), *more, strict=False))
        return torch.cat(run(denoiser, parts))[: len(x)]

    return chunked_denoiser


def _offsets(side: int, tile: int) -> list[int]:
    """Return where tiles begin on a side: evenly spread, no further apart than half a tile."""
    steps = math.ceil((side - tile) / (tile / 2))
    return [round(i * (side - tile) / steps) for i in range(steps + 1)] if steps else [0]


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "multistep": multistep,
    "euler": partial(ode, solver=euler),
    "heun": partial(ode, solver=heun),
    "dpm2": partial(ode, solver=dpm2, to_zero=dpm2),
    "dpmpp_2m": dpmpp_2m,
    "ancestral": ancestral,
    "stochastic_heun": stochastic_heun,
}
